// attend: the choice of kernel, the cut into splits, and the combination of their partial results.

#include <climits>

#include "attend.cuh"

namespace logquant::cuda {
namespace {

constexpr int kCombineThreads = 128;

// One softmax out of the splits' parts. A block is one row of one KV head; its threads are channels. Splits are added
// in their order, so that the same input gives the same bits. Memory: 4 Dv + 8 bytes a split. Budget: 48 registers.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) attend_combine(__grid_constant__ const AttendArgs a) {
  const int heads = static_cast<int>(a.kv_heads), batch = blockIdx.y / heads, kv_head = blockIdx.y % heads;
  const int splits = a.page_splits + a.window_splits, dim = a.format.value_dim;
  const Row row = row_of(a, batch, kv_head, blockIdx.x);
  const auto at = [&](int split) { return partial_index(a, batch, kv_head, split, blockIdx.x); };

  const float sink = a.sinks != nullptr ? a.sinks[row.head] * kLog2e : -INFINITY;
  float top = sink;
  for (int s = 0; s < splits; ++s) top = fmaxf(top, a.partial_sums[2 * at(s)]);
  const float reference = top == -INFINITY ? 0.0f : top;
  float total = ptx::exp2(sink - reference);
  for (int s = 0; s < splits; ++s) {
    total += a.partial_sums[2 * at(s) + 1] * ptx::exp2(a.partial_sums[2 * at(s)] - reference);
  }
  const int64_t out_row = (int64_t{batch} * a.kv_heads * a.group + row.head) * a.queries + row.query;
  T* const out = static_cast<T*>(a.out) + out_row * dim;
  for (int c = threadIdx.x; c < dim; c += kCombineThreads) {
    float sum = 0.0f;
    for (int s = 0; s < splits; ++s) {
      sum += a.partial_out[at(s) * dim + c] * ptx::exp2(a.partial_sums[2 * at(s)] - reference);
    }
    out[c] = Element<T>::narrow(total == 0.0f ? 0.0f : sum / total);
  }
  if (threadIdx.x == 0) a.lse[out_row] = total == 0.0f ? -INFINITY : (top + log2f(total)) / kLog2e;
}

int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
int64_t partials(const AttendArgs& a) {
  return a.batch * a.kv_heads * row_count(a) * (a.page_splits + a.window_splits);
}

// Up to 16 rows share each page that is read; the tensor-core kernels of a format read it again for the next 16.
bool is_prefill(const AttendArgs& a) {
  return prefill_handles(a) && row_count(a) > (find_tensor_kernel(a) != nullptr ? 64 : 8);
}

}  // namespace

const char* attend_path(const AttendArgs& args) {
  if (is_prefill(args)) return "prefill";
  return find_tensor_kernel(args) ? "tensor" : "general";
}

int64_t plan(AttendArgs& args, int multiprocessors) {
  args.plain = args.softcap == 0.0f && args.positions == nullptr && args.query_positions == nullptr &&
               args.mask_kind == AttendArgs::MaskKind::kNone;
  const int64_t heads = args.batch * args.kv_heads;
  if (is_prefill(args)) {
    // Many blocks of rows fill the GPU; where there are few, each of two blocks an SM has four tiles or more.
    const int64_t wanted =
        ceil_div(2 * int64_t{multiprocessors}, heads * ceil_div(row_count(args), prefill_rows(args)));
    args.page_splits = static_cast<int>(clamp(wanted, 1, clamp(prefill_tiles(args) / 4, 1, INT_MAX)));
    args.window_splits = 0;
    return args.page_splits == 1 ? 0 : partials(args) * (args.format.value_dim + 2);
  }
  // Three blocks fit on a multiprocessor. At batch 1 there are few heads, and many splits fill the GPU; at batch 128
  // one split a head does. A split has at least two pages for each of its four warps, or 64 tokens of the window.
  const int64_t wanted = ceil_div(3 * int64_t{multiprocessors}, heads * ceil_div(row_count(args), 8));
  args.page_splits = args.page_count == 0 ? 0 : static_cast<int>(clamp(wanted, 1, ceil_div(args.page_count, 8)));
  args.window_splits =
      args.window_tokens == 0 ? 0 : static_cast<int>(clamp(wanted, 1, ceil_div(args.window_tokens, 64)));
  return partials(args) * (args.format.value_dim + 2);
}

void use_workspace(AttendArgs& args, float* workspace) {
  args.partial_out = workspace;
  args.partial_sums = workspace + partials(args) * args.format.value_dim;
}

cudaError_t attend(const AttendArgs& args, cudaStream_t stream) {
  if (is_prefill(args)) {
    const cudaError_t error = attend_prefill(args, stream);
    if (error != cudaSuccess || args.page_splits == 1) return error;
  } else if (args.page_splits + args.window_splits > 0) {
    const TensorKernel* const kernel = find_tensor_kernel(args);
    const cudaError_t error = kernel ? kernel->launch(args, stream) : attend_general(args, stream);
    if (error != cudaSuccess) return error;
  }
  return with_element(args.q.dtype, [&](auto element) {
    return ptx::launch(&attend_combine<decltype(element)>, dim3(row_count(args), args.batch * args.kv_heads),
                       kCombineThreads, 0, stream, args);
  });
}

}  // namespace logquant::cuda
