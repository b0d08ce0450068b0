// Split-K decode attention over packed pages and the exact window, on tensor cores, compiled for one page format: the
// kernel and how it is launched. The roles:
//
//   shape, layout, thread    what is compiled, where it lies in shared memory, which part of the work a thread has
//   fragments                codes as operands of mma
//   pages, parameters        a ring of pages on their way; 8-bit parameters unpacked
//   query, scores            q as operands; S of a page
//   softmax, weights, mask   reference exponents and outputs; p and p' of a page; what a row does not see
//   sums, values, pair       sum p and sum p * zero; O of a page; what two warps that share a page exchange
//   mainloop, window         the split's pages; the split's part of the window
//   merge                    the teams' parts into one
//
// Layout: S[token, row] and O[channel, row]: keys (tokens) and values (channels) are the M = 16 operand A of
// mma.m16n8k16, eight query rows are N = 8, operand B. u counts tiles of 8 rows, r rows of a lane (2t + r), h halves of
// an m-tile (rows g and g + 8). Parallelisation: grid (splits, batch * KV heads, tiles of 8 or 16 rows). A block is
// four warps, a page each; or two that share each page. Blocks of the first page_splits take pages, the others the
// window. Memory traffic: each page once for 16 rows, by cp.async into a ring of two pages for each warp or pair, plus
// 4 (Dv + 2) bytes a row and split. Budget for D = 128, 2 bits, 8 rows: 168 registers, 48 KB of shared memory, so that
// three blocks fit on an SM: 12 warps with a page each in flight, 61 KB, and an H100 needs 20 KB an SM (3.35 TB/s * 800
// ns / 132). Instructions a token: tests/ops/test_cuda_budget.py; an H100 is memory-bound below 22.
//
// bf16 models use fp16 arithmetic for pages: q is scaled per row by a power of two into [1, 2), p is relative to a
// reference exponent that leaves p and p' inside fp16. Masks, positions, softcap and poisoned scales take the branch
// that moves it; the plain loop skips that.
#pragma once

#include "formats.cuh"
#include "mainloop.cuh"

namespace logquant::cuda::tensor {

// Before Hopper ptxas spills a register of one format at three blocks, so that has two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class S>
inline constexpr bool kTwoBlocks = S::kFitted && S::kValueDim == 112;
#else
template <class S>
inline constexpr bool kTwoBlocks = false;
#endif

// Blocks that shared memory and registers leave room for on an SM: 228 KB (163 KB on sm_80 hold fewer 4-bit pages
// still).
template <class K, class S = typename K::PageShape>
inline constexpr int kBlocks =
    K::kPaired || (S::kValueDim <= 64 && K::kTiles == 1)                                            ? 4
    : !kTwoBlocks<S> && S::kValueDim <= 128 && K::kTiles == 1 && 3 * Layout<K>::kBytes <= 200 << 10 ? 3
                                                                                                    : 2;

template <class T, class S, int tiles>
__global__ void __launch_bounds__(Config<T, S, tiles>::kThreads, kBlocks<Config<T, S, tiles>>)
    attend_split(__grid_constant__ const AttendArgs args) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  Attention<Config<T, S, tiles>>(args, shared).run();
}

template <class T, class S, int tiles>
cudaError_t launch_tiles(const AttendArgs& args, cudaStream_t stream) {
  using K = Config<T, S, tiles>;
  const dim3 grid(args.page_splits + args.window_splits, args.batch * args.kv_heads,
                  (row_count(args) + K::kRows - 1) / K::kRows);
  return ptx::launch(&attend_split<T, S, tiles>, grid, K::kThreads, Layout<K>::kBytes, stream, args);
}

template <class T, class S>
cudaError_t launch(const AttendArgs& args, cudaStream_t stream) {
  return row_count(args) > 8 ? launch_tiles<T, S, 2>(args, stream) : launch_tiles<T, S, 1>(args, stream);
}

}  // namespace logquant::cuda::tensor
