// What the attention kernels share: query rows, which slots a query sees, and partial results.
//
// A query *row* of a KV head is one of its group * queries query vectors; kernels work on tiles of rows. Scores are
// kept in units of log2: weights are 2^(score - reference).
#pragma once

#include "elements.cuh"

namespace logquant::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kHidden = -1e30f;  // an additive mask at or below hides a slot (reference/attend.py)

// The lowest reference exponent: finite, so that a row that sees nothing does not compute inf - inf.
inline constexpr float kLowest = -1e37f;

// Pairs of 16-bit elements, as tensor cores take them.
template <class T>
struct Operand;
template <>
struct Operand<__half> {
  static constexpr uint32_t kOnes = 0x3C003C00u, kExponent = 0x7C00u;
  static LOGQUANT_DEVICE uint32_t pack(float a, float b) { return ptx::pack_f16(a, b); }
  static LOGQUANT_DEVICE float low(uint32_t w) { return half_to_float(static_cast<uint16_t>(w)); }
  static LOGQUANT_DEVICE float high(uint32_t w) { return half_to_float(static_cast<uint16_t>(w >> 16)); }
};
template <>
struct Operand<__nv_bfloat16> {
  static constexpr uint32_t kOnes = 0x3F803F80u, kExponent = 0x7F80u;
  static LOGQUANT_DEVICE uint32_t pack(float a, float b) { return ptx::pack_bf16(a, b); }
  static LOGQUANT_DEVICE float low(uint32_t w) { return __uint_as_float(w << 16); }
  static LOGQUANT_DEVICE float high(uint32_t w) { return __uint_as_float(w & 0xFFFF0000u); }
};

// 0xFFFF in each half of a word that is an infinity or a NaN.
template <class T>
LOGQUANT_DEVICE uint32_t not_finite(uint32_t word) {
  constexpr uint32_t kLow = Operand<T>::kExponent, kHigh = kLow << 16;
  return ((word & kLow) == kLow ? 0xFFFFu : 0u) | ((word & kHigh) == kHigh ? 0xFFFF0000u : 0u);
}

// Operand of two 16-bit elements: 1 for each score that a row sees, else 0.
template <class T>
LOGQUANT_DEVICE uint32_t seen_operand(float low_score, float high_score) {
  return Operand<T>::pack(low_score == -INFINITY ? 0.0f : 1.0f, high_score == -INFINITY ? 0.0f : 1.0f);
}

struct Row {
  int batch, head, query;  // head: of the queries
};

LOGQUANT_DEVICE Row row_of(const AttendArgs& a, int batch, int kv_head, int row) {
  const int group = static_cast<int>(a.group);
  return {batch, kv_head * group + row % group, row / group};
}
LOGQUANT_DEVICE int64_t query_offset(const AttendArgs& a, const Row& r) {
  return r.batch * a.q.batch_stride + r.head * a.q.head_stride + r.query * a.q.token_stride;
}
inline int64_t row_count(const AttendArgs& a) { return a.group * a.queries; }

// Pages and window tokens of a batch row that are in use.
LOGQUANT_DEVICE int in_use(const AttendArgs& a, int64_t batch, int64_t all, int part) {
  if (a.lengths == nullptr) return static_cast<int>(all);
  const int64_t length = a.lengths[batch * a.lengths_batch_stride + part];
  return static_cast<int>(max(int64_t{0}, min(length, all)));
}
LOGQUANT_DEVICE int used_pages(const AttendArgs& a, int64_t batch) { return in_use(a, batch, a.page_count, 0); }
LOGQUANT_DEVICE int used_window_tokens(const AttendArgs& a, int64_t batch) {
  return in_use(a, batch, a.window_tokens, 1);
}

LOGQUANT_DEVICE const uint32_t* page_at(const AttendArgs& a, int64_t batch, int64_t kv_head, int64_t page) {
  int64_t block = page, base = batch * a.pages.batch_stride;
  if (a.page_table != nullptr) {
    block = a.page_table[batch * a.page_table_batch_stride + page];
    block = max(int64_t{0}, min(block, a.page_blocks - 1));
    base = 0;
  }
  return reinterpret_cast<const uint32_t*>(a.pages.data) + base + kv_head * a.pages.head_stride +
         block * a.pages.page_stride;
}

// The score (log2) of a slot for a row: softcap, additive mask, and -inf where the row does not see the slot.
LOGQUANT_DEVICE float seen_score(const AttendArgs& a, const Row& r, int slot, float score) {
  using Kind = AttendArgs::MaskKind;
  if (a.softcap != 0.0f) score = a.softcap * kLog2e * tanhf(score / (a.softcap * kLog2e));
  const int position = a.positions != nullptr ? a.positions[r.batch * a.positions_batch_stride + slot] : slot;
  bool seen = position >= 0;
  if (a.query_positions != nullptr) {
    seen = seen && position <= a.query_positions[r.batch * a.query_positions_batch_stride + r.query];
  }
  if (a.mask_kind != Kind::kNone) {
    seen = seen && position < a.mask_positions;
    if (seen) {
      const int64_t at = r.batch * a.mask_batch_stride + r.head * a.mask_head_stride + r.query * a.mask_query_stride +
                         position * a.mask_position_stride;
      if (a.mask_kind == Kind::kBool) {
        seen = static_cast<const uint8_t*>(a.mask)[at] != 0;
      } else {
        const float bias = a.mask_kind == Kind::kFloat32 ? static_cast<const float*>(a.mask)[at]
                           : a.mask_kind == Kind::kFloat16
                               ? Element<__half>::wide(static_cast<const __half*>(a.mask)[at])
                               : Element<__nv_bfloat16>::wide(static_cast<const __nv_bfloat16*>(a.mask)[at]);
        seen = !(bias <= kHidden);
        score += bias * kLog2e;
      }
    }
  }
  return seen ? score : -INFINITY;
}

// Where split `split` of this KV head leaves its part of row `row`.
LOGQUANT_DEVICE int64_t partial_index(const AttendArgs& a, int64_t batch, int64_t kv_head, int64_t split, int64_t row) {
  return ((batch * a.kv_heads + kv_head) * (a.page_splits + a.window_splits) + split) * (a.group * a.queries) + row;
}
LOGQUANT_DEVICE void write_partial_sums(const AttendArgs& a, int64_t partial, float reference, float sum) {
  a.partial_sums[2 * partial] = reference;
  a.partial_sums[2 * partial + 1] = sum;
}

// Where a row's scores of the window are kept for what its slots are given (attend.cu). head: batch * KV heads + KV
// head, which blocks have as blockIdx.y.
LOGQUANT_DEVICE float* window_scores_of(const AttendArgs& a, int head, int rows, int row) {
  return a.window_scores + (int64_t{head} * rows + row) * static_cast<int>(a.window_tokens);
}

// What a block works on, where the grid is (splits, batch * KV heads, tiles of `rows` query rows).
struct BlockRows {
  LOGQUANT_DEVICE BlockRows(const AttendArgs& a, int rows)
      : batch(blockIdx.y / static_cast<int>(a.kv_heads)),
        kv_head(blockIdx.y % static_cast<int>(a.kv_heads)),
        first_row(blockIdx.z * rows),
        row_total(static_cast<int>(a.group * a.queries)) {}

  LOGQUANT_DEVICE Row row(const AttendArgs& a, int row) const { return row_of(a, batch, kv_head, row); }
  LOGQUANT_DEVICE const uint32_t* page(const AttendArgs& a, int page) const { return page_at(a, batch, kv_head, page); }
  LOGQUANT_DEVICE int64_t partial_index(const AttendArgs& a, int split, int row) const {
    return cuda::partial_index(a, batch, kv_head, split, row);
  }
  LOGQUANT_DEVICE float* window_scores(const AttendArgs& a, int row) const {
    return window_scores_of(a, blockIdx.y, row_total, row);
  }
  LOGQUANT_DEVICE const int16_t* key_map(const AttendArgs& a) const {
    return a.key_map.data + batch * a.key_map.batch_stride + kv_head * a.key_map.head_stride;
  }

  const int batch, kv_head;
  const int first_row, row_total;
};

// The tokens of the block's KV head.
template <class T>
LOGQUANT_DEVICE const T* head_of(const BlockRows& block, const Tokens& x) {
  return static_cast<const T*>(x.data) + block.batch * x.batch_stride + block.kv_head * x.head_stride;
}

// For many query rows (attend_prefill.cu): whether it can, how many rows a block takes, and tiles of slots there are.
// Its splits are page_splits, over pages and window alike; with one, it writes the result itself.
bool prefill_handles(const AttendArgs& args);
int prefill_rows(const AttendArgs& args);
int64_t prefill_tiles(const AttendArgs& args);
cudaError_t attend_prefill(const AttendArgs& args, cudaStream_t stream);

cudaError_t attend_general(const AttendArgs& args, cudaStream_t stream);

// Decoding, compiled for one format and dtype (tensor/launch.cuh).
struct TensorKernel {
  PageFormat format;
  Dtype dtype;
  cudaError_t (*launch)(const AttendArgs& args, cudaStream_t stream);
};
const TensorKernel* find_tensor_kernel(const AttendArgs& args);

}  // namespace logquant::cuda
