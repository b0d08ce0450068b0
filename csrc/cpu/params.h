// 8-bit parameters and the rotation of values (format.h), for every CPU kernel that reads or writes them.
#pragma once

#include "simd.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

// Scale and zero of kLanes channels of keys, or tokens of values, as code c stands for zero + scale * c. Of
// keys the 8-bit scale is that of the two highest bits.
struct Params {
  F32 scale, zero;
};

// The floats of scale bytes 0 to 7, as bits.
struct FirstScales {
  int32_t bits[8] = {};

  constexpr FirstScales() {
    for (int i = 0; i < 8; ++i) bits[i] = kScaleExponent << 23 | kScaleEighths[i];
  }
};
constexpr FirstScales kFirstScales;

// byte <= kScaleMax; of larger ones comes a finite number.
LOGQUANT_INLINE F32 byte_scale(I32 byte) {
  return bits_as<F32>(lookup(kFirstScales.bits, byte & 7) + (shift_right(byte, 3) << 23));
}

// zero_steps: how many units the zero lies from 0.
LOGQUANT_INLINE Params byte_params(I32 byte, F32 zero_steps, float unit) {
  const I32 poisoned = byte > kScaleMax;
  const F32 scale = byte_scale(select(poisoned, splat(0), byte));
  const F32 zero = zero_steps * (scale * unit);
  return {select(poisoned, splat(0.0f), scale), select(poisoned, bits_as<F32>(splat(0x7FC00000)), zero)};
}

LOGQUANT_INLINE Params key_params_at(const PageFormat& f, const int32_t* page, int c) {
  if (f.key_param_bits == 16) {
    const uint16_t* const p = reinterpret_cast<const uint16_t*>(page + f.key_params()) + c;
    return {load_half(p), load_half(p + f.key_zeros())};
  }
  const uint8_t* const p = reinterpret_cast<const uint8_t*>(page + f.key_params()) + c;
  const I32 zero = load_s8(reinterpret_cast<const int8_t*>(p + f.key_zeros()));
  return byte_params(load_u8(p), to_float(zero), kZeroUnit);
}

// Middles of the codes of 16 tokens, of which the last one or the last two have fine values.
alignas(64) inline constexpr float kFineMiddles[2][16] = {
    {1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 7.5f},
    {1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 1.5f, 7.5f, 7.5f},
};

// The middles of the codes of kLanes tokens from t on, a multiple of kLanes.
LOGQUANT_INLINE F32 value_middles(const PageFormat& f, int t) {
  if (f.fine_values == 0) return splat(0.5f * static_cast<float>(code_mask(f.value_bits)));
  return load(kFineMiddles[f.fine_values / 8] + t % 16);
}

// The fine digits of kLanes channels from c on, moved within words: those of the last tokens of rows are in the highest
// byte, where the digits of row w are from bit 2w on, as are, with 8 fine values, those of the tokens before in byte 1.
// Below are others. What words move by differs from channel to channel: to load from some bytes before costs nothing.
// (Before the fine digits, a page has its parameters.)
LOGQUANT_INLINE const char* fine_digits_at(const PageFormat& f, const int32_t* page, int c) {
  return reinterpret_cast<const char*>(page + f.fine_word(c)) - (f.fine_channels() - 1 - f.fine_byte(c));
}
// The digits in these of row 0; those of row w are 2w bits further.
LOGQUANT_INLINE I32 fine_digits_mask(const PageFormat& f) {
  return splat(static_cast<int>(code_mask(2) << 24 | (f.fine_values == 8 ? code_mask(2) << 8 : 0)));
}

// i: [group][token]. The zero is that of tokens without fine values.
LOGQUANT_INLINE Params value_params_at(const PageFormat& f, const int32_t* page, int i) {
  if (f.value_param_bits == 16) {
    const uint16_t* const p = reinterpret_cast<const uint16_t*>(page + f.value_params()) + i;
    return {load_half(p), load_half(p + f.value_zeros())};
  }
  const uint8_t* const p = reinterpret_cast<const uint8_t*>(page + f.value_params()) + i;
  return byte_params(load_u8(p), splat(-0.5f * static_cast<float>(code_mask(f.value_bits))), 1.0f);
}

// What digit `digit` of a channel with `columns` columns weighs, in units of the stored scale.
LOGQUANT_INLINE float digit_weight(const PageFormat& f, int digit, int columns) {
  return bits_as<float>(static_cast<uint32_t>(127 + f.digit_exponent(digit, columns)) << 23);
}

// counts[c]: columns of channel c.
LOGQUANT_INLINE void count_columns(const PageFormat& f, const int16_t* map, int32_t* counts) {
  for (int c = 0; c < f.head_dim; ++c) counts[c] = map == nullptr ? 1 : 0;
  if (map == nullptr) return;
  for (int j = 0; j < f.key_columns; ++j) ++counts[column_channel(map[j])];
}

template <int step, int... lane>
LOGQUANT_INLINE F32 butterfly(F32 x, std::integer_sequence<int, lane...>) {
  const F32 other = __builtin_shufflevector(x, x, (lane ^ step)...);
  const I32 flip = {((lane & step) != 0 ? INT32_MIN : 0)...};
  return other + bits_as<F32>(bits_as<I32>(x) ^ flip);
}

// Every `block` elements of x (block: a power of two, at least kLanes) become their orthonormal Walsh-Hadamard
// transform, in the order of reference/hadamard.py.
LOGQUANT_INLINE void hadamard(float* x, int count, int block) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  for (int i = 0; i < count; i += kLanes) {
    F32 v = butterfly<1>(load(x + i), lanes);
    v = butterfly<2>(v, lanes);
    if constexpr (kLanes > 4) v = butterfly<4>(v, lanes);
    if constexpr (kLanes > 8) v = butterfly<8>(v, lanes);
    store(x + i, v);
  }
  for (int step = kLanes; step < block; step *= 2) {
    for (int first = 0; first < count; first += 2 * step) {
      for (int i = first; i < first + step; i += kLanes) {
        const F32 low = load(x + i), high = load(x + i + step);
        store(x + i, low + high);
        store(x + i + step, low - high);
      }
    }
  }
  const float factor = hadamard_factor(block);
  for (int i = 0; i < count; i += kLanes) store(x + i, load(x + i) * factor);
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
