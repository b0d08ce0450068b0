// The page: G consecutive evicted tokens of one KV head, self-contained and contiguous.
//
// Nothing else in csrc/ knows a bit position or a section offset; logquant/format.py mirrors this file.
// All words are 32-bit, little-endian. Format version 2, sections in this order:
//
//   part          shape in words        word
//   key codes     [G][C*b/32]           32/b consecutive columns of one token
//   key params    [2][D/2]              planar: fp16 scale[D], then fp16 zero[D], of a channel over the page's tokens
//                 or [2][D/4]           8 bits: scale byte[D], then zero byte[D]
//   value codes   [G*b/32][Dv]          32/b consecutive tokens of one channel
//   value params  [2][Dv/Gv][G/2]       planar: fp16 scale[Dv/Gv][G], then fp16 zero, of a token over Gv channels
//                 or [Dv/Gv][G/4]       8 bits: scale byte[Dv/Gv][G]
//   fine digits   [Dv/16/n][16]         (with fine values) those of n channels: c, c + 16, ...; n = 16 / fine values
//
// Every word runs along the axis that attention sums over. With element e of a word at bit_position(b, e), the
// expression (word >> b*i) & lane_mask(b) yields elements 2i and 2i+1 as two 16-bit lanes: a half2 operand of
// mma.m16n8k16, or an int16 pair for vpmaddwd, vpdpwssd and smlal. With byte_mask(b) it yields four bytes for tdpbsud:
// elements 2i, 2i + n, 2i + 1 and 2i + n + 1, where half a word holds n of them.
//
// Key columns: a KV head's D key channels are stored as C columns of b-bit digits. A channel with n columns holds one
// code of b*n bits, split into n digits of weight 2^(b*i); a channel without columns keeps only its mean over the page
// (in its zero). The column map says which channel and digit a column holds; without a map, C = D and column c is
// channel c.
//
// 8-bit parameters: a scale byte e stands for 2^((e - 160) / 8), by scale_bits(). Byte 255 marks a group that holds a
// NaN or an infinity: its scale counts as 0, its zero as NaN.
//   * Keys: the scale is that of the two highest bits of a channel's code: the code's own is scale / 2^(b*n - 2), and
//     digit i counts scale * 2^(b*(i-n) + 2). The zero byte (signed) counts eighths of the stored scale.
//   * Values are rotated before they are quantised: blocks of hadamard_block() channels become their orthonormal
//     Walsh-Hadamard transform, which is its own inverse. Code c stands for scale * (c - (2^b - 1) / 2).
//
// Fine values: the last token, or the last two, of every word of value codes have values of 2b = 4 bits: 4 or 8 of a
// page. The words above hold the low digits of their codes, the fine digits are the high ones, one or two of each row
// of words. A channel's lie in one byte of a word, or (8 fine values) in two, those of the last tokens in the upper
// half. So the low digits of a fine pair are the highest bits of both halves of a word; shifted by eight they are next
// to the byte into which one byte permutation brings the high digits, and together are one code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LOGQUANT_HOST_DEVICE __host__ __device__
// Device code sees no array of constants but one in its constant memory, which host code does not see.
#define LOGQUANT_TABLE static __constant__ constexpr
#define LOGQUANT_TABLE_READER __device__
#else
#define LOGQUANT_HOST_DEVICE
#define LOGQUANT_TABLE inline constexpr
#define LOGQUANT_TABLE_READER
#endif

namespace logquant {

inline constexpr int kFormatVersion = 2;
inline constexpr int kWordBits = 32;
inline constexpr int kMaxHeadDim = 1024;
// A channel's code, all its columns together.
inline constexpr int kMaxCodeBits = 8;
// Scales and zeros saturate here, the largest finite fp16.
inline constexpr float kParamMax = 65504.0f;
// Stored as the zero of a group that holds a NaN or an infinity, so that attention over it returns NaN.
inline constexpr uint16_t kPoison = 0x7E00;
// Largest block of channels that are rotated together.
inline constexpr int kMaxHadamard = 64;
// block^-1/2, of blocks of 16, 32 and 64.
LOGQUANT_HOST_DEVICE constexpr float hadamard_factor(int block) {
  return block == 64 ? 0.125f : block == 16 ? 0.25f : 0.17677669529663687f;
}

// Scale bytes. The tables hold fraction bits of floats: of 2^(i/8), and of 2^((i + 1/2)/8).
inline constexpr int kScaleExponent = 107;  // of scale byte 0, biased: 2^-20
inline constexpr int kScaleMax = 254;
inline constexpr int kPoisonScale = 255;
LOGQUANT_TABLE int32_t kScaleEighths[8] = {0, 759234, 1587184, 2490071, 3474675, 4548394, 5719293, 6996167};
LOGQUANT_TABLE int32_t kScaleMiddles[8] = {371395, 1164243, 2028850, 2971711, 3999908, 5121164, 6343903, 7677309};
// The float that a scale byte up to kScaleMax stands for, as bits.
LOGQUANT_TABLE_READER constexpr uint32_t scale_bits(uint32_t byte) {
  return ((byte >> 3) + kScaleExponent) << 23 | static_cast<uint32_t>(kScaleEighths[byte & 7]);
}
// Zeros of keys are stored in these units, times the scale.
inline constexpr float kZeroUnit = 0.125f;
inline constexpr int kZeroMax = 127;

LOGQUANT_HOST_DEVICE constexpr int elements_per_word(int bits) { return kWordBits / bits; }
LOGQUANT_HOST_DEVICE constexpr int bit_position(int bits, int element) {
  return bits * (element / 2) + 16 * (element % 2);
}
LOGQUANT_HOST_DEVICE constexpr uint32_t code_mask(int bits) { return (1u << bits) - 1u; }
LOGQUANT_HOST_DEVICE constexpr uint32_t lane_mask(int bits) { return code_mask(bits) * 0x00010001u; }
LOGQUANT_HOST_DEVICE constexpr uint32_t byte_mask(int bits) { return code_mask(bits) * 0x01010101u; }
LOGQUANT_HOST_DEVICE constexpr uint32_t extract(uint32_t word, int bits, int element) {
  return (word >> bit_position(bits, element)) & code_mask(bits);
}
LOGQUANT_HOST_DEVICE constexpr uint32_t place(uint32_t code, int bits, int element) {
  return code << bit_position(bits, element);
}

// An entry of the column map (int16): the channel a column belongs to and which digit of the channel's code it holds.
template <class Int>  // or a vector of them
LOGQUANT_HOST_DEVICE constexpr Int column_channel(Int entry) {
  return entry >> 2;
}
template <class Int>
LOGQUANT_HOST_DEVICE constexpr Int column_digit(Int entry) {
  return entry & 3;
}

struct PageFormat {
  int head_dim = 0;     // D, channels of a key
  int value_dim = 0;    // Dv, channels of a value
  int page_tokens = 0;  // G
  int key_bits = 0;
  int value_bits = 0;
  int key_columns = 0;  // C
  int value_group = 0;  // Gv
  int key_param_bits = 16;
  int value_param_bits = 16;
  int fine_values = 0;  // tokens whose values have twice the bits

  // Digit `digit` of a channel with `columns` columns weighs 2^digit_exponent stored scales.
  template <class Int>  // or vectors of them
  LOGQUANT_HOST_DEVICE constexpr Int digit_exponent(Int digit, Int columns) const {
    const Int exponent = key_bits * digit;
    return key_param_bits == 16 ? exponent : exponent - key_bits * columns + 2;
  }

  LOGQUANT_HOST_DEVICE constexpr int key_code_words() const { return key_columns * key_bits / kWordBits; }
  LOGQUANT_HOST_DEVICE constexpr int value_code_rows() const { return page_tokens * value_bits / kWordBits; }
  LOGQUANT_HOST_DEVICE constexpr int value_groups() const { return value_dim / value_group; }
  // Channels of a value that are rotated together: a power of two that divides the group; 1 with 16-bit parameters.
  LOGQUANT_HOST_DEVICE constexpr int hadamard_block() const {
    if (value_param_bits == 16) return 1;
    const int power = value_group & -value_group;
    return power < kMaxHadamard ? power : kMaxHadamard;
  }

  // Section offsets, in words from the start of the page.
  LOGQUANT_HOST_DEVICE constexpr int key_codes() const { return 0; }
  LOGQUANT_HOST_DEVICE constexpr int key_params() const { return page_tokens * key_code_words(); }
  LOGQUANT_HOST_DEVICE constexpr int value_codes() const { return key_params() + head_dim * key_param_bits / 16; }
  LOGQUANT_HOST_DEVICE constexpr int value_params() const { return value_codes() + value_code_rows() * value_dim; }
  LOGQUANT_HOST_DEVICE constexpr int fine_digits() const {
    return value_params() + value_groups() * page_tokens / (value_param_bits == 8 ? 4 : 1);
  }
  LOGQUANT_HOST_DEVICE constexpr int words() const { return fine_digits() + fine_values * value_dim / 16; }

  // Fine values: of a token; the word of a channel's fine digits, the lower byte that it has of it, and where in the
  // word those of a token lie.
  LOGQUANT_HOST_DEVICE constexpr bool is_fine(int token) const { return token % 16 >= 16 - fine_values / 4; }
  LOGQUANT_HOST_DEVICE constexpr int value_code_bits(int token) const {
    return is_fine(token) ? 2 * value_bits : value_bits;
  }
  LOGQUANT_HOST_DEVICE constexpr int fine_word(int channel) const {
    return fine_digits() + channel / 16 / fine_channels() * 16 + channel % 16;
  }
  LOGQUANT_HOST_DEVICE constexpr int fine_channels() const { return 16 / fine_values; }
  LOGQUANT_HOST_DEVICE constexpr int fine_byte(int channel) const { return channel / 16 % fine_channels(); }
  LOGQUANT_HOST_DEVICE constexpr int fine_position(int channel, int token) const {
    return 8 * fine_byte(channel) + 2 * (token / 16) + (fine_values == 8 ? 16 * (token % 2) : 0);
  }

  // Elements (fp16, or bytes of keys) from the start of a parameter section to its zeros.
  LOGQUANT_HOST_DEVICE constexpr int key_zeros() const { return head_dim; }
  LOGQUANT_HOST_DEVICE constexpr int value_zeros() const { return value_groups() * page_tokens; }

  friend constexpr bool operator==(const PageFormat&, const PageFormat&) = default;
};

// The order of a format that travels as a list of integers through operator schemas and files:
// version, head_dim, value_dim, page_tokens, key_bits, value_bits, key_columns, value_group,
// key_param_bits, value_param_bits, fine_values.
inline constexpr int kFormatFields = 11;

// nullptr if the numbers describe a valid page, else what is wrong.
constexpr const char* format_error(const PageFormat& f) {
  const auto bits_ok = [](int b) { return b == 2 || b == 4 || b == 8; };
  const auto dim_ok = [](int d) { return d >= 16 && d <= kMaxHeadDim && d % 16 == 0; };
  if (!dim_ok(f.head_dim)) return "head_dim must be a multiple of 16 between 16 and 1024";
  if (!dim_ok(f.value_dim)) return "value_dim must be a multiple of 16 between 16 and 1024";
  if (f.page_tokens != 32 && f.page_tokens != 64 && f.page_tokens != 128) return "page_tokens must be 32, 64 or 128";
  if (!bits_ok(f.key_bits)) return "key_bits must be 2, 4 or 8";
  if (!bits_ok(f.value_bits)) return "value_bits must be 2, 4 or 8";
  if (f.key_columns < 16 || f.key_columns % 16 != 0) return "key_columns must be a positive multiple of 16";
  if (f.key_columns > f.head_dim * (kMaxCodeBits / f.key_bits))
    return "key_columns must leave every channel a code of at most 8 bits";
  if (f.value_group < 16 || f.value_group % 16 != 0 || f.value_dim % f.value_group != 0)
    return "value_group must be a multiple of 16 that divides value_dim";
  if (f.key_param_bits != 8 && f.key_param_bits != 16) return "key_param_bits must be 8 or 16";
  if (f.value_param_bits != 8 && f.value_param_bits != 16) return "value_param_bits must be 8 or 16";
  if (f.fine_values != 0 && f.fine_values != 4 && f.fine_values != 8) return "fine_values must be 0, 4 or 8";
  const bool can_be_fine =
      f.page_tokens == 64 && f.value_bits == 2 && f.value_param_bits == 8 && f.value_group % 32 == 0;
  if (f.fine_values != 0 && !can_be_fine)
    return "fine_values must be 0 but with page_tokens 64, value_bits 2, value_param_bits 8 and a value_group that is "
           "a multiple of 32";
  if (f.fine_values == 4 && f.value_dim % 64 != 0)
    return "fine_values must be 0 or 8 unless value_dim is a multiple of 64";
  return nullptr;
}

}  // namespace logquant
