// The query side of scores: a task's query rows, loaded once, and folded with the key scales of each page into int16
// codes, so that scores of packed keys are integer dot products (keys.h).
//
// Lanes are channels, or key columns: with a column map, every column has its channel's query element times its digit's
// weight. Each query is read once a task; per page only its key parameters are read. What is rounded away is about 1e-5
// of a score.
#pragma once

#include "../params.h"
#include "dot_codes.h"
#include "rows.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

struct Queries {
  float *q, *q_columns;  // [NR][D], [NR][C]: times score_factor(), q_columns times the digit's weight, too
  int16_t* q_pairs;      // [NR][D]: as it came, where that is bfloat16 and has dot products of pairs
  float* q_scaled;       // [NR][C]: q_columns / score_scale
  int16_t* q_codes;      // [NR][C]: q_scaled times the page's key scales
  float* score_scale;    // [NR]: what 1 of an integer dot product stands for; 0 before the first page
  float* score_zero;     // [NR]: what the page's zeros add to every score
  float* max_scale;      // [C]: the largest key scale that overflows no row's codes
  float* key_scale;      // [D]: of the page
  float* column_scale;   // [C]: of the page, of each column's channel

  int32_t* column_counts;  // [D]: how many columns a channel has
  float* code_middle;      // [D]: the middle of the range of a channel's code, in scales
  int32_t* channels;       // [C]: of each column
  float* column_weight;    // [C]: of its digit

  Queries(const PageFormat& f, int padded_rows, Arena& arena) {
    const int64_t rows = padded_rows;
    q = arena.take<float>(rows * f.head_dim);
    q_columns = arena.take<float>(rows * f.key_columns);
    q_pairs = arena.take<int16_t>(rows * f.head_dim);
    q_scaled = arena.take<float>(rows * f.key_columns);
    q_codes = arena.take<int16_t>(rows * f.key_columns);
    score_scale = arena.take<float>(rows);
    score_zero = arena.take<float>(kMaxRows + kLanes);  // whole vectors are stored
    max_scale = arena.take<float>(f.key_columns);
    key_scale = arena.take<float>(f.head_dim < kTablePadding ? kTablePadding : f.head_dim);
    column_scale = arena.take<float>(f.key_columns);
    column_counts = arena.take<int32_t>(f.head_dim);
    code_middle = arena.take<float>(f.head_dim);
    channels = arena.take<int32_t>(f.key_columns);
    column_weight = arena.take<float>(f.key_columns);
  }
};

// ---------------------------------------------------------------------------------------------------- once a task
// What each column of the keys stands for: its channel, its weight, and the middle of each channel's codes.
void load_columns(const PageFormat& f, const int16_t* map, const Queries& queries) {
  int32_t middles[8] = {};  // by the number of columns, as bits
  for (int n = 1; n * f.key_bits <= kMaxCodeBits; ++n) {
    float weights = 0.0f;
    for (int digit = 0; digit < n; ++digit) weights += digit_weight(f, digit, n);
    middles[n] = bits_as<int32_t>(0.5f * static_cast<float>(code_mask(f.key_bits)) * weights);
  }
  count_columns(f, map, queries.column_counts);
  for (int c = 0; c < f.head_dim; c += kLanes) {
    store(queries.code_middle + c, bits_as<F32>(lookup(middles, load(queries.column_counts + c))));
  }
  for (int j = 0; j < f.key_columns; j += kLanes) {
    if (map == nullptr) {
      store(queries.column_weight + j, splat(digit_weight(f, 0, 1)));
      continue;
    }
    const I32 column = load_u16(reinterpret_cast<const uint16_t*>(map + j)), channel = column_channel(column);
    store(queries.channels + j, channel);
    const I32 exponent = f.digit_exponent(column_digit(column), gather(queries.column_counts, channel));
    store(queries.column_weight + j, bits_as<F32>((exponent + 127) << 23));
  }
}

// What makes of query times key a score in base 2, or with a softcap what is capped.
LOGQUANT_INLINE float score_factor(const AttendArgs& args) {
  return args.softcap > 0.0f ? args.scale / args.softcap : args.scale * kLog2e;
}

void load_queries(const AttendArgs& args, const TaskRows& rows, int padded_rows, const int16_t* map,
                  const Queries& queries) {
  const PageFormat& f = args.format;
  const float factor = score_factor(args);
  load_columns(f, map, queries);
  for (int r = 0; r < padded_rows; ++r) {
    float* const q = queries.q + r * f.head_dim;
    float* const q_columns = queries.q_columns + r * f.key_columns;
    if (r >= rows.rows) {
      for (int c = 0; c < f.head_dim; c += kLanes) store(q + c, splat(0.0f));
      __builtin_memset(queries.q_pairs + r * f.head_dim, 0, sizeof(int16_t) * f.head_dim);
    } else {
      const int64_t first = rows.batch * args.q.batch_stride + rows.query_head(args, r) * args.q.head_stride +
                            rows.query(args, r) * args.q.token_stride;
      with_dtype(args.q.dtype, [&](auto type) {
        for (int c = 0; c < f.head_dim; c += kLanes) {
          store(q + c, load_elements<type>(args.q.data, first + c) * factor);
        }
        if (kHasBFloat16Dots && type == Dtype::kBFloat16) {
          const int16_t* const as_is = static_cast<const int16_t*>(args.q.data) + first;
          __builtin_memcpy(queries.q_pairs + r * f.head_dim, as_is, sizeof(int16_t) * f.head_dim);
        }
      });
    }
    const float* columns = q;
    if (map != nullptr) {
      lookup(q, f.head_dim, queries.channels, f.key_columns, q_columns);
      columns = q_columns;
    }
    for (int j = 0; j < f.key_columns; j += kLanes) {
      store(q_columns + j, load(columns + j) * load(queries.column_weight + j));
    }
    queries.score_scale[r] = 0.0f;
  }
  for (int j = 0; j < f.key_columns; j += kLanes)
    store(queries.max_scale + j, splat(-1.0f));  // the first page rescales
}

// ---------------------------------------------------------------------------------------------------- once a page
// Gives the rows whose q times the page's key scales does not fit a scale that it does, with some room for the next
// pages.
template <int NR>
__attribute__((noinline)) void rescale_queries(int columns, const float* scales, float max_code, Queries queries) {
  for (int r = 0; r < NR; ++r) {
    const float* const q = queries.q_columns + r * columns;
    F32 largest = splat(0.0f);
    for (int j = 0; j < columns; j += kLanes) largest = max_abs(largest, load(q + j) * load(scales + j));
    const float top = reduce(largest, Max{});
    if (queries.score_scale[r] != 0.0f && top <= max_code * queries.score_scale[r]) continue;
    queries.score_scale[r] = (1.125f * top + 1e-30f) / max_code;
    const F32 inverse = splat(1.0f / queries.score_scale[r]);
    for (int j = 0; j < columns; j += kLanes) store(queries.q_scaled + r * columns + j, load(q + j) * inverse);
  }
  for (int j = 0; j < columns; j += kLanes) {
    F32 largest = splat(1e-30f);
    for (int r = 0; r < NR; ++r) largest = max_abs(largest, load(queries.q_scaled + r * columns + j));
    store(queries.max_scale + j, splat(0.999999f * max_code) / largest);
  }
}

// Folds the page's key scales into q: int16 codes with one scale per row, and the sum of q times the zeros. The scale
// lasts until a page needs a larger one: what matters is the absolute error of a score, not that relative to its page.
// What rounding took, times the middle of the codes' range, joins the zeros: that halves the error.
template <int NR, int bits>
LOGQUANT_INLINE void fold_queries(const PageFormat& f, const int32_t* page, bool has_map, float max_code,
                                  const Queries& queries) {
  const int dim = f.head_dim, columns = f.key_columns;
  F32 zeros[NR] = {};
  for (int c = 0; c < dim; c += kLanes) {
    const Params p = key_params_at(f, page, c);
    store(queries.key_scale + c, p.scale);
    const F32 middle = fma(p.scale, load(queries.code_middle + c), p.zero);
    for (int r = 0; r < NR; ++r) zeros[r] = fma(load(queries.q + r * dim + c), middle, zeros[r]);
  }
  const float* scales = queries.key_scale;
  if (has_map) {
    lookup(queries.key_scale, dim, queries.channels, columns, queries.column_scale);
    scales = queries.column_scale;
  }
  bool too_large = false;
  for (int j = 0; j < columns; j += kLanes) too_large |= any_above(load(scales + j), load(queries.max_scale + j));
  if (too_large) rescale_queries<NR>(columns, scales, max_code, queries);
  constexpr float kMiddle = 0.5f * static_cast<float>(code_mask(bits));
  for (int r = 0; r < NR; ++r) {
    const I32 codes = round_to_codes(queries.q_codes + r * columns, columns, [&](int j) __attribute__((always_inline)) {
      return load(queries.q_scaled + r * columns + j) * load(scales + j);
    });
    zeros[r] = fma(to_float(codes), splat(-kMiddle * queries.score_scale[r]), zeros[r]);
  }
  reduce_rows<NR>(zeros, Add{}, [&](int r, F32 sums) { store(queries.score_zero + r, sums); });
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
