// A new token at the end of each row's window (logquant/ops/reference/decode_step.py).
//
// A block is a row of the batch, so that it alone counts the row's tokens. Grid (batch), 256 threads, 16 bits or 32
// bits a thread and step. Memory: the token's key, value and query of all heads, read once and written once: for 8 KV
// heads and 32 query heads of 128 channels in 16 bits, 12 KB a row. A row without room (the host has not evicted in
// time) gets a NaN for its newest key: what it attends to from then on is NaN, and no other memory is touched.

#include "elements.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace logquant::cuda {
namespace {

constexpr int kAppendThreads = 256;

// The token of every head of one row, from the only one of `from` to slot `slot` of `to`.
template <class T>
LOGQUANT_DEVICE void copy_token(const Tokens& from, const MutableTokens& to, int64_t batch, int64_t heads, int64_t dim,
                                int64_t slot) {
  const T* const source = static_cast<const T*>(from.data) + batch * from.batch_stride;
  T* const target = static_cast<T*>(to.data) + batch * to.batch_stride + slot * to.token_stride;
  for (int64_t i = threadIdx.x; i < heads * dim; i += kAppendThreads) {
    const int64_t head = i / dim, channel = i % dim;
    target[head * to.head_stride + channel] = source[head * from.head_stride + channel];
  }
}

template <class T>
LOGQUANT_DEVICE void poison(const MutableTokens& to, int64_t batch, int64_t heads, int64_t slot, T nan) {
  T* const target = static_cast<T*>(to.data) + batch * to.batch_stride + slot * to.token_stride;
  for (int64_t head = threadIdx.x; head < heads; head += kAppendThreads) target[head * to.head_stride] = nan;
}

// T: an unsigned integer of the elements' size; nan: its bits in their type.
template <class T>
__global__ void __launch_bounds__(kAppendThreads) append_token(__grid_constant__ const AppendArgs args, T nan) {
  const int64_t b = blockIdx.x, used = args.lengths[2 * b + 1], seen = args.seen[b];
  const bool fits = used >= 0 && used < args.window_slots;
  if (fits) {
    copy_token<T>(args.k, args.window_k, b, args.kv_heads, args.head_dim, used);
    copy_token<T>(args.v, args.window_v, b, args.kv_heads, args.value_dim, used);
    if (args.query_slots > 0) {
      copy_token<T>(args.q, args.queries, b, args.query_heads, args.head_dim, seen % args.query_slots);
    }
  } else {
    poison<T>(args.window_k, b, args.kv_heads, args.window_slots - 1, nan);
  }
  __syncthreads();  // everybody has read how many there are
  if (threadIdx.x == 0) {
    if (fits) {
      args.positions[b * args.positions_batch_stride + used] = static_cast<int32_t>(seen);
      args.lengths[2 * b + 1] = static_cast<int32_t>(used + 1);
    }
    args.seen[b] = seen + 1;
  }
}

}  // namespace

cudaError_t append(const AppendArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.batch));
  if (args.k.dtype == Dtype::kFloat32) {
    return ptx::launch(&append_token<uint32_t>, grid, kAppendThreads, 0, stream, args, uint32_t{0x7FC00000});
  }
  const uint16_t nan = args.k.dtype == Dtype::kFloat16 ? 0x7E00 : 0x7FC0;
  return ptx::launch(&append_token<uint16_t>, grid, kAppendThreads, 0, stream, args, nan);
}

}  // namespace logquant::cuda
