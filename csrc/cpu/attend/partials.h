// What a split leaves behind, and how the splits of a KV head become one softmax.
//
// A partial result is value_dim sums, their maximum and their denominator, for each row: written once by its task, read
// once by the merge. The merge of a KV head is one task; lanes are channels.
#pragma once

#include "rows.h"
#include "softmax.h"
#include "values.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

LOGQUANT_INLINE float* partial(const AttendArgs& args, const AttendPlan& plan, int64_t head, int64_t split,
                               int64_t row) {
  return plan.partials + ((head * plan.splits + split) * plan.rows + row) * plan.partial_size(args);
}

void store_partials(const AttendArgs& args, const AttendPlan& plan, const TaskRows& rows, int64_t head, int64_t split,
                    const Accumulator& acc) {
  const int dim = args.format.value_dim;
  for (int r = 0; r < rows.rows; ++r) {
    float* const out = partial(args, plan, head, split, rows.first_row + r);
    add_zeros(args.format, r, acc);
    __builtin_memcpy(out, acc.sums + r * dim, sizeof(float) * dim);
    out[dim] = acc.maximum[r];
    out[dim + 1] = reduce(load(acc.denominators + r * kLanes), Add{});
  }
}

void merge_partials(const AttendArgs& args, const AttendPlan& plan, int64_t head) {
  const int dim = args.format.value_dim;
  const int64_t batch = head / args.kv_heads, kv_head = head % args.kv_heads;
  for (int64_t row = 0; row < plan.rows; ++row) {
    const int64_t query_head = kv_head * args.group + row / args.queries;
    const auto part_of = [&](int64_t split) { return partial(args, plan, head, split, row); };
    float maximum = kMaximumOfNothing;
    for (int64_t s = 0; s < plan.splits; ++s) maximum = part_of(s)[dim] > maximum ? part_of(s)[dim] : maximum;
    float denominator = 0.0f;
    if (args.sinks != nullptr) {
      const float sink = args.sinks[query_head] * kLog2e;
      maximum = sink > maximum ? sink : maximum;
      if (sink > kMaximumOfNothing) denominator = exp2(splat(sink - maximum))[0];
    }
    float* const sums = part_of(0);
    for (int64_t s = 0; s < plan.splits; ++s) {
      const float* const part = part_of(s);
      const float factor = exp2(splat(part[dim] - maximum))[0];
      denominator += part[dim + 1] * factor;
      for (int c = 0; c < dim; c += kLanes) {
        const F32 scaled = load(part + c) * splat(factor);
        store(sums + c, s == 0 ? scaled : load(sums + c) + scaled);
      }
    }
    const bool nothing = denominator == 0.0f;
    const F32 inverse = splat(nothing ? 0.0f : 1.0f / denominator);
    const int64_t out_row = (batch * args.kv_heads * args.group + query_head) * args.queries + row % args.queries;
    args.lse[out_row] = nothing ? -kInfinity : (maximum + __builtin_log2f(denominator)) * kLn2;
    with_dtype(args.q.dtype, [&](auto type) {
      for (int c = 0; c < dim; c += kLanes) store_elements<type>(args.out, out_row * dim + c, load(sums + c) * inverse);
    });
  }
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
