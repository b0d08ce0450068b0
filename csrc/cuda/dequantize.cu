// Pages back into tokens. A block is the keys or the values of one page of one KV head.
//
// Grid (2 * pages, heads, batch), 256 threads. Memory: each page once from DRAM, each token once to it (80 + 512 bytes
// a token for dim 128, fp16, 2 bits). Budget: 64 registers, shared memory only for a column map (8 bytes a channel).

#include "dequantizer.cuh"

namespace logquant::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    dequantize_pages(__grid_constant__ const DequantizeArgs args, bool k_aligned, bool v_aligned) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  const PageFormat& f = args.format;
  const int64_t p = blockIdx.x / 2, head = blockIdx.y, batch = blockIdx.z;
  const uint32_t* const page = reinterpret_cast<const uint32_t*>(args.pages.data) + batch * args.pages.batch_stride +
                               head * args.pages.head_stride + p * args.pages.page_stride;
  const auto out = [&](const MutableTokens& x) {
    return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride + p * f.page_tokens * x.token_stride;
  };
  if (blockIdx.x % 2 == 0) {
    uint16_t* column_of = nullptr;
    if (args.key_map.data != nullptr) {
      column_of = reinterpret_cast<uint16_t*>(shared);
      fill_column_table(f, args.key_map.data + batch * args.key_map.batch_stride + head * args.key_map.head_stride,
                        column_of, kThreads);
    }
    dequantize_keys(f, page, column_of, 0, f.page_tokens, out(args.k), args.k.token_stride, k_aligned, kThreads);
  } else {
    dequantize_values(f, page, 0, f.page_tokens, f.hadamard_block(), 1.0f, out(args.v), args.v.token_stride, v_aligned,
                      kThreads);
  }
}

}  // namespace

cudaError_t dequantize(const DequantizeArgs& args, cudaStream_t stream) {
  const int bytes = element_bytes(args.k.dtype);
  const int shared = args.key_map.data == nullptr ? 0 : column_table_bytes(args.format);
  const dim3 grid(2 * args.page_count, args.heads, args.batch);
  return with_element(args.k.dtype, [&](auto element) {
    return ptx::launch(&dequantize_pages<decltype(element)>, grid, kThreads, shared, stream, args,
                       rows_aligned(args.k, bytes), rows_aligned(args.v, bytes));
  });
}

}  // namespace logquant::cuda
