// attend: the choice of kernel, the cut into splits, and the combination of their partial results.
//
// What the window's slots are given (reference/attend.py) is the square of a row's softmax over the window alone. The
// kernels that take the window keep its scores, and its own log-sum-exp follows from the sums of its splits; prefill,
// whose splits are of pages and window alike, has the window done again by them.

#include <algorithm>
#include <climits>

#include "attend.cuh"

namespace logquant::cuda {
namespace {

constexpr int kCombineThreads = 128;
constexpr int kSlotsPerThread = 2, kSlotsPerBlock = kSlotsPerThread * kCombineThreads;

// The log-sum-exp, in units of log2, of a row's scores of the window alone; any number where it sees nothing of it.
LOGQUANT_DEVICE float window_lse(const AttendArgs& a, int batch, int kv_head, int row) {
  float top = -INFINITY, total = 0.0f;
  const auto sums = [&](int split) {
    return a.partial_sums + 2 * partial_index(a, batch, kv_head, a.page_splits + split, row);
  };
  for (int s = 0; s < a.window_splits; ++s) top = fmaxf(top, sums(s)[0]);
  for (int s = 0; s < a.window_splits; ++s) total += sums(s)[1] * ptx::exp2(sums(s)[0] - top);
  return total == 0.0f ? 0.0f : top + log2f(total);
}

// What kSlotsPerBlock slots of the window have been given: rows are added in their order.
LOGQUANT_DEVICE void add_attention(const AttendArgs& a, int batch, int kv_head, int first_slot) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  float* const lse = reinterpret_cast<float*>(shared);  // of the rows at hand, one a thread
  const int self = threadIdx.x, rows = static_cast<int>(a.group * a.queries), used = used_window_tokens(a, batch);
  const int slot = first_slot + self;  // and those kCombineThreads further
  float sum[kSlotsPerThread] = {};
  for (int first = 0; first < rows; first += kCombineThreads) {
    if (first + self < rows) lse[self] = window_lse(a, batch, kv_head, first + self);
    __syncthreads();
    const float* scores = window_scores_of(a, blockIdx.y, rows, first) + slot;
    for (int r = 0; r < min(kCombineThreads, rows - first); ++r, scores += a.window_tokens) {
#pragma unroll
      for (int i = 0; i < kSlotsPerThread; ++i) {
        const float score = slot + i * kCombineThreads < used ? scores[i * kCombineThreads] : -INFINITY;
        const float share = score == -INFINITY ? 0.0f : ptx::exp2(score - lse[r]);
        sum[i] += share * share;
      }
    }
    __syncthreads();
  }
  const float* const before = a.attention.of(batch, kv_head);
  float* const out = a.attention_out + int64_t{blockIdx.y} * a.window_tokens;
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    const int n = slot + i * kCombineThreads;
    if (n < a.window_tokens) out[n] = sum[i] + (n < a.attention_slots ? before[n] : 0.0f);
  }
}

// One softmax out of the splits' parts. A block is one row of one KV head; its threads are channels. Splits are added
// in their order, so that the same input gives the same bits. Blocks after those of rows are slots of the window, if
// anybody asks what they are given. Memory: 4 Dv + 8 bytes a split; 4 bytes a row and slot. Budget: 48
// registers.
template <class T>
__global__ void __launch_bounds__(kCombineThreads, 10)
    attend_combine(__grid_constant__ const AttendArgs a, int first_block) {
  const int heads = static_cast<int>(a.kv_heads), batch = blockIdx.y / heads, kv_head = blockIdx.y % heads;
  const int index = first_block + blockIdx.x, rows = static_cast<int>(a.group * a.queries);
  if (index >= rows) {
    add_attention(a, batch, kv_head, (index - rows) * kSlotsPerBlock);
    return;
  }
  const int splits = a.page_splits + a.window_splits, dim = a.format.value_dim;
  const Row row = row_of(a, batch, kv_head, index);
  const auto at = [&](int split) { return partial_index(a, batch, kv_head, split, index); };

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

int64_t partial_floats(const AttendArgs& a) { return partials(a) * (a.format.value_dim + 2); }
int64_t attention_blocks(const AttendArgs& a) {
  return a.attention_out == nullptr ? 0 : ceil_div(a.window_tokens, kSlotsPerBlock);
}
int64_t kept_scores(const AttendArgs& a) {
  return a.attention_out == nullptr ? 0 : a.batch * a.kv_heads * row_count(a) * a.window_tokens;
}

void use_partials(AttendArgs& args, float* memory) {
  args.partial_out = memory;
  args.partial_sums = memory + partials(args) * args.format.value_dim;
}

// For the kernels of few rows: they know what the window's slots are given, and prefill does not.
AttendArgs window_alone(AttendArgs args) {
  args.page_splits = 0;
  args.window_splits = 1;
  use_partials(args, args.partial_out);
  return args;
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
    const int64_t floats = args.page_splits == 1 ? 0 : partial_floats(args);
    // The window's parts come first, and are no longer needed when those of prefill are written.
    return kept_scores(args) +
           (args.attention_out == nullptr ? floats : std::max(floats, partial_floats(window_alone(args))));
  }
  // Three blocks fit on a multiprocessor. At batch 1 there are few heads, and many splits fill the GPU; at batch 128
  // one split a head does. A split has at least two pages for each of its four warps, or 64 tokens of the window.
  const int64_t wanted = ceil_div(3 * int64_t{multiprocessors}, heads * ceil_div(row_count(args), 8));
  args.page_splits = args.page_count == 0 ? 0 : static_cast<int>(clamp(wanted, 1, ceil_div(args.page_count, 8)));
  args.window_splits =
      args.window_tokens == 0 ? 0 : static_cast<int>(clamp(wanted, 1, ceil_div(args.window_tokens, 64)));
  return kept_scores(args) + partial_floats(args);
}

void use_workspace(AttendArgs& args, float* workspace) {
  if (args.attention_out != nullptr) args.window_scores = workspace;
  use_partials(args, workspace + kept_scores(args));
}

namespace {

cudaError_t attend_few_rows(const AttendArgs& args, cudaStream_t stream) {
  if (args.page_splits + args.window_splits == 0) return cudaSuccess;
  const TensorKernel* const kernel = find_tensor_kernel(args);
  return kernel ? kernel->launch(args, stream) : attend_general(args, stream);
}

cudaError_t combine(const AttendArgs& args, int64_t first_block, int64_t blocks, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  return with_element(args.q.dtype, [&](auto element) {
    return ptx::launch(&attend_combine<decltype(element)>, dim3(blocks, args.batch * args.kv_heads), kCombineThreads,
                       kCombineThreads * sizeof(float), stream, args, static_cast<int>(first_block));
  });
}

cudaError_t attend_many_rows(const AttendArgs& args, cudaStream_t stream) {
  if (attention_blocks(args) > 0) {
    const AttendArgs window = window_alone(args);
    if (const cudaError_t error = attend_few_rows(window, stream); error != cudaSuccess) return error;
    const cudaError_t error = combine(window, row_count(args), attention_blocks(args), stream);
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error = attend_prefill(args, stream);
  if (error != cudaSuccess || args.page_splits == 1) return error;
  return combine(args, 0, row_count(args), stream);
}

}  // namespace

cudaError_t attend(const AttendArgs& args, cudaStream_t stream) {
  if (is_prefill(args)) return attend_many_rows(args, stream);
  const cudaError_t error = attend_few_rows(args, stream);
  return error != cudaSuccess ? error : combine(args, 0, row_count(args) + attention_blocks(args), stream);
}

}  // namespace logquant::cuda
