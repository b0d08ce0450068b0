// Online softmax: scores of a unit's slots become weights relative to a running maximum, in place; when that rises,
// what has been summed is scaled down.
//
// In base 2, lanes are slots, row by row. Everything lies in scratch memory.
#pragma once

#include "rows.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

constexpr float kMaximumOfNothing = -1e31f;  // before the first token
constexpr float kMaximumSlack = 8.0f;        // the maximum is raised only when weights would pass 2^8: rarely

// Of a unit's slots.
struct Scores {
  float* weights;  // [NR][kUnitTokens]: scores, then softmax weights
  float* bias;     // [NR][kUnitTokens]: of masks (masks.h)

  Scores(int padded_rows, Arena& arena) {
    weights = arena.take<float>(padded_rows * kUnitTokens);
    bias = arena.take<float>(padded_rows * kUnitTokens);
  }

  void clear(int padded_rows) const {
    for (int i = 0; i < padded_rows * kUnitTokens; i += kLanes) store(bias + i, splat(0.0f));
  }
};

// What a task has summed so far.
struct Accumulator {
  float* maximum;       // [NR]: of scores, or a little less
  float* denominators;  // [NR][kLanes]
  float* sums;          // [NR][Dv]
  float* zero_sums;     // [NR][groups][kLanes]: what value zeros add to every channel of a group

  Accumulator(const PageFormat& f, int padded_rows, Arena& arena) {
    maximum = arena.take<float>(padded_rows);
    denominators = arena.take<float>(padded_rows * kLanes);
    sums = arena.take<float>(padded_rows * f.value_dim);
    zero_sums = arena.take<float>(padded_rows * f.value_groups() * kLanes);
  }

  void clear(const PageFormat& f, int padded_rows) const {
    for (int r = 0; r < padded_rows; ++r) maximum[r] = kMaximumOfNothing;
    for (int i = 0; i < padded_rows * kLanes; i += kLanes) store(denominators + i, splat(0.0f));
    for (int i = 0; i < padded_rows * f.value_dim; i += kLanes) store(sums + i, splat(0.0f));
    for (int i = 0; i < padded_rows * f.value_groups() * kLanes; i += kLanes) store(zero_sums + i, splat(0.0f));
  }
};

// 2 * log2(e) * x and no cancellation for large x: tanh(x) = 1 - 2 / (exp(2x) + 1).
LOGQUANT_INLINE F32 tanh(F32 x) {
  const F32 bounded = max(splat(-15.0f), min(splat(15.0f), x));
  const F32 clamped = select(is_nonfinite(x), x, bounded);
  return 1.0f - 2.0f / (exp2(clamped * (2.0f * kLog2e)) + 1.0f);
}

__attribute__((noinline)) void raise_maximum(PageFormat f, int r, float maximum, Accumulator acc) {
  const float old = acc.maximum[r];
  const F32 factor = old == kMaximumOfNothing ? splat(0.0f) : exp2(splat(old - maximum));
  for (int c = 0; c < f.value_dim; c += kLanes) {
    store(acc.sums + r * f.value_dim + c, load(acc.sums + r * f.value_dim + c) * factor);
  }
  for (int g = 0; g < f.value_groups(); ++g) {
    float* const p = acc.zero_sums + (r * f.value_groups() + g) * kLanes;
    store(p, load(p) * factor);
  }
  store(acc.denominators + r * kLanes, load(acc.denominators + r * kLanes) * factor);
  acc.maximum[r] = maximum;
}

// Scores of `tokens` slots (a multiple of kLanes; slots that do not count hold -infinity) become weights. Each score,
// as it is seen, is given to keep(r, t, x).
template <int NR, class Keep>
LOGQUANT_INLINE void softmax(const AttendArgs& args, int tokens, bool biased, const Scores& scores,
                             const Accumulator& acc, Keep&& keep) {
  for (int r = 0; r < NR; ++r) {
    float* const row = scores.weights + r * kUnitTokens;
    const float* const bias = scores.bias + r * kUnitTokens;
    F32 top = splat(-kInfinity);
    for (int t = 0; t < tokens; t += kLanes) {
      F32 x = load(row + t);
      if (args.softcap > 0.0f) x = splat(args.softcap * kLog2e) * tanh(x);
      if (biased) {
        const F32 add = load(bias + t);
        x = select(add == splat(-kInfinity), add, x + add);
      }
      if (args.softcap > 0.0f || biased) store(row + t, x);
      top = max(top, x);
    }
    if (any_above(top, splat(acc.maximum[r] + kMaximumSlack))) {
      raise_maximum(args.format, r, reduce(max(splat(acc.maximum[r]), top), Max{}), acc);
    }
    const F32 maximum = splat(acc.maximum[r]);
    F32 sum = load(acc.denominators + r * kLanes);
    for (int t = 0; t < tokens; t += kLanes) {
      const F32 x = load(row + t);
      keep(r, t, x);
      F32 weight = exp2(x - maximum);
      if (biased) weight = select(x == splat(-kInfinity), splat(0.0f), weight);
      sum += weight;
      store(row + t, weight);
    }
    store(acc.denominators + r * kLanes, sum);
  }
}

template <int NR>
LOGQUANT_INLINE void softmax(const AttendArgs& args, int tokens, bool biased, const Scores& scores,
                             const Accumulator& acc) {
  softmax<NR>(args, tokens, biased, scores, acc, [](int, int, F32) __attribute__((always_inline)) {});
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
