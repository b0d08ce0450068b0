// Attention over the window: exact tokens, in blocks of AttendPlan::kWindowBlock.
//
// Lanes are channels. Scores: several rows and tokens at a time have sums in registers, which are reduced across the
// lanes at the end; values: sums of all rows stay in registers down a block's tokens. Each key and value is read once
// for all rows, straight from the window.
#pragma once

#include "attention.h"
#include "dot_codes.h"
#include "masks.h"
#include "queries.h"
#include "rows.h"
#include "softmax.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

// Sums of window_scores, which has fewer operands than dot_codes; AVX2 has 16 registers for all.
constexpr int kWindowSums = kLanes == 8 ? 8 : 16;
template <int NR>
constexpr int kWindowTokens = kWindowSums / NR < 4 ? kWindowSums / NR : 4;  // at a time

// With pairs, of bfloat16, q is multiplied as it came, and the scores by `factor`.
template <int NR, Dtype dtype, bool pairs>
LOGQUANT_INLINE void window_scores(const PageFormat& f, const void* k, int64_t stride, int tokens, float factor,
                                   const Queries& queries, float* scores) {
  constexpr int kBlock = kWindowTokens<NR>, kTotals = NR * kBlock, kStep = reduced_at_once(kTotals);
  constexpr int kParts = (kTotals + kStep - 1) / kStep;
  const int dim = f.head_dim;
  for (int t = 0; t < tokens; t += kBlock) {
    F32 sum[kParts * kStep];
    unroll<kParts * kStep>([&](auto i) __attribute__((always_inline)) { sum[i] = splat(0.0f); });
    // Past the last token the last one is read again.
    int64_t rows[kBlock];
    for (int k = 0; k < kBlock; ++k) rows[k] = smaller(t + k, tokens - 1) * stride;
    const auto add = [&](auto&& x_at, auto&& q_at, auto&& multiply_add) __attribute__((always_inline)) {
      decltype(x_at(0)) x[kBlock];
      unroll<kBlock>([&](auto i) __attribute__((always_inline)) { x[i] = x_at(rows[i]); });
      unroll<NR>([&](auto r) __attribute__((always_inline)) {
        const auto q = q_at(r * dim);
        unroll<kBlock>([&](auto i) __attribute__((always_inline)) {
          F32& to = sum[r * kBlock + i];
          to = multiply_add(to, q, x[i]);
        });
      });
    };
    if constexpr (pairs) {
      const int16_t* const keys = static_cast<const int16_t*>(k);
      const auto both = [](const int16_t* p) __attribute__((always_inline)) { return load_pairs(p); };
      const auto with_zeros = [](const int16_t* p) __attribute__((always_inline)) {
        return load_u16(reinterpret_cast<const uint16_t*>(p));
      };
      const auto add_pairs = [&](auto&& pairs_at, int c) __attribute__((always_inline)) {
        add([&](int64_t row) __attribute__((always_inline)) { return pairs_at(keys + row + c); },
            [&](int row) __attribute__((always_inline)) { return pairs_at(queries.q_pairs + row + c); }, dot_bfloat16);
      };
      int c = 0;
      for (; c + 2 * kLanes <= dim; c += 2 * kLanes) add_pairs(both, c);
      if (c < dim) add_pairs(with_zeros, c);
    } else {
      for (int c = 0; c < dim; c += kLanes) {
        add([&](int64_t row) __attribute__((always_inline)) { return load_elements<dtype>(k, row + c); },
            [&](int row) __attribute__((always_inline)) { return load(queries.q + row + c); },
            [](F32 to, F32 q, F32 x) __attribute__((always_inline)) { return fma(q, x, to); });
      }
    }
    unroll<kParts>([&](auto part) __attribute__((always_inline)) {
      F32 total = reduce_lanes<kStep>(sum + part * kStep, Add{});
      if (pairs) total *= splat(factor);
      float totals[kLanes];
      store(totals, total);
      unroll<kStep / kBlock>([&](auto i) __attribute__((always_inline)) {
        constexpr int kRow = part * (kStep / kBlock) + i;
        if constexpr (kRow < NR) {
          __builtin_memcpy(scores + kRow * kUnitTokens + t, totals + i * kBlock, sizeof(float) * kBlock);
        }
      });
    });
  }
}

template <int NR, Dtype dtype, bool biased>
LOGQUANT_INLINE void add_window_values(const PageFormat& f, const void* v, int64_t stride, int tokens,
                                       const float* weights, float* sums) {
  constexpr int kBlock = kDotVectors<NR>;
  const auto add = [&](auto block, int c) __attribute__((always_inline)) {
    F32 sum[NR][block];
    for (int r = 0; r < NR; ++r) {
      for (int k = 0; k < block; ++k) sum[r][k] = load(sums + r * f.value_dim + c + k * kLanes);
    }
    for (int t = 0; t < tokens; ++t) {
      F32 x[block];
      for (int k = 0; k < block; ++k) x[k] = load_elements<dtype>(v, t * stride + c + k * kLanes);
      for (int r = 0; r < NR; ++r) {
        const float weight = weights[r * kUnitTokens + t];
        if (biased && weight == 0.0f) continue;  // not seen: its value may be a NaN
        for (int k = 0; k < block; ++k) sum[r][k] = fma(splat(weight), x[k], sum[r][k]);
      }
    }
    for (int r = 0; r < NR; ++r) {
      for (int k = 0; k < block; ++k) store(sums + r * f.value_dim + c + k * kLanes, sum[r][k]);
    }
  };
  int c = 0;
  for (; c + kBlock * kLanes <= f.value_dim; c += kBlock * kLanes) add(std::integral_constant<int, kBlock>{}, c);
  for (; c < f.value_dim; c += kLanes) add(std::integral_constant<int, 1>{}, c);
}

// x[r][first .. end - 1] = -infinity
__attribute__((noinline)) void hide(float* x, int rows, int first, int end) {
  for (int r = 0; r < rows; ++r) {
    for (int t = first; t < end; ++t) x[r * kUnitTokens + t] = -kInfinity;
  }
}

// Adds the window's tokens first .. end - 1, whose scores are kept if anybody asks what they are given. By value and
// not inlined, as add_pages.
template <int NR, Dtype dtype>
__attribute__((noinline)) void add_window(const AttendArgs& args, TaskRows rows, int64_t first, int64_t end,
                                          Queries queries, Scores scores, Accumulator acc, WindowScores kept) {
  const PageFormat f = args.format;
  const bool has_bias = args.has_bias();
  const auto head = [&](const Tokens& x) __attribute__((always_inline)) {
    const int64_t offset = rows.batch * x.batch_stride + rows.kv_head * x.head_stride;
    return static_cast<const char*>(x.data) + offset * element_bytes(dtype);
  };
  const char *const keys = head(args.window_k), *const values = head(args.window_v);
  const int64_t key_stride = args.window_k.token_stride, value_stride = args.window_v.token_stride;
  for (int64_t start = first; start < end; start += AttendPlan::kWindowBlock) {
    const int tokens = static_cast<int>(smaller(AttendPlan::kWindowBlock, end - start));
    const int padded = (tokens + kLanes - 1) / kLanes * kLanes;
    const auto score = [&](auto pairs) __attribute__((always_inline)) {
      window_scores<NR, dtype, pairs>(f, keys + start * key_stride * element_bytes(dtype), key_stride, tokens,
                                      score_factor(args), queries, scores.weights);
    };
    constexpr bool kMayPair = kHasBFloat16Dots && dtype == Dtype::kBFloat16;
    if (kMayPair && args.q.dtype == Dtype::kBFloat16) {
      score(std::bool_constant<kMayPair>{});
    } else {
      score(std::false_type{});
    }
    if (tokens < padded) hide(scores.weights, NR, tokens, padded);
    const int64_t first_slot = args.page_count * f.page_tokens + start;
    const bool shows_padding = args.softcap > 0.0f && tokens < padded;  // what hides it would become -softcap
    const bool biased = (has_bias && load_bias(args, rows, first_slot, tokens, scores.bias)) || shows_padding;
    if (biased) hide(scores.bias, NR, tokens, padded);
    softmax<NR>(args, padded, biased, scores, acc, [&](int r, int t, F32 x) __attribute__((always_inline)) {
      if (kept.data != nullptr && r < rows.rows) store(kept.row(r) + start + t, x);
    });
    const char* const block = values + start * value_stride * element_bytes(dtype);
    if (biased) {
      add_window_values<NR, dtype, true>(f, block, value_stride, tokens, scores.weights, acc.sums);
    } else {
      add_window_values<NR, dtype, false>(f, block, value_stride, tokens, scores.weights, acc.sums);
    }
  }
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
