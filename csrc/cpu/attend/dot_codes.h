// Integer dot products straight on packed codes: NR rows of int16 numbers (queries, or softmax weights) times codes of
// 2, 4 or 8 bits, in 32-bit sums.
//
// Lanes are tokens (of keys) or channels (of values), and a word of a lane runs along the axis that is summed: shifted
// and masked it is two int16 codes (format.h), which one instruction multiplies by a pair of a row's numbers, the same
// in every lane. A word is read once for all rows. tiled_dot.h has the same sums from matrix tiles.
//
// Instructions of AVX2 on vectors per page of 64 tokens and 128 channels of 2 bits, plain (16-bit parameters, no map),
// keys and values together, with 1 | 3 | 4 | 8 query rows:
//                                          1       3       4       8
//   multiplications of pairs            1024    3072    4096    8192
//   their additions                     1024    3072    4096    8192
//   shifts and masks of words           1408    1792    1792    1792
//   transposed words, folding, softmax,
//   rounding (about)                     800    1600    2000    3600
//   all                                 4300    9500   12000   21800
//   cycles a token, four pipes            17      37      47      85
//   measured, Zen 4 at 2.55 GHz           17      37      47      93
// (Broadcasts of pairs are loads alone.) So it is bound by the number of instructions, of which four go a cycle: with
// AVX-VNNI, which needs no additions, by the two pipes that multiply, 32 cycles a token with 4 rows.
#pragma once

#include "../params.h"
#include "prefetcher.h"
#include "rows.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

constexpr float kMaxInt16Code = 32639.0f;  // 0x7F7F: the low byte is a signed one, too (tiled_dot.h)

// Rounds `count` elements x(j) .. x(j + kLanes - 1) to int16 codes; returns the codes' sum, lane by lane. Of NaNs and
// infinities come any codes, so the sum may wrap.
template <class X>
LOGQUANT_INLINE I32 round_to_codes(int16_t* codes, int count, X&& x) {
  U32 sum = {};
  int j = 0;
  for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
    const I32 low = round_to_int(x(j)), high = round_to_int(x(j + kLanes));
    sum += bits_as<U32>(low) + bits_as<U32>(high);
    store_s16(codes + j, low, high);
  }
  if (j < count) {
    const I32 last = round_to_int(x(j));
    sum += bits_as<U32>(last);
    store_u16(reinterpret_cast<uint16_t*>(codes + j), last);
  }
  return bits_as<I32>(sum);
}

// How many accumulators a row has for each vector of lanes. With few rows, codes stay where they are in the word, and
// those of each place have a sum of their own: fewer shifts, and more additions that do not wait for each other.
template <int NR, int bits>
constexpr int kSumsPerVector = kAccumulators / (4 * NR) < 1          ? 1
                               : kAccumulators / (4 * NR) < 8 / bits ? kAccumulators / (4 * NR)
                                                                     : 8 / bits;

// The largest magnitude of an int16 code that cannot overflow the sums over count elements.
template <int NR, int bits>
constexpr float max_int16_code(int count) {
  constexpr int kLargest = static_cast<int>(code_mask(bits)) << (bits * (kSumsPerVector<NR, bits> - 1));
  const float max = 2147483520.0f / (static_cast<float>(count / kSumsPerVector<NR, bits>) * kLargest);
  return max < kMaxInt16Code ? max : kMaxInt16Code;
}

// Vectors of lanes in a dot_codes.
template <int NR>
constexpr int kDotVectors = kAccumulators / NR < 4 ? kAccumulators / NR : 4;

// The high digits of the last element, or the last pair, of each of four words, where they have codes of twice the bits
// (format.h); NoFineDigits: there are none.
struct NoFineDigits {
  static constexpr bool kAny = false;
};
template <int kVectors>
struct FineDigits {
  static constexpr bool kAny = true;

  FineDigits(const PageFormat& f, const int32_t* page, int c) : mask(fine_digits_mask(f)) {
    for (int k = 0; k < kVectors; ++k) digits[k] = fine_digits_at(f, page, c + k * kLanes);
  }

  // Of the k-th vector of lanes and word w, above low digits of which the last is at bit kLow of its half.
  template <int bits, int kLow>
  LOGQUANT_INLINE I32 above(int k, int w) const {
    constexpr int kDown = 8 - bits - kLow;
    return shift_right(load(digits[k]), kDown + bits * w) & shift_right(mask, kDown);
  }

  const char* digits[kVectors];
  I32 mask;
};

// Dot products with kVectors vectors of lanes, down `count` words of each lane, which lie `stride` words apart;
// finish(r, k, sum) takes the results. Between words it prefetches `lines` cache lines.
template <int NR, int bits, int kVectors, class Fine, class Finish>
LOGQUANT_INLINE void dot_codes(const int32_t* words, int count, int64_t stride, const int16_t* row_codes,
                               int codes_per_row, const Fine& fine, Prefetcher& next_page, int lines, Finish&& finish) {
  constexpr int kPairs = 16 / bits;  // pairs of elements in a word
  constexpr int kSums = kSumsPerVector<NR, bits>;
  const int32_t* const row_pairs = reinterpret_cast<const int32_t*>(row_codes);
  I32 sum[kSums][NR][kVectors] = {};
  const auto add_words = [&](int w) __attribute__((always_inline)) {
    next_page.fetch(lines);
    I32 x[kVectors];
    for (int k = 0; k < kVectors; ++k) x[k] = load(words + w * stride + k * kLanes);
    unroll<kPairs>([&](auto i) __attribute__((always_inline)) {
      constexpr int kPlace = i % kSums, kShift = bits * (i - kPlace);
      constexpr int kMask = static_cast<int>(lane_mask(bits)) << (bits * kPlace);
      I32 codes[kVectors];
      for (int k = 0; k < kVectors; ++k) {
        // Above the last pair there is nothing to mask.
        codes[k] = i == kPairs - 1 && kPlace == 0 ? shift_halves_right(x[k], kShift)
                   : kShift == 0                  ? x[k] & kMask
                                                  : shift_right(x[k], kShift) & kMask;
      }
      if constexpr (Fine::kAny && i == kPairs - 1) {
        for (int k = 0; k < kVectors; ++k) {
          codes[k] |= fine.template above<bits, bits * kPlace>(k, w);
        }
      }
      for (int r = 0; r < NR; ++r) {
        const I32 pair = splat(row_pairs[r * (codes_per_row / 2) + w * kPairs + i]);
        for (int k = 0; k < kVectors; ++k) sum[kPlace][r][k] = dot_pairs(sum[kPlace][r][k], codes[k], pair);
      }
    });
  };
  if constexpr (Fine::kAny) {
    unroll<4>(add_words);
  } else {
    for (int w = 0; w < count; ++w) add_words(w);
  }
  for (int r = 0; r < NR; ++r) {
    for (int k = 0; k < kVectors; ++k) {
      I32 total = sum[0][r][k];
      for (int place = 1; place < kSums; ++place) total += sum[place][r][k] >> (bits * place);
      finish(r, k, to_float(total));
    }
  }
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
