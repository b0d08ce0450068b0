// The MSE search: search_keys and search_values of logquant/ops/reference, operation for operation, on kLanes groups at
// once.
//
// Nothing here may be contracted or reordered: parameters and codes are bit for bit those of the reference.
#pragma once

#include "../candidates.h"
#include "params.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

// borders: kScaleMiddles for the nearest scale, kScaleEighths for the smallest that is not below.
LOGQUANT_INLINE I32 scale_byte(F32 scale, const int32_t (&borders)[8]) {
  const I32 bits = bits_as<I32>(scale) & 0x7FFFFFFF, fraction = bits & 0x7FFFFF;
  I32 byte = ((bits >> 23) - kScaleExponent) << 3;
  for (const int32_t border : borders) byte -= fraction > splat(border);
  byte = select(byte < 0, splat(0), byte);
  return select(byte > kScaleMax, splat(kScaleMax), byte);
}

// Sums over a group's elements, as _sum there: every fourth one by one, then the four sums. term(i) is one or
// several numbers.
template <class Term>
LOGQUANT_INLINE F32 sum_of(int count, Term&& term) {
  F32 total[4] = {};
  for (int i = 0; i < count; i += 4) unroll<4>([&](auto k) __attribute__((always_inline)) { total[k] += term(i + k); });
  return (total[0] + total[1]) + (total[2] + total[3]);
}

LOGQUANT_INLINE F32 fitted_code(F32 x, F32 inverse, F32 zero, F32 levels) {
  return round_positive(min(max((x - zero) * inverse, splat(0.0f)), levels));
}

struct KeyFit {
  I32 byte, zero_byte;
  F32 scale, zero;  // of codes
};

// x: [count][kLanes], finite; weights: [count].
LOGQUANT_INLINE KeyFit fit_keys(const float* x, const float* weights, int count, F32 levels, F32 lift) {
  const auto x_at = [&](int i) __attribute__((always_inline)) { return load(x + i * kLanes); };
  const F32 drop = 1.0f / lift, most = max(splat(1.0f), levels);
  const F32 total = sum_of(count, [&](int i) __attribute__((always_inline)) { return splat(weights[i]); });
  const F32 mean =
      sum_of(count, [&](int i) __attribute__((always_inline)) { return splat(weights[i]) * x_at(i); }) / total;
  F32 low = splat(kInfinity), high = splat(-kInfinity);
  for (int i = 0; i < count; ++i) {
    low = min(x_at(i), low);
    high = max(x_at(i), high);
  }
  const I32 bare = levels == splat(0.0f);
  low = select(bare, mean, low + 0.0f);
  high = select(bare, mean, high + 0.0f);

  KeyFit best{splat(0), splat(0), splat(1.0f), splat(0.0f)};
  F32 error = splat(kInfinity);
  const auto offer = [&](F32 scale, F32 zero) __attribute__((noinline)) {
    // The scale is large enough for the zero to be stored.
    const I32 nearest = scale_byte(scale * lift, kScaleMiddles);
    const I32 least = scale_byte(abs(zero) * kScaleOfZero, kScaleEighths);
    const I32 byte = select(nearest > least, nearest, least);
    const F32 top = byte_scale(byte), unit = top * kZeroUnit;
    const F32 bound = splat(static_cast<float>(kZeroMax));
    const I32 zero_byte = round_to_int(min(max(zero / unit, -bound), bound));
    scale = top * drop;
    zero = to_float(zero_byte) * unit;
    const F32 inverse = 1.0f / scale;
    const F32 new_error = sum_of(count, [&](int i) __attribute__((always_inline)) {
      const F32 difference = (zero + scale * fitted_code(x_at(i), inverse, zero, levels)) - x_at(i);
      return (splat(weights[i]) * difference) * difference;
    });
    const I32 better = new_error < error;
    best.byte = select(better, byte, best.byte);
    best.zero_byte = select(better, zero_byte, best.zero_byte);
    best.scale = select(better, scale, best.scale);
    best.zero = select(better, zero, best.zero);
    error = select(better, new_error, error);
  };

  offer((high - low) / most, low);
  const F32 middle = (low + high) * 0.5f, half = (high - low) * 0.5f;
  for (const float part : kShrinks) {
    const F32 new_low = middle - half * part, new_high = middle + half * part;
    offer((new_high - new_low) / most, new_low);
  }
  for (const Move& move : kMoves) {
    F32 span = levels * best.scale;
    const F32 new_low = best.zero + span * move.part;
    offer(((best.zero + span) - new_low) / most, new_low);
    span = levels * best.scale;
    offer((span * move.rest) / most, best.zero);
  }
  for (int refit = 0; refit < kRefits; ++refit) {
    const F32 inverse = 1.0f / best.scale;
    const auto code_at = [&](int i) __attribute__((always_inline)) {
      return fitted_code(x_at(i), inverse, best.zero, levels);
    };
    const F32 mean_code =
        sum_of(count, [&](int i) __attribute__((always_inline)) { return splat(weights[i]) * code_at(i); }) / total;
    const F32 variance = sum_of(count, [&](int i) __attribute__((always_inline)) {
      const F32 off = code_at(i) - mean_code;
      return (splat(weights[i]) * off) * off;
    });
    const F32 covariance = sum_of(count, [&](int i) __attribute__((always_inline)) {
      return (splat(weights[i]) * (code_at(i) - mean_code)) * (x_at(i) - mean);
    });
    const I32 good = (variance > splat(1e-9f)) & (covariance > splat(0.0f));
    const F32 scale = select(good, covariance / select(good, variance, splat(1.0f)), best.scale);
    offer(scale, mean - scale * mean_code);
  }
  return best;
}

struct ValueFit {
  I32 byte;
  F32 scale, zero;
};

// x: [count][kLanes], finite. Byte 0 if they are too large to be squared.
LOGQUANT_INLINE ValueFit fit_values(const float* x, int count, F32 levels) {
  const auto x_at = [&](int i) __attribute__((always_inline)) { return load(x + i * kLanes); };
  const F32 most = levels, middle = 0.5f * levels;
  F32 high = splat(0.0f);
  for (int i = 0; i < count; ++i) high = max(abs(x_at(i)), high);

  ValueFit best{splat(0), byte_scale(splat(0)), byte_scale(splat(0)) * (-0.5f * levels)};
  F32 error = splat(kInfinity);
  const auto offer = [&](F32 scale) __attribute__((noinline)) {
    const I32 byte = scale_byte(scale, kScaleMiddles);
    scale = byte_scale(byte);
    const F32 zero = scale * (-0.5f * levels), inverse = 1.0f / scale;
    const F32 new_error = sum_of(count, [&](int i) __attribute__((always_inline)) {
      const F32 difference = (zero + scale * fitted_code(x_at(i), inverse, zero, most)) - x_at(i);
      return difference * difference;
    });
    const I32 better = new_error < error;
    best.byte = select(better, byte, best.byte);
    best.scale = select(better, scale, best.scale);
    best.zero = select(better, zero, best.zero);
    error = select(better, new_error, error);
  };

  offer(high / middle);
  offer((high * kStretch) / middle);
  for (const float part : kShrinks) offer((high * part) / middle);
  for (int refit = 0; refit < kRefits; ++refit) {
    const F32 inverse = 1.0f / best.scale;
    const auto off_at = [&](int i) __attribute__((always_inline)) {
      return fitted_code(x_at(i), inverse, best.zero, most) - middle;
    };
    const F32 along = sum_of(count, [&](int i) __attribute__((always_inline)) { return off_at(i) * x_at(i); });
    const F32 norm = sum_of(count, [&](int i) __attribute__((always_inline)) { return off_at(i) * off_at(i); });
    offer(select(along > splat(0.0f), along / norm, splat(0.0f)));
  }
  return best;
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
