// The MSE search: search_keys and search_values of logquant/ops/reference, operation for operation, on eight groups a
// warp.
//
// Groups lie in shared memory. Four lanes have a group, each every fourth of its elements: that is the order of
// _sum there, so that a sum is a loop and two shuffles, and the four lanes make every choice alike. All lanes of a
// warp call these functions, with equally many elements. A warp's groups are fit_pitch() floats apart: its lanes then
// read from 32 banks.
#pragma once

#include "../candidates.h"
#include "params.cuh"

namespace logquant::cuda {

inline constexpr int kFitLanes = 4, kFitGroups = 32 / kFitLanes;

LOGQUANT_HOST_DEVICE constexpr int fit_pitch(int count) { return count + 4; }

// A float whose every operation is rounded by itself: nvcc would fuse products and sums.
struct Exact {
  float value;
  LOGQUANT_DEVICE Exact(float x) : value(x) {}
  friend LOGQUANT_DEVICE Exact operator+(Exact a, Exact b) { return __fadd_rn(a.value, b.value); }
  friend LOGQUANT_DEVICE Exact operator-(Exact a, Exact b) { return __fsub_rn(a.value, b.value); }
  friend LOGQUANT_DEVICE Exact operator*(Exact a, Exact b) { return __fmul_rn(a.value, b.value); }
  friend LOGQUANT_DEVICE Exact operator/(Exact a, Exact b) { return __fdiv_rn(a.value, b.value); }
  friend LOGQUANT_DEVICE bool operator<(Exact a, Exact b) { return a.value < b.value; }
};

struct Range {
  float low, high;  // low is a NaN if an element is not finite
  LOGQUANT_DEVICE void add(float x) {
    low = is_finite(x) && low == low ? fminf(low, x) : NAN;
    high = fmaxf(high, x);
  }
  LOGQUANT_DEVICE void add(const Range& other) {
    low = low == low && other.low == other.low ? fminf(low, other.low) : NAN;
    high = fmaxf(high, other.high);
  }
  LOGQUANT_DEVICE bool finite() const { return low == low; }
};

// borders: kScaleMiddles for the nearest scale, kScaleEighths for the smallest that is not below.
LOGQUANT_DEVICE int scale_byte(Exact scale, const int32_t (&borders)[8]) {
  const int bits = static_cast<int>(__float_as_uint(scale.value) & 0x7FFFFFFFu), fraction = bits & 0x7FFFFF;
  int byte = ((bits >> 23) - kScaleExponent) * 8;
#pragma unroll
  for (const int32_t border : borders) byte += fraction > border;
  return min(max(byte, 0), kScaleMax);
}

// What a lane has of a group: x[0], x[4], ... below x[count].
struct Elements {
  const float* x;
  const float* weights;  // as x
  int count;
};

template <class Term>
LOGQUANT_DEVICE Exact sum_of(int count, Term term) {
  Exact total = 0.0f;
#pragma unroll 4
  for (int i = 0; i < count; i += kFitLanes) total = total + term(i);
#pragma unroll
  for (int step = 1; step < kFitLanes; step *= 2) total = total + __shfl_xor_sync(ptx::kFullMask, total.value, step);
  return total;
}

LOGQUANT_DEVICE Range range_of(const Elements& e) {
  Range range{INFINITY, -INFINITY};
#pragma unroll 4
  for (int i = 0; i < e.count; i += kFitLanes) range.add(e.x[i]);
#pragma unroll
  for (int step = 1; step < kFitLanes; step *= 2) {
    range.add(
        Range{__shfl_xor_sync(ptx::kFullMask, range.low, step), __shfl_xor_sync(ptx::kFullMask, range.high, step)});
  }
  return range;
}

LOGQUANT_DEVICE Exact fitted_code(Exact x, Exact inverse, Exact zero, Exact levels) {
  return rintf(fminf(fmaxf(((x - zero) * inverse).value, 0.0f), levels.value));
}

struct Fit {
  bool finite;
  int byte = 0, zero_byte = 0;
  Exact scale = 1.0f, zero = 0.0f;  // of codes
};

// Elements are finite and saturated, or one is a NaN.
LOGQUANT_DEVICE Fit fit_keys(const Elements& e, Exact levels, Exact lift) {
  const Exact drop = 1.0f / lift, most = fmaxf(1.0f, levels.value);
  const Exact total = sum_of(e.count, [&](int i) { return Exact(e.weights[i]); });
  const Exact mean = sum_of(e.count, [&](int i) { return Exact(e.weights[i]) * e.x[i]; }) / total;
  const Range range = range_of(e);
  const bool bare = levels.value == 0.0f;
  const Exact low = bare ? mean : range.low + Exact(0.0f), high = bare ? mean : range.high + Exact(0.0f);

  Fit best{range.finite()};
  Exact error = INFINITY;
  const auto offer = [&](Exact new_scale, Exact new_zero) {
    // The scale is large enough for the zero to be stored.
    const int byte =
        max(scale_byte(new_scale * lift, kScaleMiddles), scale_byte(new_zero * kScaleOfZero, kScaleEighths));
    const Exact top = byte_scale(byte), unit = top * kZeroUnit;
    const float bound = static_cast<float>(kZeroMax);
    const Exact steps = rintf(fminf(fmaxf((new_zero / unit).value, -bound), bound));
    const Exact scale = top * drop, zero = steps * unit, inverse = 1.0f / scale;
    const Exact new_error = sum_of(e.count, [&](int i) {
      const Exact difference = (zero + scale * fitted_code(e.x[i], inverse, zero, levels)) - e.x[i];
      return (e.weights[i] * difference) * difference;
    });
    if (new_error < error) {
      best = {best.finite, byte, static_cast<int>(steps.value), scale, zero};
      error = new_error;
    }
  };

  offer((high - low) / most, low);
  const Exact middle = (low + high) * 0.5f, half = (high - low) * 0.5f;
#pragma unroll 1
  for (const float part : kShrinks) {
    const Exact new_low = middle - half * part, new_high = middle + half * part;
    offer((new_high - new_low) / most, new_low);
  }
#pragma unroll 1
  for (const Move& move : kMoves) {
    Exact span = levels * best.scale;
    const Exact new_low = best.zero + span * move.part;
    offer(((best.zero + span) - new_low) / most, new_low);
    span = levels * best.scale;
    offer((span * move.rest) / most, best.zero);
  }
#pragma unroll 1
  for (int refit = 0; refit < kRefits; ++refit) {
    const Exact inverse = 1.0f / best.scale;
    const auto code_at = [&](int i) { return fitted_code(e.x[i], inverse, best.zero, levels); };
    const Exact mean_code = sum_of(e.count, [&](int i) { return e.weights[i] * code_at(i); }) / total;
    const Exact variance = sum_of(e.count, [&](int i) {
      const Exact off = code_at(i) - mean_code;
      return (e.weights[i] * off) * off;
    });
    const Exact covariance =
        sum_of(e.count, [&](int i) { return (e.weights[i] * (code_at(i) - mean_code)) * (e.x[i] - mean); });
    const bool good = 1e-9f < variance && 0.0f < covariance;
    const Exact scale = good ? covariance / variance : best.scale;
    offer(scale, mean - scale * mean_code);
  }
  return best;
}

// As above, without weights; zero_byte is not used. Byte 0 if an element is not finite, or too large to be squared.
LOGQUANT_DEVICE Fit fit_values(const Elements& e, Exact levels) {
  const Exact middle = levels * 0.5f;
  const Range range = range_of(e);
  const Exact high = fmaxf(-range.low, range.high);

  Fit best{range.finite(), 0, 0, byte_scale(0), Exact(byte_scale(0)) * (-middle.value)};
  Exact error = INFINITY;
  const auto offer = [&](Exact new_scale) {
    const int byte = scale_byte(new_scale, kScaleMiddles);
    const Exact scale = byte_scale(byte), zero = scale * (-middle.value), inverse = 1.0f / scale;
    const Exact new_error = sum_of(e.count, [&](int i) {
      const Exact difference = (zero + scale * fitted_code(e.x[i], inverse, zero, levels)) - e.x[i];
      return difference * difference;
    });
    if (new_error < error) {
      best = {best.finite, byte, 0, scale, zero};
      error = new_error;
    }
  };

  offer(high / middle);
  offer((high * kStretch) / middle);
#pragma unroll 1
  for (const float part : kShrinks) offer((high * part) / middle);
#pragma unroll 1
  for (int refit = 0; refit < kRefits; ++refit) {
    const Exact inverse = 1.0f / best.scale;
    const auto off_at = [&](int i) { return fitted_code(e.x[i], inverse, best.zero, levels) - middle; };
    const Exact along = sum_of(e.count, [&](int i) { return off_at(i) * e.x[i]; });
    const Exact norm = sum_of(e.count, [&](int i) { return off_at(i) * off_at(i); });
    offer(0.0f < along ? along / norm : Exact(0.0f));
  }
  return best;
}

}  // namespace logquant::cuda
