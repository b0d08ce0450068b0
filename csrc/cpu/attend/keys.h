// Scores of a page's packed keys.
//
// A page has its key codes token by token, [G][words]; here lanes are tokens, so the words are transposed to [words][G]
// in scratch memory, once for all rows (1 KiB for 64 tokens of 128 channels of 2 bits); then each row's folded query
// (queries.h) is multiplied down the words (dot_codes.h).
#pragma once

#include "dot_codes.h"
#include "queries.h"
#include "rows.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

// Every M-th lane of M vectors, from lane U on; M odd.
template <int M, int U, int... lane>
LOGQUANT_INLINE I32 every_mth(const I32* v, std::integer_sequence<int, lane...>) {
  I32 x = v[0];
  unroll<(M + 1) / 2>([&](auto pair) __attribute__((always_inline)) {
    constexpr int kFirst = 2 * pair * kLanes, kSecond = 2 * pair + 1 < M ? 2 * pair + 1 : 2 * pair;
    constexpr auto kFrom = [](int i) { return i * M + U - kFirst; };
    constexpr auto kHere = [](int i) { return i * M + U >= kFirst && i * M + U < kFirst + 2 * kLanes; };
    const I32 picked = __builtin_shufflevector(v[2 * pair], v[kSecond], (kHere(lane) ? kFrom(lane) : -1)...);
    const I32 here = {(kHere(lane) ? -1 : 0)...};
    x = pair == 0 ? picked : select(here, picked, x);
  });
  return x;
}

#if defined(LOGQUANT_AVX2)
// [G][kWords] words to [kWords][G], kWords >= 4: four words of eight tokens at a time, half as many instructions as
// below need. Words that are left over are written together with some of the four before them, again.
template <int kWords>
LOGQUANT_INLINE void transpose_by_four(const int32_t* in, int32_t* out, int tokens) {
  const auto four = [&](int t, int w) __attribute__((always_inline)) {
    const auto row = [&](int i) __attribute__((always_inline)) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + (t + i) * kWords + w));
    };
    const auto rows = [&](int i) __attribute__((always_inline)) { return _mm256_set_m128i(row(i + 4), row(i)); };
    const __m256i low01 = _mm256_unpacklo_epi32(rows(0), rows(1)), high01 = _mm256_unpackhi_epi32(rows(0), rows(1));
    const __m256i low23 = _mm256_unpacklo_epi32(rows(2), rows(3)), high23 = _mm256_unpackhi_epi32(rows(2), rows(3));
    int32_t* const to = out + w * tokens + t;
    store(to, bits_as<I32>(_mm256_unpacklo_epi64(low01, low23)));
    store(to + tokens, bits_as<I32>(_mm256_unpackhi_epi64(low01, low23)));
    store(to + 2 * tokens, bits_as<I32>(_mm256_unpacklo_epi64(high01, high23)));
    store(to + 3 * tokens, bits_as<I32>(_mm256_unpackhi_epi64(high01, high23)));
  };
  for (int t = 0; t < tokens; t += kLanes) {
    for (int w = 0; w + 4 <= kWords; w += 4) four(t, w);
    if constexpr (kWords % 4 != 0) four(t, kWords - 4);
  }
}
#endif

// [G][M * N] words to [M * N][G], N a power of two, M odd: log2(N) rounds of separating even from odd elements, then
// every M-th.
template <int M, int N>
LOGQUANT_INLINE void transpose_words(const int32_t* in, int32_t* out, int tokens) {
#if defined(LOGQUANT_AVX2)
  return transpose_by_four<M * N>(in, out, tokens);
#endif
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  constexpr int kWords = M * N;
  for (int t = 0; t < tokens; t += kLanes) {
    I32 v[kWords], next[kWords];
    for (int i = 0; i < kWords; ++i) v[i] = load(in + t * kWords + i * kLanes);
    for (int round = 1; round < N; round *= 2) {
      for (int i = 0; i < kWords / 2; ++i) {
        next[i] = every_second<0>(v[2 * i], v[2 * i + 1], lanes);
        next[kWords / 2 + i] = every_second<1>(v[2 * i], v[2 * i + 1], lanes);
      }
      for (int i = 0; i < kWords; ++i) v[i] = next[i];
    }
    unroll<kWords>([&](auto w) __attribute__((always_inline)) {
      constexpr int kHigh = w / N, kLow = w % N;
      store(out + w * tokens + t, every_mth<M, kHigh>(v + kLow * M, lanes));
    });
  }
}

// The same for any number of words: squares of kLanes tokens by kLanes words, of which those past the last are dropped
// (a page goes on after its key codes).
LOGQUANT_INLINE void transpose_any(const int32_t* in, int32_t* out, int count, int tokens) {
  for (int t = 0; t < tokens; t += kLanes) {
    for (int w0 = 0; w0 < count; w0 += kLanes) {
      I32 v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = load(in + (t + i) * count + w0);
      transpose(v);
      const int words = count - w0 < kLanes ? count - w0 : kLanes;
      for (int w = 0; w < words; ++w) store(out + (w0 + w) * tokens + t, v[w]);
    }
  }
}

// Not inlined: it depends on nothing that add_pages is a template of, whose copies would each compile it again.
__attribute__((noinline)) void load_key_words(const PageFormat& f, const int32_t* page, int32_t* out) {
  const int32_t* const in = page + f.key_codes();
  const int count = f.key_code_words(), tokens = f.page_tokens;
  switch (count) {
    case 4:
      return transpose_words<1, 4>(in, out, tokens);
    case 5:
      return transpose_words<5, 1>(in, out, tokens);
    case 6:
      return transpose_words<3, 2>(in, out, tokens);
    case 7:
      return transpose_words<7, 1>(in, out, tokens);
    case 8:
      return transpose_words<1, 8>(in, out, tokens);
    case 9:
      return transpose_words<9, 1>(in, out, tokens);
    case 10:
      return transpose_words<5, 2>(in, out, tokens);
    case 12:
      return transpose_words<3, 4>(in, out, tokens);
    case 16:
      return transpose_words<1, 16>(in, out, tokens);
    case 20:
      return transpose_words<5, 4>(in, out, tokens);
    default:
      return transpose_any(in, out, count, tokens);
  }
}

// scores[r][t] = score_scale[r] * (q_codes[r] . codes[t]) + score_zero[r], in base 2; key_words: of load_key_words.
template <int NR, int bits>
LOGQUANT_INLINE void key_scores(const PageFormat& f, const int32_t* key_words, const Queries& queries, float* scores,
                                Prefetcher& next_page, int lines) {
  const auto block = [&](auto vectors, int t) __attribute__((always_inline)) {
    dot_codes<NR, bits, vectors>(key_words + t, f.key_code_words(), f.page_tokens, queries.q_codes, f.key_columns,
                                 NoFineDigits{}, next_page, lines,
                                 [&](int r, int k, F32 sum) __attribute__((always_inline)) {
                                   store(scores + r * kUnitTokens + t + k * kLanes,
                                         fma(sum, splat(queries.score_scale[r]), splat(queries.score_zero[r])));
                                 });
  };
  int t = 0;
  for (; t + kDotVectors<NR> * kLanes <= f.page_tokens; t += kDotVectors<NR> * kLanes) {
    block(std::integral_constant<int, kDotVectors<NR>>{}, t);
  }
  if (t < f.page_tokens) block(std::integral_constant<int, 2>{}, t);  // 32 tokens in vectors of 16
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
