// The teams' parts of a block's rows become one, and that goes to global memory: the split's partial result.
//
// Layout: shared memory, [team][row][channel] of outputs and [team][row][2] of reference exponents and sums.
// Parallelisation: a warp takes 64 channels of a row at a time, a lane two that are 32 apart.
// Memory traffic: 4 (Dv + 2) bytes a row.
//
// Pages of fitted formats hold rotated values: their sum is rotated back here, once.
#pragma once

#include "values.cuh"
#include "window.cuh"

namespace logquant::cuda::tensor {

// Undoes the rotation of 64 channels: of channels `lane` and lane + 32.
template <class K>
LOGQUANT_DEVICE void rotate_back(int lane, float (&x)[2]) {
  constexpr int kBlock = K::PageShape::kFormat.hadamard_block();
#pragma unroll
  for (int step = 1; step < (kBlock < 32 ? kBlock : 32); step *= 2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float other = __shfl_xor_sync(ptx::kFullMask, x[h], step);
      x[h] = other + (lane & step ? -x[h] : x[h]);
    }
  }
  if constexpr (kBlock == 64) {
    const float low = x[0] + x[1];
    x[1] = x[0] - x[1];
    x[0] = low;
  }
  static_assert(!K::PageShape::kFitted || kBlock >= 16);
#pragma unroll
  for (int h = 0; h < 2; ++h) x[h] *= hadamard_factor(kBlock);
}

template <class K>
LOGQUANT_DEVICE void merge(const ThreadInfo<K>& thread, const OnlineSoftmax<K>& softmax) {
  const AttendArgs& a = thread.args;
  const int g = thread.g, t = thread.t, lane = thread.lane, rank = thread.rank;
  const int split = ptx::block_x();
  const bool pages = split < a.page_splits;
  constexpr int kRows = K::kRows, kDim = K::PageShape::kValueDim;
  float* const parts = reinterpret_cast<float*>(thread.shared);
  float* const sums = parts + K::kTeams * kRows * kDim;
  __syncthreads();
  const auto put_tile = [&](const float (&x)[4], int row, int low_channel, int high_channel) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      parts[(row + r) * kDim + low_channel] = x[r];
      parts[(row + r) * kDim + high_channel] = x[2 + r];
    }
  };
  const int own_row = thread.team * kRows + 2 * t;
#pragma unroll
  for (int u = 0; u < K::kScoreTiles; ++u) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = own_row + 8 * (u + rank) + r;
      if (g == 0) sums[2 * row] = softmax.reference[u][r], sums[2 * row + 1] = softmax.sum[u][r];
    }
  }
#pragma unroll
  for (int i = 0; i < K::kTiles * K::kOwnTiles; ++i) {
    if (pages) {  // of a pair, the other's rows come second
      const int u = i / K::kOwnTiles ^ rank, j = K::first_warps_tile(i % K::kOwnTiles) + rank * K::kNextTiles;
      put_tile(softmax.out[i], own_row + 8 * u, page_channel<K>(g, j, 0), page_channel<K>(g, j, 1));
    } else {
      const int u = i / K::kChannelTiles + rank, j = i % K::kChannelTiles;
      put_tile(softmax.out[i], own_row + 8 * u, window_channel<K>(g, j, 0), window_channel<K>(g, j, 1));
    }
  }
  __syncthreads();
  constexpr int kBlocks64 = (kDim + 63) / 64;
  for (int i = thread.warp; i < min(kRows, thread.block.row_total - thread.block.first_row) * kBlocks64;
       i += K::kWarps) {
    const int row = i / kBlocks64, block = i % kBlocks64;
    float reference = -INFINITY, total = 0.0f;
#pragma unroll
    for (int w = 0; w < K::kTeams; ++w) reference = fmaxf(reference, sums[2 * (w * kRows + row)]);
    const float finite = reference == -INFINITY ? 0.0f : reference;
    float x[2] = {};
#pragma unroll
    for (int w = 0; w < K::kTeams; ++w) {
      const float factor = ptx::exp2(sums[2 * (w * kRows + row)] - finite);
      total += factor * sums[2 * (w * kRows + row) + 1];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int c = 64 * block + 32 * h + lane;
        if (c < kDim) x[h] += factor * parts[(w * kRows + row) * kDim + c];
      }
    }
    if (K::PageShape::kFitted && pages) rotate_back<K>(lane, x);
    const int64_t at = thread.block.partial_index(a, split, thread.block.first_row + row);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = 64 * block + 32 * h + lane;
      if (c < kDim) a.partial_out[at * kDim + c] = x[h];
    }
    if (block == 0 && lane == 0) write_partial_sums(a, at, reference, total);
  }
}

}  // namespace logquant::cuda::tensor
