// What hides slots from rows, or is added to their scores: positions without a token, the causal rule, and masks.
//
// Everything becomes one bias [row][kUnitTokens] of a unit's slots, where there is anything. Lanes are slots, except
// with a mask, which is read element by element, by each slot's position.
#pragma once

#include "rows.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

constexpr float kHidden = -1e30f;  // additive mask values up to here hide a slot (HIDDEN in ops/reference/attend.py)

LOGQUANT_INLINE float mask_value(AttendArgs::MaskKind kind, const void* mask, int64_t i) {
  switch (kind) {
    case AttendArgs::MaskKind::kBool:
      return static_cast<const uint8_t*>(mask)[i] ? 0.0f : -kInfinity;
    case AttendArgs::MaskKind::kFloat32:
      return static_cast<const float*>(mask)[i];
    case AttendArgs::MaskKind::kBFloat16:
      return bits_as<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(mask)[i]) << 16);
    default: {
      uint16_t lanes[kLanes] = {static_cast<const uint16_t*>(mask)[i]};
      return load_half(lanes)[0];
    }
  }
}

// bias[r][i] = what is added to the score (base 2) of slot first_slot + i; -infinity where row r does not see it.
// Returns whether any of it is not 0.
__attribute__((noinline)) bool load_bias(const AttendArgs& args, TaskRows rows, int64_t first_slot, int tokens,
                                         float* bias) {
  const int32_t* const positions =
      args.positions == nullptr ? nullptr : args.positions + rows.batch * args.positions_batch_stride + first_slot;
  const bool has_mask = args.mask_kind != AttendArgs::MaskKind::kNone;
  I32 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  I32 nonzero = splat(0);
  for (int r = 0; r < rows.rows; ++r) {
    const int64_t query = rows.query(args, r);
    float* const out = bias + r * kUnitTokens;
    // Heads that share a mask share its rows.
    if (r >= args.queries && args.mask_head_stride == 0) {
      __builtin_memcpy(out, out - args.queries * kUnitTokens, sizeof(float) * kUnitTokens);
      continue;
    }
    const int32_t last = args.query_positions == nullptr
                             ? INT32_MAX
                             : args.query_positions[rows.batch * args.query_positions_batch_stride + query];
    int i = 0;
    if (!has_mask) {
      for (; i + kLanes <= tokens; i += kLanes) {
        const I32 position = positions == nullptr ? lanes + static_cast<int32_t>(first_slot + i) : load(positions + i);
        const F32 value = select((position < 0) | (position > last), splat(-kInfinity), splat(0.0f));
        nonzero |= bits_as<I32>(value);
        store(out + i, value);
      }
    }
    const int64_t base = rows.batch * args.mask_batch_stride + rows.query_head(args, r) * args.mask_head_stride +
                         query * args.mask_query_stride;
    for (; i < tokens; ++i) {
      const int64_t position = positions == nullptr ? first_slot + i : positions[i];
      float value = 0.0f;
      if (position < 0 || position > last || (has_mask && position >= args.mask_positions)) {
        value = -kInfinity;
      } else if (has_mask) {
        value = mask_value(args.mask_kind, args.mask, base + position * args.mask_position_stride);
      }
      out[i] = value <= kHidden ? -kInfinity : value * kLog2e;
      nonzero[0] |= out[i] != 0.0f;
    }
  }
  return any_above(abs(to_float(nonzero)), splat(0.0f));
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
