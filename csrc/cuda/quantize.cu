// Tokens into pages. A block is the keys or the values of one page of one KV head: it reads the page's tokens (gathered
// by the index, which is how the log window's selection is fused in) and writes its sections of the page.
//
// Grid (2 * pages, heads, batch), 256 threads. Memory: each token once from DRAM (again from L1), each page once to it:
// 512 + 80 bytes a token for dim 128, fp16, 2 bits. With feedback the values' tokens are read twice more, from L1 or
// L2, and half of the factors twice: 144 bytes a token. Budget: 64 registers, 11 KB of shared memory for dim 128, 36 KB
// where parameters are fitted, 38 KB with feedback, so that four blocks fit on an SM; it runs once in the life of a
// token.

#include "quantizer.cuh"

namespace logquant::cuda {
namespace {

struct IndexedRows {
  const int32_t* index;  // or nullptr
  int64_t start, step, last;
  LOGQUANT_DEVICE int64_t operator()(int t) const {
    const int64_t row = index != nullptr ? index[t] : start + step * t;
    return row < 0 ? 0 : row > last ? last : row;
  }
};

template <class T>
__global__ void __launch_bounds__(kQuantizeThreads, 4)
    quantize_pages(__grid_constant__ const QuantizeArgs args, __grid_constant__ const FeedbackTile tile, bool k_aligned,
                   bool v_aligned) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  const PageFormat& f = args.format;
  const int64_t p = blockIdx.x / 2, head = blockIdx.y, batch = blockIdx.z;
  uint32_t* const page = reinterpret_cast<uint32_t*>(args.pages.data) + batch * args.pages.batch_stride +
                         head * args.pages.head_stride + p * args.pages.page_stride;
  const IndexedRows rows{
      args.index == nullptr ? nullptr : args.index + batch * args.index_batch_stride + p * f.page_tokens,
      args.index_start + args.index_step * p * f.page_tokens, args.index_step, args.tokens - 1};
  const auto source = [&](const Tokens& x, bool aligned) {
    return PageSource<T, IndexedRows>{static_cast<const T*>(x.data) + batch * x.batch_stride + head * x.head_stride,
                                      x.token_stride, aligned, rows};
  };
  if (blockIdx.x % 2 == 0) {
    const int16_t* const map = args.key_map.of(batch, head);
    const float* const weights = args.key_weights.of(batch, head, p * f.page_tokens);
    quantize_keys(f, source(args.k, k_aligned), map, weights, page, shared);
  } else {
    const float* const feedback = args.value_feedback.of(batch, head, p * f.page_tokens * f.page_tokens);
    quantize_values(f, source(args.v, v_aligned), tile, feedback, page, shared);
  }
}

}  // namespace

cudaError_t quantize(const QuantizeArgs& args, cudaStream_t stream) {
  const int bytes = element_bytes(args.k.dtype);
  const dim3 grid(2 * args.page_count, args.heads, args.batch);
  return with_element(args.k.dtype, [&](auto element) {
    return ptx::launch(&quantize_pages<decltype(element)>, grid, kQuantizeThreads,
                       quantizer_shared(args.format, args.value_feedback.data != nullptr), stream, args,
                       feedback_tile(args.format), rows_aligned(args.k, bytes), rows_aligned(args.v, bytes));
  });
}

}  // namespace logquant::cuda
