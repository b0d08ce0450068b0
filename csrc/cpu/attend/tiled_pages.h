// Attention over packed pages as in pages.h, with the same sums, by matrix tiles (tiled_dot.h).
//
// A tile load waits until what was stored where it reads has left the store buffer, and the sums come out of a long
// pipeline. So something else is done in between: a page's values are unpacked while its scores are summed; the next
// page's keys, between writing the bytes of weights and multiplying them; and values are summed while the next page's
// scales are folded into q.
#pragma once

#include "pages.h"
#include "tiled_dot.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

// The two dot products of a page.
template <int NR, bool = kTiled<NR>>
struct PageTiles {
  PageTiles(const PageFormat&, Arena&) {}
};

#if defined(LOGQUANT_TILES)
template <int NR>
struct PageTiles<NR, true> {
  TiledDot<NR> keys, values;

  PageTiles(const PageFormat& f, Arena& arena)
      : keys(f.key_bits, f.key_code_words(), f.page_tokens, 1, arena),
        values(f.value_bits, f.value_code_rows(), f.value_dim, f.value_groups(), arena) {}

  static void start() {
    static constexpr TileConfig kConfig = TiledDot<NR>::config();
    tile_configure(kConfig);
  }
  static void stop() { tile_release(); }
};
#endif

// scores as by key_scores
template <int NR>
LOGQUANT_INLINE void tiled_key_scores(const PageFormat& f, const PageTiles<NR>& tiles, const Queries& queries,
                                      float* scores) {
  for (int r = 0; r < NR; ++r) {
    float* const row = scores + r * kUnitTokens;
    const F32 scale = splat(queries.score_scale[r]), zero = splat(queries.score_zero[r]);
    tiles.keys.sums(r, 0, f.page_tokens,
                    [&](int64_t t, F32 sum) __attribute__((always_inline)) { store(row + t, fma(sum, scale, zero)); });
  }
}

// sums as by add_values
template <int NR>
LOGQUANT_INLINE void add_tiled_values(const PageFormat& f, const PageTiles<NR>& tiles, const FoldedWeights& folded,
                                      const Accumulator& acc) {
  for (int group = 0; group < f.value_groups(); ++group) {
    const float* const scale = folded.scale + group * FoldedWeights::kScales;
    const int first = group * f.value_group, last = first + f.value_group;
    for (int r = 0; r < NR; ++r) {
      float* const row = acc.sums + r * f.value_dim;
      const F32 factor = splat(scale[r]);
      tiles.values.sums(r, first, last, [&](int64_t c, F32 sum) __attribute__((always_inline)) {
        store(row + c, fma(sum, factor, load(row + c)));
      });
    }
  }
}

// As add_pages.
template <int NR, bool specialized>
__attribute__((noinline)) void add_tiled_pages(const AttendArgs& args, TaskRows rows, int64_t first, int64_t end,
                                               int64_t page_count, Queries queries, int32_t* key_words, Scores scores,
                                               FoldedWeights folded, Accumulator acc, PageTiles<NR> tiles) {
  if (first >= end) return;
  const PageFormat f = with_known_sizes<specialized>(args.format);
  const bool has_map = args.key_map.data != nullptr, has_bias = args.has_bias();
  const float max_code = max_query_code<NR>(f);
  const HeadPages pages(args, rows);
  Prefetcher next_page;  // the page after next: the next one's keys are unpacked by the end of a page
  const auto fetch_line = [&]() __attribute__((always_inline)) { next_page.fetch(1); };
  const auto unpack_keys = [&](const int32_t* page) __attribute__((always_inline)) {
    load_key_words(f, page, key_words);
    tiles.keys.unpack(key_words, fetch_line);
  };
  tiles.start();
  unpack_keys(pages.at(first));
  for (int64_t p = first; p < end; ++p) {
    const int32_t* const page = pages.at(p);
    next_page = p + 2 < page_count ? Prefetcher(pages.at(p + 2), f.words()) : Prefetcher();
    next_page.fetch(4 * (f.words() - page_code_words(f)) / kCacheLine);  // then one for each line of codes
    with_bits(f.key_bits, [&](auto bits) __attribute__((always_inline)) {
      fold_queries<NR, bits>(f, page, has_map, max_code, queries);
    });
    tiles.keys.split(queries.q_codes);
    if (p > first) add_tiled_values(f, tiles, folded, acc);  // the previous page's
    tiles.keys.multiply();
    tiles.values.unpack_values(f, page, fetch_line);
    tiled_key_scores(f, tiles, queries, scores.weights);
    const bool biased = has_bias && load_bias(args, rows, p * f.page_tokens, f.page_tokens, scores.bias);
    softmax<NR>(args, f.page_tokens, biased, scores, acc);
    with_bits(f.value_bits, [&](auto bits) __attribute__((always_inline)) {
      fold_weights<NR, bits>(f, page, biased, scores.weights, folded, acc);
    });
    tiles.values.split(folded.codes);
    if (p + 1 < end) unpack_keys(pages.at(p + 1));
    tiles.values.multiply();
  }
  add_tiled_values(f, tiles, folded, acc);
  tiles.stop();
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
