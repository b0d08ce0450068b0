// Parameters of either width and the rotation of values (format.h), for every CUDA kernel that reads or writes them.
#pragma once

#include "elements.cuh"

namespace logquant::cuda {

// Code c stands for zero + scale * c. Of keys, the 8-bit scale is that of the two highest bits.
struct Params {
  float scale, zero;
};

// byte <= kScaleMax
LOGQUANT_DEVICE float byte_scale(uint32_t byte) { return __uint_as_float(scale_bits(byte)); }

// zero_steps: how many units the zero lies from 0.
LOGQUANT_DEVICE Params byte_params(uint32_t byte, float zero_steps, float unit) {
  if (byte == kPoisonScale) return {0.0f, NAN};
  const float scale = byte_scale(byte);
  return {scale, __fmul_rn(zero_steps, __fmul_rn(scale, unit))};
}

LOGQUANT_DEVICE Params key_params_at(const PageFormat& f, const uint32_t* page, int c) {
  if (f.key_param_bits == 16) {
    const uint16_t* const p = reinterpret_cast<const uint16_t*>(page + f.key_params()) + c;
    return {half_to_float(p[0]), half_to_float(p[f.key_zeros()])};
  }
  const uint8_t* const p = reinterpret_cast<const uint8_t*>(page + f.key_params()) + c;
  return byte_params(p[0], static_cast<float>(static_cast<int8_t>(p[f.key_zeros()])), kZeroUnit);
}

// i: [group][token]
LOGQUANT_DEVICE Params value_params_at(const PageFormat& f, const uint32_t* page, int i) {
  if (f.value_param_bits == 16) {
    const uint16_t* const p = reinterpret_cast<const uint16_t*>(page + f.value_params()) + i;
    return {half_to_float(p[0]), half_to_float(p[f.value_zeros()])};
  }
  const uint8_t* const p = reinterpret_cast<const uint8_t*>(page + f.value_params()) + i;
  return byte_params(p[0], -0.5f * static_cast<float>(code_mask(f.value_code_bits(i % f.page_tokens))), 1.0f);
}

// The code of token t and channel c, whose word of value codes is `word`.
LOGQUANT_DEVICE uint32_t value_code(const PageFormat& f, const uint32_t* page, uint32_t word, int c, int t) {
  const uint32_t code = extract(word, f.value_bits, t % elements_per_word(f.value_bits));
  if (!f.is_fine(t)) return code;
  return code | (page[f.fine_word(c)] >> f.fine_position(c, t) & code_mask(f.value_bits)) << f.value_bits;
}

// What digit `digit` of a channel with `columns` columns weighs, in units of the stored scale.
LOGQUANT_DEVICE float digit_weight(const PageFormat& f, int digit, int columns) {
  return __uint_as_float(static_cast<uint32_t>(127 + f.digit_exponent(digit, columns)) << 23);
}

// Blocks of 16, 32 or 64 channels become their Walsh-Hadamard transform, in the order of reference/hadamard.py. A lane
// has four neighbouring channels of a token, the next lane the next four: block / 4 lanes, from a multiple of that on,
// have a block. All lanes of the warp call this.
LOGQUANT_DEVICE Float4 rotated(Float4 v, int block) {
  v = {__fadd_rn(v.x[0], v.x[1]), __fsub_rn(v.x[0], v.x[1]), __fadd_rn(v.x[2], v.x[3]), __fsub_rn(v.x[2], v.x[3])};
  v = {__fadd_rn(v.x[0], v.x[2]), __fadd_rn(v.x[1], v.x[3]), __fsub_rn(v.x[0], v.x[2]), __fsub_rn(v.x[1], v.x[3])};
  const float factor = hadamard_factor(block);
  for (int step = 1; step < block / 4; step *= 2) {
    const bool upper = (threadIdx.x & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float other = __shfl_xor_sync(ptx::kFullMask, v.x[i], step);
      v.x[i] = upper ? __fsub_rn(other, v.x[i]) : __fadd_rn(v.x[i], other);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) v.x[i] = __fmul_rn(v.x[i], factor);
  return v;
}

}  // namespace logquant::cuda
