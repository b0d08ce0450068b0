// The query rows of a task, and the sizes that every part of attention (attend.cpp) shares.
//
// Row r of a KV head is query r % queries of query head r / queries of its group. A task has up to kMaxRows rows,
// padded to NR = 1, 2, 3, 4 or 8, which is a constant of what is compiled; padding rows hold zeros and are never
// written out.
#pragma once

#include "../simd.h"
#include "../tasks.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

constexpr int kMaxRows = AttendPlan::kRowsPerBlock;
constexpr int kUnitTokens = 128;  // slots that are worked on at once, at most: a page, or a block of the window
// Vectors of accumulators that fit in the registers, beside the operands.
constexpr int kAccumulators = kLanes == 16 ? 16 : 8;

LOGQUANT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LOGQUANT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Pages and window tokens of a batch row that are in use.
LOGQUANT_INLINE int64_t used_pages(const AttendArgs& args, int64_t batch) {
  return args.lengths == nullptr ? args.page_count : args.lengths[batch * args.lengths_batch_stride];
}
LOGQUANT_INLINE int64_t used_window_tokens(const AttendArgs& args, int64_t batch) {
  return args.lengths == nullptr ? args.window_tokens : args.lengths[batch * args.lengths_batch_stride + 1];
}

struct TaskRows {
  int64_t batch, kv_head;
  int first_row, rows;

  LOGQUANT_INLINE int64_t query_head(const AttendArgs& args, int r) const {
    return kv_head * args.group + (first_row + r) / args.queries;
  }
  LOGQUANT_INLINE int64_t query(const AttendArgs& args, int r) const { return (first_row + r) % args.queries; }
};

// How many of `count` vectors reduce_lanes takes at a time: a power of two, of which the last may be padding.
constexpr int reduced_at_once(int count) {
  int n = 1;
  while (n < count && n < kLanes) n *= 2;
  return n;
}

// Calls f(first row, vector of the rows' results), kLanes rows at most at a time; lanes past NR are unspecified.
template <int NR, class Op, class F>
LOGQUANT_INLINE void reduce_rows(const F32 (&v)[NR], Op op, F&& f) {
  constexpr int kStep = reduced_at_once(NR);
  if constexpr (NR % kStep == 0) {
    for (int r = 0; r < NR; r += kStep) f(r, reduce_lanes<kStep>(v + r, op));
  } else {
    static_assert(NR == 3);
    const F32 padded[4] = {v[0], v[1], v[2], v[2]};
    for (int r = 0; r < NR; r += kStep) f(r, reduce_lanes<kStep>(padded + r, op));
  }
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
