// A score of each page for each query (reference/page_scores.py): of its mean key, or a bound of its keys.
//
// A task is kPagesPerTask pages of one KV head, taken as many at a time as make a vector of scores with up to 4 query
// rows. Lanes are channels. The bound takes of each channel the better end of its range: sum of q_c * zero_c +
// max(q_c, 0) * (largest code) * scale_c, so two multiply-adds a channel and row.
// Memory traffic: of a page its key parameters alone (2 bytes a channel, fetched a few pages ahead), or its mean key (1
// byte a channel); of further rows they are in the first-level cache.

#include "params.h"
#include "simd.h"
#include "tasks.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

constexpr int kRowsAtOnce = 4, kPagesAhead = 8;
constexpr float kLargest = 3.4028234663852886e38f;

// The query rows of a KV head, times the scale: [row][D].
struct ScoredQueries {
  float *q, *up;  // up: of what is positive, times the channel's largest code in units of its stored scale
};

ScoredQueries load_scored_queries(const PageScoresArgs& args, int64_t batch, int64_t kv_head, Arena& arena) {
  const PageFormat& f = args.format;
  const int64_t rows = args.group * args.queries;
  ScoredQueries queries{arena.take<float>(rows * f.head_dim), arena.take<float>(rows * f.head_dim)};
  int32_t* const counts = arena.take<int32_t>(f.head_dim);
  float* const most = arena.take<float>(f.head_dim);
  count_columns(f, args.key_map.of(batch, kv_head), counts);
  for (int c = 0; c < f.head_dim; ++c) {
    most[c] = digit_weight(f, 0, counts[c]) * static_cast<float>((1 << f.key_bits * counts[c]) - 1);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = batch * args.q.batch_stride + (kv_head * args.group + r / args.queries) * args.q.head_stride +
                          r % args.queries * args.q.token_stride;
    with_dtype(args.q.dtype, [&](auto type) {
      for (int c = 0; c < f.head_dim; c += kLanes) {
        const F32 x = load_elements<type>(args.q.data, first + c) * args.scale;
        store(queries.q + r * f.head_dim + c, x);
        store(queries.up + r * f.head_dim + c, max(x, splat(0.0f)) * load(most + c));
      }
    });
  }
  return queries;
}

LOGQUANT_INLINE float number(float x) { return x <= kLargest ? (x < -kLargest ? -kLargest : x) : kLargest; }

// Scores of `pages` pages from `first` on for `rows` rows, at most kLanes / NR and NR; those of a row are page_count
// apart. What is not there has the address of something that is, and goes nowhere. add(c, page, sums) adds the products
// of kLanes channels from c on, of one page with all rows.
template <int NR, class AddProducts>
LOGQUANT_INLINE void score_some(const PageScoresArgs& args, int64_t first, int64_t pages, int64_t rows,
                                const float* factors, float* scores, AddProducts&& add) {
  constexpr int kPages = kLanes / NR;
  F32 sums[kLanes] = {};  // [row][page]
  for (int c = 0; c < args.format.head_dim; c += kLanes) {
    unroll<kPages>([&](auto i) __attribute__((always_inline)) {
      F32 own[NR];
      for (int r = 0; r < NR; ++r) own[r] = sums[r * kPages + i];
      add(c, i < pages ? first + i : first, own);
      for (int r = 0; r < NR; ++r) sums[r * kPages + i] = own[r];
    });
  }
  float all[kLanes];
  store(all, reduce_lanes<kLanes>(sums, Add{}));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < pages; ++i) {
      const float factor = factors == nullptr ? 1.0f : factors[first + i];
      scores[r * args.page_count + first + i] = number(all[r * kPages + i] * factor);
    }
  }
}

template <int NR>
__attribute__((noinline)) void score_pages(const PageScoresArgs& args, int64_t batch, int64_t kv_head, int64_t first,
                                           int64_t end, ScoredQueries queries, int64_t rows, float* scores) {
  constexpr int64_t kPages = kLanes / NR;
  const PageFormat& f = args.format;
  const int dim = f.head_dim;
  int64_t at[NR];
  for (int r = 0; r < NR; ++r) at[r] = r < rows ? r * dim : 0;
  if (args.means != nullptr) {
    const int8_t* const means = args.means + batch * args.means_batch_stride + kv_head * args.means_head_stride;
    const float* const factors = args.mean_scales.of(batch, kv_head);
    const auto add = [&](int c, int64_t p, F32* sums) __attribute__((always_inline)) {
      const uint8_t* const mean = reinterpret_cast<const uint8_t*>(means + p * args.means_page_stride);
      const F32 x = to_float(bits_as<I32>(load_u8(mean + c) << 24) >> 24);
      for (int r = 0; r < NR; ++r) sums[r] = fma(load(queries.q + at[r] + c), x, sums[r]);
    };
    for (int64_t p = first; p < end; p += kPages) {
      score_some<NR>(args, p, end - p < kPages ? end - p : kPages, rows, factors, scores, add);
    }
    return;
  }
  const int32_t* const pages = args.pages.data + batch * args.pages.batch_stride + kv_head * args.pages.head_stride;
  const int bytes = dim * f.key_param_bits / 4;
  const auto add = [&](int c, int64_t p, F32* sums) __attribute__((always_inline)) {
    const Params params = key_params_at(f, pages + p * args.pages.page_stride, c);
    for (int r = 0; r < NR; ++r) {
      const F32 up = fma(load(queries.up + at[r] + c), params.scale, sums[r]);
      sums[r] = fma(load(queries.q + at[r] + c), params.zero, up);
    }
  };
  for (int64_t p = first; p < end; p += kPages) {
    for (int64_t next = p + kPagesAhead; next < p + kPagesAhead + kPages && next < args.page_count; ++next) {
      const char* const params = reinterpret_cast<const char*>(pages + next * args.pages.page_stride + f.key_params());
      for (int line = 0; line < bytes; line += 64) prefetch(params + line);
    }
    score_some<NR>(args, p, end - p < kPages ? end - p : kPages, rows, nullptr, scores, add);
  }
}

}  // namespace

void page_scores_task(const PageScoresArgs& args, int64_t task) {
  const int64_t parts = page_score_parts(args), head = task / parts, first = task % parts * kPagesPerTask;
  const int64_t end = first + kPagesPerTask < args.page_count ? first + kPagesPerTask : args.page_count;
  const int64_t batch = head / args.kv_heads, kv_head = head % args.kv_heads;
  const int64_t rows = args.group * args.queries, dim = args.format.head_dim;
  Arena arena(thread_scratch(64 * 4 + 4 * dim * (2 * rows + 2)));
  const ScoredQueries queries = load_scored_queries(args, batch, kv_head, arena);
  for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
    const int64_t left = rows - r < kRowsAtOnce ? rows - r : kRowsAtOnce;
    const ScoredQueries own{queries.q + r * dim, queries.up + r * dim};
    float* const scores = args.scores + (head * rows + r) * args.page_count;
    if (left == 1) {
      score_pages<1>(args, batch, kv_head, first, end, own, left, scores);
    } else if (left == 2) {
      score_pages<2>(args, batch, kv_head, first, end, own, left, scores);
    } else {
      score_pages<4>(args, batch, kv_head, first, end, own, left, scores);
    }
  }
}

}  // namespace logquant::cpu::LOGQUANT_ISA
