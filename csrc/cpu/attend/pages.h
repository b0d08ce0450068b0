// Attention over packed pages, one after the other: scores of its keys, softmax, sums of its values. tiled_pages.h does
// the same with matrix tiles.
//
// Each page is read once for all rows; while one is worked on, the next is fetched into the first-level cache.
#pragma once

#include "keys.h"
#include "masks.h"
#include "queries.h"
#include "rows.h"
#include "softmax.h"
#include "values.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

// Formats with these sizes, which are those of head dims 64, 128, ... at 2 bits, get code of their own.
struct SpecializedSizes {
  static constexpr int page_tokens = 64, value_group = 64, key_bits = 2, value_bits = 2;

  static bool are_of(const PageFormat& f) {
    return f.page_tokens == page_tokens && f.value_group == value_group && f.key_bits == key_bits &&
           f.value_bits == value_bits;
  }
};

// The format, with sizes that are constants where they are the specialized ones.
template <bool specialized>
LOGQUANT_INLINE PageFormat with_known_sizes(PageFormat f) {
  if (specialized) {
    f.page_tokens = SpecializedSizes::page_tokens;
    f.value_group = SpecializedSizes::value_group;
    f.key_bits = SpecializedSizes::key_bits;
    f.value_bits = SpecializedSizes::value_bits;
  }
  return f;
}

// The pages of one KV head, in the order of its page table, if it has one.
class HeadPages {
 public:
  LOGQUANT_INLINE HeadPages(const AttendArgs& args, const TaskRows& rows)
      : pages_(args.pages.data + rows.batch * args.pages.batch_stride + rows.kv_head * args.pages.head_stride),
        table_(args.page_table == nullptr ? nullptr : args.page_table + rows.batch * args.page_table_batch_stride),
        stride_(args.pages.page_stride) {}

  LOGQUANT_INLINE const int32_t* at(int64_t p) const { return pages_ + (table_ == nullptr ? p : table_[p]) * stride_; }

 private:
  const int32_t* pages_;
  const int32_t* table_;
  int64_t stride_;
};

template <int NR>
LOGQUANT_INLINE float max_query_code(const PageFormat& f) {
  float max = 0.0f;
  with_bits(f.key_bits,
            [&](auto bits) __attribute__((always_inline)) { max = max_int16_code<NR, bits>(f.key_columns); });
  return max;
}

LOGQUANT_INLINE int page_code_words(const PageFormat& f) {
  return f.page_tokens * f.key_code_words() + f.value_dim * f.value_code_rows();
}

// Adds pages first .. end - 1; up to page_count there are others, which come next. Nothing here has its address taken
// by a call: then no store can change it, and the compiler keeps it in registers. key_words: scratch.
template <int NR, bool specialized>
__attribute__((noinline)) void add_pages(const AttendArgs& args, TaskRows rows, int64_t first, int64_t end,
                                         int64_t page_count, Queries queries, int32_t* key_words, Scores scores,
                                         FoldedWeights folded, Accumulator acc) {
  const PageFormat f = with_known_sizes<specialized>(args.format);
  const bool has_map = args.key_map.data != nullptr, has_bias = args.has_bias();
  const float max_code = max_query_code<NR>(f);
  const HeadPages pages(args, rows);
  const int steps = page_code_words(f) / (kDotVectors<NR> * kLanes) + 1;
  const int lines = (4 * f.words() / kCacheLine + steps - 1) / steps;
  for (int64_t p = first; p < end; ++p) {
    const int32_t* const page = pages.at(p);
    Prefetcher next_page;
    if (p + 1 < page_count) next_page = {pages.at(p + 1), f.words()};  // of the next split, too: the same thread mostly
    load_key_words(f, page, key_words);
    with_bits(f.key_bits, [&](auto bits) __attribute__((always_inline)) {
      fold_queries<NR, bits>(f, page, has_map, max_code, queries);
      key_scores<NR, bits>(f, key_words, queries, scores.weights, next_page, lines);
    });
    const bool biased = has_bias && load_bias(args, rows, p * f.page_tokens, f.page_tokens, scores.bias);
    softmax<NR>(args, f.page_tokens, biased, scores, acc);
    with_bits(f.value_bits, [&](auto bits) __attribute__((always_inline)) {
      fold_weights<NR, bits>(f, page, biased, scores.weights, folded, acc);
      add_values<NR, bits>(f, page, folded, acc, next_page, lines);
    });
  }
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
