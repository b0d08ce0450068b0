// One step of the rule on one KV head's window: quantise the leaving slots straight into the page store, then move the
// other tokens up, in place. A block is the keys or the values of one head.
//
// Grid (2, heads, batch), 256 threads. Memory: the window once from DRAM (the leaving tokens again from L2), the pages
// and what moves once to it: for W = 64, dim 128, fp16: 98 KB + 66 KB a head, every 64th token. Budget: as quantize.

#include "quantizer.cuh"

namespace logquant::cuda {
namespace {

struct SteppedRows {
  int64_t start, step;
  LOGQUANT_DEVICE int64_t operator()(int t) const { return start + step * t; }
};

// Rows move in chunks: everybody reads, then everybody writes. Row `to` comes from a row at or after it, so a chunk
// only writes rows that it or an earlier chunk has read.
template <class T>
LOGQUANT_DEVICE void close_gaps(T* window, int64_t stride, int dim, bool aligned, const EvictArgs& args) {
  constexpr int kHeld = 4;  // quads of elements in flight per thread
  const int quads = dim / 4;
  const int64_t total = (args.tokens - args.count - args.start) * quads;
  for (int64_t base = 0; base < total; base += kHeld * kQuantizeThreads) {
    Float4 held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t item = base + i * kQuantizeThreads + threadIdx.x;
      const int64_t stay = item / quads;  // the stay-th row after `start` that is not evicted
      const int64_t before = args.step == 1 ? args.count : min(args.count, stay / max(args.step - 1, int64_t{1}) + 1);
      if (item < total) held[i] = load4(window + (args.start + stay + before) * stride + item % quads * 4, aligned);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t item = base + i * kQuantizeThreads + threadIdx.x;
      if (item < total) store4(window + (args.start + item / quads) * stride + item % quads * 4, held[i], aligned);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kQuantizeThreads, 4)
    evict_window(__grid_constant__ const EvictArgs args, __grid_constant__ const FeedbackTile tile, bool k_aligned,
                 bool v_aligned) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  const PageFormat& f = args.format;
  const bool keys = blockIdx.x == 0;
  const int64_t head = blockIdx.y, batch = blockIdx.z;
  const MutableTokens& x = keys ? args.k : args.v;
  const bool aligned = keys ? k_aligned : v_aligned;
  T* const window = static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride;
  const int16_t* const map = args.key_map.of(batch, head);
  uint32_t* page =
      reinterpret_cast<uint32_t*>(args.pages.data) + batch * args.pages.batch_stride + head * args.pages.head_stride;
  for (int64_t first = 0; first < args.count; first += f.page_tokens, page += args.pages.page_stride) {
    const PageSource<T, SteppedRows> source{
        window, x.token_stride, aligned, {args.start + args.step * first, args.step}};
    if (keys) {
      quantize_keys(f, source, map, args.key_weights.of(batch, head, first), page, shared);
    } else {
      const float* const feedback = args.value_feedback.of(batch, head, first * f.page_tokens);
      quantize_values(f, source, tile, feedback, page, shared);
    }
    __syncthreads();
  }
  close_gaps(window, x.token_stride, keys ? f.head_dim : f.value_dim, aligned, args);
}

}  // namespace

cudaError_t evict(const EvictArgs& args, cudaStream_t stream) {
  const int bytes = element_bytes(args.k.dtype);
  return with_element(args.k.dtype, [&](auto element) {
    return ptx::launch(&evict_window<decltype(element)>, dim3(2, args.heads, args.batch), kQuantizeThreads,
                       quantizer_shared(args.format, args.value_feedback.data != nullptr), stream, args,
                       feedback_tile(args.format), rows_aligned(args.k, bytes), rows_aligned(args.v, bytes));
  });
}

}  // namespace logquant::cuda
