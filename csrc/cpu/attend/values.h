// Sums of a page's packed values, weighted by softmax.
//
// As for keys, scales are folded into the other operand first: softmax weights times value scales become int16 codes,
// with one scale per row and value group; zeros add one number per row and group. Lanes are channels, and the words of
// a page lie as they are needed: they are read in place, once for all rows. Sums stay in scratch memory.
#pragma once

#include "../params.h"
#include "dot_codes.h"
#include "rows.h"
#include "softmax.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

// Softmax weights times a page's value scales.
struct FoldedWeights {
  static constexpr int kScales = kMaxRows + kLanes;  // of a group: whole vectors are stored

  int16_t* codes;   // [groups][NR][G]
  float* scale;     // [groups][kScales]
  float* products;  // [NR][G]: of one group, before they are rounded

  FoldedWeights(const PageFormat& f, int padded_rows, Arena& arena) {
    const int64_t groups = f.value_groups();
    codes = arena.take<int16_t>(groups * padded_rows * f.page_tokens);
    scale = arena.take<float>(groups * kScales);
    products = arena.take<float>(padded_rows * f.page_tokens);
  }
};

// The sum of the codes of fine tokens, the last or the last two of every 16, times what the middle of a fine code is
// above that of another, in units of the latter.
template <int bits>
LOGQUANT_INLINE I32 excess_of_fine(const int16_t* codes, int tokens, int fine_values) {
  constexpr int kExcess = (code_mask(2 * bits) - code_mask(bits)) / code_mask(bits);
  I32 sum = splat(0), last = splat(0);
  last[kLanes - 1] = fine_values == 8 ? -1 : -1 << 16;
  for (int t = 16; t <= tokens; t += 16) {
    const I32 pairs = load(reinterpret_cast<const int32_t*>(codes + t) - kLanes) & last;
    sum = dot_pairs(sum, pairs, splat(kExcess << 16 | kExcess));
  }
  return sum;
}

// Folds the value scales of a group into the weights; sums up the zeros, and what rounding took, as for queries.
template <int NR, int bits>
LOGQUANT_INLINE void fold_group(const PageFormat& f, const int32_t* page, bool biased, int group, const float* weights,
                                const FoldedWeights& folded, const Accumulator& acc) {
  const int tokens = f.page_tokens, groups = f.value_groups();
  float* const scale = folded.scale + group * FoldedWeights::kScales;
  int16_t* const codes = folded.codes + group * NR * tokens;
  // 8-bit parameters have their zero where the middle of the codes stands for 0.
  const bool symmetric = f.value_param_bits == 8;
  F32 largest[NR] = {}, zero_sums[NR];
  for (int r = 0; r < NR; ++r) zero_sums[r] = load(acc.zero_sums + (r * groups + group) * kLanes);
  for (int t = 0; t < tokens; t += kLanes) {
    const auto [scale_t, zero_t] = value_params_at(f, page, group * tokens + t);
    const F32 middle = fma(scale_t, splat(0.5f * static_cast<float>(code_mask(bits))), zero_t);
    const bool counts = !symmetric || any_above(zero_t, splat(kInfinity));
    for (int r = 0; r < NR; ++r) {
      const F32 weight = load(weights + r * kUnitTokens + t);
      const F32 product = weight * scale_t;
      store(folded.products + r * tokens + t, product);
      largest[r] = max(largest[r], product);
      if (!counts) continue;
      // A token that the row does not see must not poison it with a NaN.
      const F32 seen = biased ? select(weight == splat(0.0f), splat(0.0f), middle) : middle;
      zero_sums[r] = fma(weight, seen, zero_sums[r]);
    }
  }
  float inverse[FoldedWeights::kScales];
  reduce_rows<NR>(largest, Max{}, [&](int r, F32 tops) {
    tops += 1e-30f;
    store(scale + r, tops * (1.0f / kMaxInt16Code));
    store(inverse + r, kMaxInt16Code / tops);
  });
  for (int r = 0; r < NR; ++r) {
    const F32 factor = splat(inverse[r]);
    I32 sum = round_to_codes(codes + r * tokens, tokens, [&](int t) __attribute__((always_inline)) {
      return load(folded.products + r * tokens + t) * factor;
    });
    F32 middles = splat(0.5f * static_cast<float>(code_mask(bits)));
    if (f.fine_values > 0) {
      if constexpr (kLanes == 16) {
        middles = value_middles(f, 0);  // a lane's tokens are alike
      } else {
        sum += excess_of_fine<bits>(codes + r * tokens, tokens, f.fine_values);
      }
    }
    store(acc.zero_sums + (r * groups + group) * kLanes, fma(to_float(sum), middles * -scale[r], zero_sums[r]));
  }
}

// Every group is folded before the first is summed: they wait for their divisions together.
template <int NR, int bits>
LOGQUANT_INLINE void fold_weights(const PageFormat& f, const int32_t* page, bool biased, const float* weights,
                                  const FoldedWeights& folded, const Accumulator& acc) {
  for (int group = 0; group < f.value_groups(); ++group) {
    fold_group<NR, bits>(f, page, biased, group, weights, folded, acc);
  }
}

// sums[r][c] += scale[r] * (weight codes[r] . codes of channel c), group by group
template <int NR, int bits>
LOGQUANT_INLINE void add_values(const PageFormat& f, const int32_t* page, const FoldedWeights& folded,
                                const Accumulator& acc, Prefetcher& next_page, int lines) {
  for (int group = 0; group < f.value_groups(); ++group) {
    const float* const scale = folded.scale + group * FoldedWeights::kScales;
    const auto block = [&](auto vectors, int c) __attribute__((always_inline)) {
      const auto dot = [&](const auto& fine) __attribute__((always_inline)) {
        dot_codes<NR, bits, vectors>(page + f.value_codes() + c, f.value_code_rows(), f.value_dim,
                                     folded.codes + group * NR * f.page_tokens, f.page_tokens, fine, next_page, lines,
                                     [&](int r, int k, F32 sum) __attribute__((always_inline)) {
                                       float* const p = acc.sums + r * f.value_dim + c + k * kLanes;
                                       store(p, fma(sum, splat(scale[r]), load(p)));
                                     });
      };
      if constexpr (bits == 2) {
        if (f.fine_values > 0) return dot(FineDigits<vectors>(f, page, c));
      }
      dot(NoFineDigits{});
    };
    int c = group * f.value_group;
    const int end = c + f.value_group;
    for (; c + kDotVectors<NR> * kLanes <= end; c += kDotVectors<NR> * kLanes) {
      block(std::integral_constant<int, kDotVectors<NR>>{}, c);
    }
    for (; c < end; c += kLanes) block(std::integral_constant<int, 1>{}, c);
  }
}

// sums = sums + zeros, which are not there any longer.
LOGQUANT_INLINE void add_zeros(const PageFormat& f, int r, const Accumulator& acc) {
  float* const sums = acc.sums + r * f.value_dim;
  for (int g = 0; g < f.value_groups(); ++g) {
    float* const zero_sums = acc.zero_sums + (r * f.value_groups() + g) * kLanes;
    const F32 zeros = splat(reduce(load(zero_sums), Add{}));
    for (int c = g * f.value_group; c < (g + 1) * f.value_group; c += kLanes) store(sums + c, load(sums + c) + zeros);
    store(zero_sums, splat(0.0f));
  }
}

// Pages hold rotated values and the window does not: once a task's pages are summed, the sums are rotated back.
void rotate_back(const PageFormat& f, int padded_rows, const Accumulator& acc) {
  for (int r = 0; r < padded_rows; ++r) {
    add_zeros(f, r, acc);
    hadamard(acc.sums + r * f.value_dim, f.value_dim, f.hadamard_block());
  }
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
