// How much attention the window's slots get (logquant/ops/reference/attend.py): of every row the squares of the softmax
// of its scores over the window alone.
//
// That is known only once a row has seen the whole window, so the splits keep their scores: [row][window_stride] of a
// KV head, lanes are slots. The last task of the KV head adds them up, row after row: always the same order of
// additions.
#pragma once

#include "rows.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

// Of the rows of a task, or of all rows of a KV head; data == nullptr: nobody asks.
struct WindowScores {
  float* data;
  int64_t stride;

  WindowScores(const AttendPlan& plan, int64_t head, int first_row)
      : data(plan.window_scores == nullptr ? nullptr
                                           : plan.window_scores + (head * plan.rows + first_row) * plan.window_stride),
        stride(plan.window_stride) {}

  LOGQUANT_INLINE float* row(int64_t r) const { return data + r * stride; }
};

// Scores of `slots` slots (a multiple of kLanes) become the squares of their softmax.
LOGQUANT_INLINE void squared_softmax(float* scores, int64_t slots) {
  F32 top = splat(-kInfinity);
  for (int64_t t = 0; t < slots; t += kLanes) top = max(top, load(scores + t));
  const float most = reduce(top, Max{});
  const F32 maximum = splat(most == -kInfinity ? 0.0f : most);  // of a row that sees nothing
  F32 sum = splat(0.0f);
  for (int64_t t = 0; t < slots; t += kLanes) {
    const F32 x = load(scores + t), weight = select(x == splat(-kInfinity), splat(0.0f), exp2(x - maximum));
    sum += weight;
    store(scores + t, weight);
  }
  const float total = reduce(sum, Add{});
  const F32 inverse = splat(total == 0.0f ? 0.0f : 1.0f / total);
  for (int64_t t = 0; t < slots; t += kLanes) {
    const F32 weight = load(scores + t), share = weight * inverse;
    store(scores + t, select(weight == splat(0.0f), splat(0.0f), share * share));  // not seen: not even a NaN
  }
}

void add_attention(const AttendArgs& args, const AttendPlan& plan, int64_t head, int64_t used) {
  const WindowScores scores(plan, head, 0);
  float* const sums = scores.row(0);
  const int64_t padded = (used + kLanes - 1) / kLanes * kLanes;
  for (int64_t row = 0; row < plan.rows; ++row) {
    squared_softmax(scores.row(row), padded);
    for (int64_t t = 0; row > 0 && t < padded; t += kLanes) store(sums + t, load(sums + t) + load(scores.row(row) + t));
  }
  const float* const before = args.attention.of(head / args.kv_heads, head % args.kv_heads);
  float* const out = args.attention_out + head * args.window_tokens;
  for (int64_t t = 0; t < args.window_tokens; ++t) {
    out[t] = (t < args.attention_slots ? before[t] : 0.0f) + (t < used ? sums[t] : 0.0f);
  }
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
