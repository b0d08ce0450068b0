// The choice of pages from their scores (reference/choose_pages.py).
//
// A task is one query of one KV head: for each kind of scores, the votes of its query heads, and the pages with the
// most. Lanes are pages. The least vote that still wins is found bit by bit, by counting how many pages have as many:
// no page moves, and the processor has nothing to guess.
//
// Memory traffic: scores are read once, or twice where shares are too small for numbers. What ranks the pages, 4 bytes
// each, is read 32 times at most from the first- or second-level cache.

#include "choose_pages.h"

#include "simd.h"
#include "tasks.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

// Scores farther below the maximum than this count alike: two infinities would differ by NaN.
constexpr float kFar = -3e38f;
constexpr int32_t kLeast = INT32_MIN;  // the key of what cannot be chosen

// A KV head's query heads, and where their scores of `pages` pages are.
struct HeadScores {
  const float* first;
  int64_t stride, group, pages;  // stride: to the scores of the next query head

  LOGQUANT_INLINE const float* of(int64_t g) const { return first + g * stride; }
};

// Arrays of a number for each page and for what fills the last vector.
struct Workspace {
  int64_t padded;
  float *votes, *scores;
  int32_t *keys, *chosen;  // chosen: 0 or -1
};

// log2 of x >= 1, error 2e-7.
LOGQUANT_INLINE F32 log2_of(F32 x) {
  const I32 bits = bits_as<I32>(x) - 0x3F3504F3;  // of sqrt(1/2)
  const F32 m = bits_as<F32>((bits & 0x7FFFFF) + 0x3F3504F3), s = (m - 1.0f) / (m + 1.0f), t = s * s;
  const F32 series = 1.0f + t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9))));
  return to_float(bits >> 23) + (2.0f * kLog2e) * s * series;
}

// Scores of a query head in base 2 less their maximum, into w.scores, but never less than kFar, which is what fills the
// last vector.
void subtract_maximum(const float* scores, int64_t pages, const Workspace& w) {
  __builtin_memcpy(w.scores, scores, sizeof(float) * pages);
  for (int64_t p = pages; p < w.padded; ++p) w.scores[p] = -kInfinity;
  F32 most = splat(-kInfinity);
  for (int64_t p = 0; p < w.padded; p += kLanes) most = max(most, load(w.scores + p));
  const F32 top = splat(reduce(most, Max{}));
  for (int64_t p = 0; p < w.padded; p += kLanes) {
    store(w.scores + p, max(splat(kFar), (load(w.scores + p) - top) * splat(kLog2e)));
  }
}

// What share of its attention a KV head's query heads give each page, added up.
void vote(const HeadScores& scores, const Workspace& w) {
  for (int64_t g = 0; g < scores.group; ++g) {
    subtract_maximum(scores.of(g), scores.pages, w);
    F32 sum = splat(0.0f);
    for (int64_t p = 0; p < w.padded; p += kLanes) {
      const F32 weight = exp2(load(w.scores + p));
      store(w.scores + p, weight);
      sum += weight;
    }
    const F32 inverse = splat(1.0f / reduce(sum, Add{}));
    for (int64_t p = 0; p < w.padded; p += kLanes) {
      const F32 own = load(w.scores + p) * inverse;
      store(w.votes + p, g == 0 ? own : load(w.votes + p) + own);
    }
  }
}

// The logarithm of that, for shares that are too small for numbers.
void vote_by_logarithm(const HeadScores& scores, const Workspace& w) {
  for (int64_t g = 0; g < scores.group; ++g) {
    subtract_maximum(scores.of(g), scores.pages, w);
    F32 sum = splat(0.0f);
    for (int64_t p = 0; p < w.padded; p += kLanes) sum += exp2(load(w.scores + p));
    const F32 shift = log2_of(splat(reduce(sum, Add{})));
    for (int64_t p = 0; p < w.padded; p += kLanes) {
      const F32 share = load(w.scores + p) - shift, before = load(w.votes + p);
      if (g == 0) {
        store(w.votes + p, share);
        continue;
      }
      const F32 larger = max(before, share), smaller = min(before, share);
      store(w.votes + p, larger + log2_of(1.0f + exp2(smaller - larger)));
    }
  }
}

// Integers in the order of numbers, either zero being the same; above kLeast.
LOGQUANT_INLINE I32 sort_key(F32 x) {
  const I32 bits = bits_as<I32>(x + 0.0f);
  return max(splat(kLeast + 1), bits ^ ((bits >> 31) & INT32_MAX));
}

// Keys of what ranks the pages, into w.keys, of those that have not been chosen yet.
void set_keys(const float* ranking, int64_t pages, const Workspace& w) {
  for (int64_t p = 0; p < w.padded; p += kLanes) {
    F32 x = splat(0.0f);
    if (p + kLanes <= pages) {
      x = load(ranking + p);
    } else {
      for (int64_t i = p; i < pages; ++i) x[i - p] = ranking[i];
    }
    store(w.keys + p, select(load(w.chosen + p) != 0, splat(kLeast), sort_key(x)));
  }
  for (int64_t p = pages; p < w.padded; ++p) w.keys[p] = kLeast;
}

// What at least `count` keys reach, but fewer pass; or else what exactly `count` pass.
int32_t least_of_best(int64_t count, const Workspace& w) {
  uint32_t found = 0;  // above kLeast
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t tried = found | 1u << bit;
    const I32 border = splat(static_cast<int32_t>(tried ^ 0x80000000u));
    I32 minus_reached = splat(0);
    for (int64_t p = 0; p < w.padded; p += kLanes) minus_reached += load(w.keys + p) >= border;
    const int64_t reached = -int64_t{reduce_lanes<1>(&minus_reached, Add{})[0]};
    if (reached == count) return static_cast<int32_t>((tried - 1) ^ 0x80000000u);
    if (reached > count) found = tried;
  }
  return static_cast<int32_t>(found ^ 0x80000000u);
}

// Chooses the `count` best of the pages that are not chosen yet: of equal ones the first.
void choose_best(const HeadScores& scores, int64_t count, const Workspace& w) {
  constexpr float kCertain = 1e-30f;  // a share that is far from too small
  if (count == 0) return;
  int32_t least;
  if (scores.group == 1) {
    set_keys(scores.first, scores.pages, w);  // their order is that of the shares
    least = least_of_best(count, w);
  } else {
    vote(scores, w);
    set_keys(w.votes, scores.pages, w);
    least = least_of_best(count, w);
    if (!(bits_as<float>(least) > kCertain)) {
      vote_by_logarithm(scores, w);
      set_keys(w.votes, scores.pages, w);
      least = least_of_best(count, w);
    }
  }
  I32 minus_chosen = splat(0);
  for (int64_t p = 0; p < w.padded; p += kLanes) {
    const I32 wins = load(w.keys + p) > splat(least);
    minus_chosen += wins;
    store(w.chosen + p, load(w.chosen + p) | wins);
  }
  int64_t left = count + reduce_lanes<1>(&minus_chosen, Add{})[0];
  for (int64_t p = 0; left > 0 && p < scores.pages; ++p) {
    if (w.keys[p] != least) continue;
    w.chosen[p] = -1;
    --left;
  }
}

}  // namespace

void choose_pages_task(const ChoosePagesArgs& args, int64_t task) {
  const auto clamped = [](int64_t x, int64_t most) { return x < 0 ? 0 : x > most ? most : x; };
  const int64_t query = task % args.queries, head = task / args.queries, batch = head / args.heads;
  const int64_t first = (head * args.group * args.queries + query) * args.page_count;
  const int64_t used = args.used == nullptr ? args.page_count : args.used[batch * args.used_stride];
  const int64_t pages = clamped(used, args.page_count);
  const int64_t wanted = args.counts[batch * args.counts_batch_stride + query * args.counts_query_stride];
  const int64_t count = clamped(wanted, pages < args.most ? pages : args.most);
  Workspace w;
  w.padded = (pages + kLanes - 1) / kLanes * kLanes;
  Arena arena(thread_scratch(4 * (64 + sizeof(float) * w.padded)));
  w.votes = arena.take<float>(w.padded);
  w.scores = arena.take<float>(w.padded);
  w.keys = arena.take<int32_t>(w.padded);
  w.chosen = arena.take<int32_t>(w.padded);
  for (int64_t p = 0; p < w.padded; p += kLanes) store(w.chosen + p, splat(0));
  const auto choose = [&](const float* scores, int64_t best) {
    choose_best({scores + first, args.queries * args.page_count, args.group, pages}, best, w);
  };
  choose(args.scores, args.others == nullptr ? count : (count + 1) / 2);
  if (args.others != nullptr) choose(args.others, count / 2);
  int32_t* out = args.pages + task * args.most;
  int32_t* const end = out + args.most;
  for (int64_t p = 0; p < pages && out < end; ++p) {
    *out = static_cast<int32_t>(p);
    out -= w.chosen[p];
  }
  while (out < end) *out++ = static_cast<int32_t>(args.page_count - 1);
}

}  // namespace logquant::cpu::LOGQUANT_ISA
