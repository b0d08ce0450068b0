// A score of each page for each query (reference/page_scores.py): of its mean key, or a bound of its keys.
//
// A task is kPagesPerTask pages of one KV head, taken as many at a time as make a vector of scores with up to 4 query
// rows. Lanes are channels. The bound takes of each channel the better end of its range: sum of q_c * zero_c +
// max(q_c, 0) * (largest code) * scale_c, so two multiply-adds a channel and row.
// Memory traffic: of a page its key parameters alone (2 or 4 bytes a channel, fetched a few pages ahead), or its mean
// key (1 byte a channel); of further rows they are in the first-level cache.

#include "params.h"
#include "simd.h"
#include "tasks.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

constexpr int kRowsAtOnce = 4, kPagesAhead = 8;
constexpr float kLargest = 3.4028234663852886e38f;

// The query rows of a KV head, times the scale: [row][D].
struct ScoredQueries {
  float* q;   // times the unit of zeros, if it is to meet such
  float* up;  // of what is positive, times the channel's largest code in units of its stored scale
};

ScoredQueries load_scored_queries(const PageScoresArgs& args, int64_t batch, int64_t kv_head, Arena& arena) {
  const PageFormat& f = args.format;
  const int64_t rows = args.group * args.queries;
  const float zero_unit = args.means == nullptr && f.key_param_bits == 8 ? kZeroUnit : 1.0f;
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
        store(queries.q + r * f.head_dim + c, x * zero_unit);
        store(queries.up + r * f.head_dim + c, max(x, splat(0.0f)) * load(most + c));
      }
    });
  }
  return queries;
}

// What is scored of a page of one KV head: add() adds the products of kLanes channels from c on with query row r, and
// finish() makes of a row's sums what adds up to its score. `bytes` gathers what add() has to tell finish().
struct MeanKeys {
  const int8_t* means;
  int64_t stride;
  const float* factors;
  const float* q;  // [row][D]

  LOGQUANT_INLINE void fetch(int64_t) const {}
  template <class AtRow>
  LOGQUANT_INLINE void add(int64_t page, int c, I32&, AtRow&& at_row) const {
    const F32 x = to_float(load_s8(means + page * stride + c));
    at_row([&](int64_t row, F32 sum) __attribute__((always_inline)) { return fma(load(q + row + c), x, sum); });
  }
  LOGQUANT_INLINE F32 finish(int64_t page, I32, F32 sum) const { return sum * splat(factors[page]); }
};

// Fetches the parameters of a page's keys.
LOGQUANT_INLINE void prefetch_params(const void* params, int bytes) {
  for (int line = 0; line < bytes; line += 64) prefetch(static_cast<const char*>(params) + line);
}

// With 8-bit parameters, whose zeros are in units of the scale. A byte that says that a key is not finite is taken for
// a scale at first; it is the largest there is.
struct ByteBounds {
  const uint8_t* params;
  int64_t stride, page_count;  // stride: bytes from page to page
  int zeros;
  ScoredQueries queries;
  int dim;

  LOGQUANT_INLINE void fetch(int64_t page) const {
    if (page < page_count) prefetch_params(params + page * stride, 2 * dim);
  }
  template <class AtRow>
  LOGQUANT_INLINE void add(int64_t page, int c, I32& bytes, AtRow&& at_row) const {
    const uint8_t* const p = params + page * stride + c;
    const I32 byte = load_u8(p);
    const F32 scale = byte_scale(byte), zero = to_float(load_s8(reinterpret_cast<const int8_t*>(p + zeros))) * scale;
    bytes = max(bytes, byte);
    at_row([&](int64_t row, F32 sum) __attribute__((always_inline)) {
      return fma(load(queries.q + row + c), zero, fma(load(queries.up + row + c), scale, sum));
    });
  }
  LOGQUANT_INLINE F32 finish(int64_t, I32 bytes, F32 sum) const {
    static_assert(kPoisonScale > kScaleMax);
    return sum + bits_as<F32>((bytes > kScaleMax) & 0x7FC00000);
  }
};

// With 16-bit parameters, whose zeros are numbers of their own.
struct HalfBounds {
  const PageFormat& format;
  const int32_t* pages;
  int64_t stride, page_count;
  ScoredQueries queries;

  LOGQUANT_INLINE void fetch(int64_t page) const {
    if (page < page_count) prefetch_params(pages + page * stride + format.key_params(), 4 * format.head_dim);
  }
  template <class AtRow>
  LOGQUANT_INLINE void add(int64_t page, int c, I32&, AtRow&& at_row) const {
    const Params params = key_params_at(format, pages + page * stride, c);
    at_row([&](int64_t row, F32 sum) __attribute__((always_inline)) {
      return fma(load(queries.q + row + c), params.zero, fma(load(queries.up + row + c), params.scale, sum));
    });
  }
  LOGQUANT_INLINE F32 finish(int64_t, I32, F32 sum) const { return sum; }
};

// Scores of pages first .. end - 1 for `rows` rows, at most NR; those of a row are page_count apart. What is not there
// has the address of something that is, and goes nowhere.
template <int NR, class Keys>
__attribute__((noinline)) void score_pages(const PageScoresArgs& args, Keys keys, int64_t first, int64_t end,
                                           int64_t rows, float* scores) {
  constexpr int kPages = kLanes / NR;
  const int dim = args.format.head_dim;
  const int64_t page_count = args.page_count;
  int64_t at[NR];
  for (int r = 0; r < NR; ++r) at[r] = r < rows ? r * dim : 0;
  for (int64_t p = first; p < end; p += kPages) {
    F32 sums[kLanes] = {};  // [row][page]
    I32 bytes[kPages] = {};
    unroll<kPages>([&](auto i) __attribute__((always_inline)) { keys.fetch(p + kPagesAhead + i); });
    for (int c = 0; c < dim; c += kLanes) {
      unroll<kPages>([&](auto i) __attribute__((always_inline)) {
        keys.add(p + i < end ? p + i : p, c, bytes[i], [&](auto&& added) __attribute__((always_inline)) {
          unroll<NR>([&](auto r)
                         __attribute__((always_inline)) { sums[r * kPages + i] = added(at[r], sums[r * kPages + i]); });
        });
      });
    }
    unroll<kPages>([&](auto i) __attribute__((always_inline)) {
      unroll<NR>([&](auto r) __attribute__((always_inline)) {
        F32& sum = sums[r * kPages + i];
        sum = keys.finish(p + i < end ? p + i : p, bytes[i], sum);
      });
    });
    // A NaN is as large as can be.
    const F32 numbers = max(min(reduce_lanes<kLanes>(sums, Add{}), splat(kLargest)), splat(-kLargest));
    float all[kLanes];
    store(all, numbers);
    for (int64_t r = 0; r < rows; ++r) {
      if (p + kPages <= end) {
        __builtin_memcpy(scores + r * page_count + p, all + r * kPages, sizeof(float) * kPages);
      } else {
        for (int64_t i = 0; p + i < end; ++i) scores[r * page_count + p + i] = all[r * kPages + i];
      }
    }
  }
}

}  // namespace

void page_scores_task(const PageScoresArgs& args, int64_t task) {
  const PageFormat& f = args.format;
  const int64_t parts = page_score_parts(args), head = task / parts, first = task % parts * kPagesPerTask;
  const int64_t end = first + kPagesPerTask < args.page_count ? first + kPagesPerTask : args.page_count;
  const int64_t batch = head / args.kv_heads, kv_head = head % args.kv_heads;
  const int64_t rows = args.group * args.queries;
  Arena arena(thread_scratch(64 * 4 + 4 * f.head_dim * (2 * rows + 2)));
  const ScoredQueries queries = load_scored_queries(args, batch, kv_head, arena);
  const int32_t* const pages = args.pages.data + batch * args.pages.batch_stride + kv_head * args.pages.head_stride;
  for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
    const int64_t left = rows - r < kRowsAtOnce ? rows - r : kRowsAtOnce;
    const ScoredQueries own{queries.q + r * f.head_dim, queries.up + r * f.head_dim};
    const auto score = [&](auto keys) {
      float* const scores = args.scores + (head * rows + r) * args.page_count;
      if (left == 1) {
        score_pages<1>(args, keys, first, end, left, scores);
      } else if (left == 2) {
        score_pages<2>(args, keys, first, end, left, scores);
      } else {
        score_pages<4>(args, keys, first, end, left, scores);
      }
    };
    if (args.means != nullptr) {
      score(MeanKeys{args.means + batch * args.means_batch_stride + kv_head * args.means_head_stride,
                     args.means_page_stride, args.mean_scales.of(batch, kv_head), own.q});
    } else if (f.key_param_bits == 8) {
      score(ByteBounds{reinterpret_cast<const uint8_t*>(pages + f.key_params()),
                       static_cast<int64_t>(sizeof(int32_t)) * args.pages.page_stride, args.page_count, f.key_zeros(),
                       own, f.head_dim});
    } else {
      score(HalfBounds{f, pages, args.pages.page_stride, args.page_count, own});
    }
  }
}

}  // namespace logquant::cpu::LOGQUANT_ISA
