// The arguments of the kernels, on every device: plain pointers and sizes, no torch. Pointers lie in the memory of the
// device whose kernel is called. arguments.cpp has checked shapes, dtypes and strides; what tensors hold (an index, a
// map, a page table) only where the CPU can read it, so that kernels of other devices stay within the bounds given
// here.
#pragma once

#include <cstdint>

#include "format.h"

namespace logquant {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// A tensor [batch, head, token, channel]: strides in elements, channels contiguous. A broadcast dimension has stride 0.
struct Tokens {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
};
struct MutableTokens {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
};

// Pages [batch, head, page, words]: strides in words, words contiguous.
struct Pages {
  const int32_t* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, page_stride = 0;
};
struct MutablePages {
  int32_t* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, page_stride = 0;
};

// Something that each head may have of its own, or share, by strides of 0; data == nullptr is a default.
template <class T>
struct PerHead {
  const T* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0;

  // A head's own, from element `first` on.
  LOGQUANT_HOST_DEVICE constexpr const T* of(int64_t batch, int64_t head, int64_t first = 0) const {
    return data == nullptr ? nullptr : data + batch * batch_stride + head * head_stride + first;
  }
};

// The column map [C] of a head (format.h); by default the identity.
using KeyMap = PerHead<int16_t>;
// How much an error of each token's key counts where parameters are searched (logquant/ops/reference/quantize.py):
// [token taken]; by default 1.
using KeyWeights = PerHead<float>;
// How much of a token's error each later token of its page takes off (logquant/ops/reference/quantize.py):
// [token taken, page_tokens]; by default nothing.
using ValueFeedback = PerHead<float>;

struct QuantizeArgs {
  PageFormat format;
  Tokens k, v;
  MutablePages pages;
  KeyMap key_map;
  KeyWeights key_weights;
  ValueFeedback value_feedback;
  // The token that page p, slot t takes: index[p * page_tokens + t] of its batch row; without an index, that number
  // itself times index_step plus index_start.
  const int32_t* index = nullptr;
  int64_t index_batch_stride = 0;
  int64_t index_start = 0, index_step = 1;
  int64_t batch = 0, heads = 0, page_count = 0;
  int64_t tokens = 0;  // of k and v: what an index must stay below
};

struct DequantizeArgs {
  PageFormat format;
  Pages pages;
  KeyMap key_map;
  MutableTokens k, v;
  int64_t batch = 0, heads = 0, page_count = 0;
};

// One step of the rule: slots start, start + step, ... (count of them) of the window become pages, the rest moves up.
struct EvictArgs {
  PageFormat format;
  MutableTokens k, v;
  MutablePages pages;  // already at the first page to write
  KeyMap key_map;
  KeyWeights key_weights;
  ValueFeedback value_feedback;
  int64_t batch = 0, heads = 0;
  int64_t tokens = 0, start = 0, step = 1, count = 0;
};

// One new token of every row goes to the end of its window (logquant/ops/reference/decode_step.py).
struct AppendArgs {
  Tokens q, k, v;  // of one token; all of one dtype
  MutableTokens window_k, window_v,
      queries;  // of the same dtype; the newest queries [batch, query head, slot, channel]
  int64_t batch = 0, kv_heads = 0, query_heads = 0, head_dim = 0, value_dim = 0;
  int64_t window_slots = 0, query_slots = 0;
  int32_t* positions = nullptr;  // [batch, slots]: already at the window's first
  int64_t positions_batch_stride = 0;
  int32_t* lengths = nullptr;  // [batch, 2], contiguous: pages and window tokens in use
  int64_t* seen = nullptr;     // [batch]: positions before this one
};

struct PageScoresArgs {
  PageFormat format;
  int64_t batch = 0, kv_heads = 0, group = 1, queries = 0;  // group: query heads of a KV head
  Tokens q;                                                 // head_stride of a query head, token_stride of a query
  Pages pages;
  int64_t page_count = 0;
  KeyMap key_map;
  float scale = 1.0f;
  // Mean keys [batch, KV head, page, channel], channels contiguous, and what they are in units of, [batch, KV head,
  // page], contiguous; nullptr: bounds of the pages' keys are asked for.
  const int8_t* means = nullptr;
  int64_t means_batch_stride = 0, means_head_stride = 0, means_page_stride = 0;
  PerHead<float> mean_scales;
  float* scores = nullptr;  // [batch, query head, query, page], contiguous
};

struct AttendArgs {
  PageFormat format;
  int64_t batch = 0, kv_heads = 0, group = 1, queries = 0;  // group: query heads of a KV head
  Tokens q;                                                 // head_stride of a query head, token_stride of a query
  Pages pages;                                              // with a page table, page_stride is that of a block
  int64_t page_count = 0;
  Tokens window_k, window_v;
  int64_t window_tokens = 0;
  KeyMap key_map;
  float scale = 1.0f, softcap = 0.0f;

  const int32_t* page_table = nullptr;  // [batch, page_count]
  int64_t page_table_batch_stride = 0;
  const int32_t* lengths = nullptr;  // [batch, 2]: pages and window tokens in use
  int64_t lengths_batch_stride = 0;
  const int32_t* positions = nullptr;  // [batch, page_count * page_tokens + window_tokens]
  int64_t positions_batch_stride = 0;
  const int32_t* query_positions = nullptr;  // [batch, queries]
  int64_t query_positions_batch_stride = 0;

  enum class MaskKind { kNone, kBool, kFloat32, kFloat16, kBFloat16 };
  MaskKind mask_kind = MaskKind::kNone;  // [batch, query head, query, position]; positions outside are not seen
  const void* mask = nullptr;
  int64_t mask_batch_stride = 0, mask_head_stride = 0, mask_query_stride = 0, mask_position_stride = 0;
  int64_t mask_positions = 0;

  const float* sinks = nullptr;  // [query head]

  void* out = nullptr;   // [batch, query head, query, value_dim], contiguous, dtype of q
  float* lse = nullptr;  // [batch, query head, query], contiguous

  // What window slots have been given (reference/attend.py): before, [batch, KV head, attention_slots] with contiguous
  // slots, and now, [batch, KV head, window_tokens], contiguous; nullptr where nobody asks.
  PerHead<float> attention;
  int64_t attention_slots = 0;
  float* attention_out = nullptr;

  int64_t page_blocks = 0;  // with a page table: what its entries must stay below

  // Whether anything may hide a slot from a row.
  bool has_bias() const { return mask_kind != MaskKind::kNone || query_positions != nullptr || positions != nullptr; }
};

}  // namespace logquant
