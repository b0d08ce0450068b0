// Operands of mma.m16n8k16 in the registers of a lane: how they are read, made of codes, and reduced.
//
// Layout: lane = 4g + t, as in the PTX ISA ("groupID" and "threadID_in_group"). Of operand A (16 x 16) a lane has four
// words, of rows g and g + 8; of operand B (16 x 8) two, of column g; of accumulators (16 x 8) rows g and g + 8 of
// columns 2t and 2t + 1. What is element k of a row is up to us, if A and B agree: a sum does not mind its order.
// Parallelisation: a warp; the maxima are over its lanes.
// Memory traffic: none of its own; shared memory is read 16 bytes a lane where it can be.
//
// No dequantisation: word & (lane_mask << b*i) is the fp16 subnormal code * 2^(b*i - 24), for the low eight bits of
// both halves of the word and, shifted by eight, for the others. 2^-(b*i) goes into the other operand, 2^24 (kCodeUnit)
// into an fp32 factor of the sum. LOGQUANT_NORMAL_CODES computes (1024 + code * 2^(b*i)) - 1024 instead, one HADD2 a
// pair more, should an mma ever flush subnormals. Do not fold the 1024 into a correction: sums of tensor cores
// truncate, and 1024 * sum p' is 1000 times the result.
#pragma once

#include "../attend.cuh"

#ifndef LOGQUANT_NORMAL_CODES
#define LOGQUANT_NORMAL_CODES 0
#endif

namespace logquant::cuda::tensor {

using FragmentA = uint32_t[4];
using FragmentB = uint32_t[2];

inline constexpr float kCodeUnit = LOGQUANT_NORMAL_CODES ? 1.0f : 16777216.0f;  // 1 / what a code of 1 is as an operand

template <class U>
LOGQUANT_DEVICE U read(const unsigned char* p) {
  return *reinterpret_cast<const U*>(p);
}
LOGQUANT_DEVICE void assign(uint32_t* to, uint4 v) {
  to[0] = v.x;
  to[1] = v.y;
  to[2] = v.z;
  to[3] = v.w;
}
// The rest is zeros.
LOGQUANT_DEVICE void assign(uint32_t (&to)[4], uint2 v) {
  to[0] = v.x;
  to[1] = v.y;
  to[2] = to[3] = 0;
}

// Pair i of a word as the two fp16 code * 2^(bits * (i % (8 / bits))) / kCodeUnit; shifted = word >> 8.
template <int bits>
LOGQUANT_DEVICE uint32_t code_pair(uint32_t word, uint32_t shifted, int i) {
  constexpr int kPerByte = 8 / bits;
  const uint32_t mask = lane_mask(bits) << bits * (i % kPerByte), x = i < kPerByte ? word : shifted;
  return LOGQUANT_NORMAL_CODES ? ptx::sub_f16x2(ptx::and_or(x, mask, 0x64006400u), 0x64006400u) : x & mask;
}
// Operand A: pairs i and i + 1 of a word of row g and of one of row g + 8.
template <int bits>
struct CodeWords {
  LOGQUANT_DEVICE CodeWords(uint32_t low, uint32_t high) : x(low), y(high), shifted_x(low >> 8), shifted_y(high >> 8) {}
  LOGQUANT_DEVICE void pairs(FragmentA& to, int i) const {
    to[0] = code_pair<bits>(x, shifted_x, i);
    to[1] = code_pair<bits>(y, shifted_y, i);
    to[2] = code_pair<bits>(x, shifted_x, i + 1);
    to[3] = code_pair<bits>(y, shifted_y, i + 1);
  }
  const uint32_t x, y, shifted_x, shifted_y;
};

// The same of words whose last pair is fine, or of it the second code alone (format.h). fine_low, fine_high: the words
// of fine digits, shifted so that this pair's are in bytes 0 and 2, or that of the second code in byte 0. They come
// above the low digits, where a shift by eight has no use for what was there.
template <int bits, bool pairs_are_fine>
struct FineCodeWords {
  LOGQUANT_DEVICE FineCodeWords(uint32_t low, uint32_t high, uint32_t fine_low, uint32_t fine_high)
      : x(low), y(high), shifted_x(joined(low, fine_low)), shifted_y(joined(high, fine_high)) {}
  LOGQUANT_DEVICE void pairs(FragmentA& to, int i) const {
    to[0] = pair(x, shifted_x, i);
    to[1] = pair(y, shifted_y, i);
    to[2] = pair(x, shifted_x, i + 1);
    to[3] = pair(y, shifted_y, i + 1);
  }
  const uint32_t x, y, shifted_x, shifted_y;

 private:
  static constexpr int kLast = 16 / bits - 1, kPosition = 8 - bits;
  static LOGQUANT_DEVICE uint32_t joined(uint32_t word, uint32_t fine) {
    return ptx::select_bytes(word, fine, pairs_are_fine ? 0x6341 : 0x4341);
  }
  static LOGQUANT_DEVICE uint32_t pair(uint32_t word, uint32_t shifted, int i) {
    if (i != kLast) return code_pair<bits>(word, shifted, i);
    const uint32_t first = code_mask(pairs_are_fine ? 2 * bits : bits), second = code_mask(2 * bits);
    const uint32_t mask = (second << 16 | first) << kPosition;
    return LOGQUANT_NORMAL_CODES ? ptx::sub_f16x2(ptx::and_or(shifted, mask, 0x64006400u), 0x64006400u)
                                 : shifted & mask;
  }
};

// Both halves 2^(bits * (i % (8 / bits))), or its inverse, or its negative.
template <int bits>
LOGQUANT_DEVICE constexpr uint32_t digit_weights(int i) {
  return 0x3C003C00u + 0x04000400u * static_cast<uint32_t>(bits * (i % (8 / bits)));
}
template <int bits>
LOGQUANT_DEVICE constexpr uint32_t inverse_digit_weights(int i) {
  return 0x3C003C00u - 0x04000400u * static_cast<uint32_t>(bits * (i % (8 / bits)));
}
template <int bits>
LOGQUANT_DEVICE constexpr uint32_t negative_digit_weights(int i) {
  return digit_weights<bits>(i) | 0x80008000u;
}

// The same of a word's last four pairs with codes of two bits, of which the last, or its second code, is fine: there
// times 7.5 / 1.5, the middles of such codes.
template <bool pairs_are_fine>
LOGQUANT_DEVICE constexpr uint32_t negative_fine_weights(int i) {
  return i < 3 ? negative_digit_weights<2>(i) : pairs_are_fine ? 0xDD00DD00u : 0xDD00D400u;  // -2^6 * 5
}

// Of n pairs of fp16, each half; a NaN stays one.
template <int n>
LOGQUANT_DEVICE uint32_t max_of(const uint32_t* v) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    return ptx::max_nan_f16x2(max_of<n / 2>(v), max_of<n - n / 2>(v + n / 2));
  }
}

// Over the lanes with the same t: of accumulators whose rows are tokens, over the tokens.
LOGQUANT_DEVICE float max_over_tokens(float x) {
  x = fmaxf(x, __shfl_xor_sync(ptx::kFullMask, x, 4));
  x = fmaxf(x, __shfl_xor_sync(ptx::kFullMask, x, 8));
  return fmaxf(x, __shfl_xor_sync(ptx::kFullMask, x, 16));
}

}  // namespace logquant::cuda::tensor
