// What the MSE search tries, on every device (logquant/ops/reference/search.py).
#pragma once

#include "format.h"

namespace logquant {

// The whole range first, then parts of it about its middle.
LOGQUANT_TABLE float kShrinks[] = {0.9f, 0.8f, 0.7f, 0.6f, 0.5f};
// Of values, whose range is symmetric, something more than the whole as well.
inline constexpr float kStretch = 1.07f;

// Then one end of the range moves inwards by `part` of it, or outwards, and `rest` of it is left.
struct Move {
  float part, rest;
};
LOGQUANT_HOST_DEVICE constexpr Move move_by(double part) {
  return {static_cast<float>(part), static_cast<float>(1.0 - part)};
}
LOGQUANT_TABLE Move kMoves[] = {move_by(0.15), move_by(0.07), move_by(-0.07), move_by(-0.15),
                                move_by(0.15), move_by(0.07), move_by(-0.07), move_by(-0.15)};

// Least squares, given the codes.
inline constexpr int kRefits = 2;

// The smallest scale with which a zero can be stored, in parts of that zero.
inline constexpr float kScaleOfZero = static_cast<float>(1.0 / (kZeroUnit * kZeroMax));

// Weights of tokens lie within 2^-10 .. 2^10; any other counts as 1.
LOGQUANT_HOST_DEVICE constexpr float valid_weight(float x) { return x >= 0x1p-10f && x <= 0x1p10f ? x : 1.0f; }

// How much of an error another token takes off; what lies beyond counts as nothing, a NaN too.
LOGQUANT_HOST_DEVICE constexpr float valid_feedback(float x) { return x >= -4.0f && x <= 4.0f ? x : 0.0f; }

}  // namespace logquant
