// Decode attention over packed pages and the exact window: one softmax, flash-decoding style.
//
// A task is one split of the slots of one KV head, for a block of up to 8 query rows (row = query head of the group x
// query token). It walks over units: pages, then blocks of 64 window tokens. Per page and row the key scales are folded
// into q, which becomes int16 with one scale, so that scores are integer dot products straight on the codes (lanes are
// tokens); softmax weights times value scales become int16 likewise (lanes are channels). The zeros add one number per
// row to the scores, and one per value group to the output. Both roundings are of about 1e-5 relative error.
//
// Memory traffic: each page and window token is read once per row block, nothing is written but the split's partial
// result (value_dim + 2 floats a row). Pages are prefetched a few ahead, spread thinly: a burst would stall.

#include "simd.h"
#include "tasks.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kNothingSeen = -1e30f;  // the running maximum before the first token
constexpr float kHidden = -1e38f;       // additive mask values up to here hide a slot (HIDDEN in reference.py)
constexpr float kSlack = 8.0f;          // the maximum is raised only when weights would pass 2^8: rarely
constexpr int kMaxRows = AttendPlan::kRowsPerBlock;
constexpr int kUnitTokens = 128;  // the largest unit
constexpr int kPrefetchPages = 6;
constexpr int kCacheLine = 64;
// Vectors of accumulators that fit in the registers, beside the operands.
constexpr int kAccumulators = kLanes == 16 ? 16 : 8;

LOGQUANT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LOGQUANT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Prefetcher {
  const char* at = nullptr;
  const char* end = nullptr;

  LOGQUANT_INLINE void lines(int count) {
    for (int i = 0; i < count && at < end; ++i, at += kCacheLine) prefetch(at);
  }
};

// Everything a task holds, in scratch memory. Rows are padded to NR; padding rows hold zeros and are never written out.
template <int NR>
struct Block {
  float *q, *q_columns;             // [NR][D], [NR][C]: times scale * log2(e), or scale / softcap
  float* sums;                      // [NR][Dv]
  float* zero_sums;                 // [NR][groups][kLanes]: what value zeros add to every channel of a group
  float* denominators;              // [NR][kLanes]
  float* weights;                   // [NR][kUnitTokens]: scores (base 2), then softmax weights
  float* bias;                      // [NR][kUnitTokens]: of masks
  float *key_scale, *key_zero;      // [D]
  float* column_scale;              // [C]
  float *value_scale, *value_zero;  // [groups][G]
  int32_t* channels;                // [C]: of each column
  int32_t* words;                   // [key_code_words][G]: the key codes, tokens side by side
  int16_t* q_codes;                 // [NR][C]
  int16_t* weight_codes;            // [NR][groups][G]
  float maximum[NR];
  float score_scale[kMaxRows], score_zero[kMaxRows], inverse[kMaxRows];

  Block(const PageFormat& f, Arena& arena) {
    const int64_t groups = f.value_groups(), tokens = f.page_tokens;
    q = arena.take<float>(NR * f.head_dim);
    q_columns = arena.take<float>(NR * f.key_columns);
    sums = arena.take<float>(NR * f.value_dim);
    zero_sums = arena.take<float>(NR * groups * kLanes);
    denominators = arena.take<float>(NR * kLanes);
    weights = arena.take<float>(NR * kUnitTokens);
    bias = arena.take<float>(NR * kUnitTokens);
    key_scale = arena.take<float>(f.head_dim);
    key_zero = arena.take<float>(f.head_dim);
    column_scale = arena.take<float>(f.key_columns);
    value_scale = arena.take<float>(groups * tokens);
    value_zero = arena.take<float>(groups * tokens);
    channels = arena.take<int32_t>(f.key_columns);
    words = arena.take<int32_t>(f.key_code_words() * tokens);
    q_codes = arena.take<int16_t>(NR * f.key_columns);
    weight_codes = arena.take<int16_t>(NR * groups * tokens);
  }
};

// Which rows and slots a task works on.
struct Range {
  int64_t batch, kv_head;
  int first_row, rows;
};

// ------------------------------------------------------------------------------------------------------------ keys
// [G][KW] words to [KW][G]: log2(KW) rounds of separating even from odd elements.
template <int KW>
LOGQUANT_INLINE void transpose_words(const int32_t* in, int32_t* out, int tokens) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  for (int t = 0; t < tokens; t += kLanes) {
    I32 v[KW], next[KW];
    for (int i = 0; i < KW; ++i) v[i] = load(in + t * KW + i * kLanes);
    for (int round = 1; round < KW; round *= 2) {
      for (int i = 0; i < KW / 2; ++i) {
        next[i] = every_second<0>(v[2 * i], v[2 * i + 1], lanes);
        next[KW / 2 + i] = every_second<1>(v[2 * i], v[2 * i + 1], lanes);
      }
      for (int i = 0; i < KW; ++i) v[i] = next[i];
    }
    for (int w = 0; w < KW; ++w) store(out + w * tokens + t, v[w]);
  }
}

LOGQUANT_INLINE void load_key_words(const PageFormat& f, const int32_t* page, int32_t* out) {
  const int32_t* const in = page + f.key_codes();
  const int count = f.key_code_words(), tokens = f.page_tokens;
  switch (count) {
    case 4:
      return transpose_words<4>(in, out, tokens);
    case 8:
      return transpose_words<8>(in, out, tokens);
    case 16:
      return transpose_words<16>(in, out, tokens);
    default:
      for (int t = 0; t < tokens; ++t) {
        for (int w = 0; w < count; ++w) out[w * tokens + t] = in[t * count + w];
      }
  }
}

// Folds the page's key scales into q: int16 codes with one scale per row, and the sum of q times the zeros.
template <int NR>
LOGQUANT_INLINE void fold_queries(const PageFormat& f, const int32_t* page, bool has_map, float most, Block<NR>& b) {
  const int dim = f.head_dim, columns = f.key_columns;
  const uint16_t* const params = reinterpret_cast<const uint16_t*>(page + f.key_params());
  for (int c = 0; c < dim; c += kLanes) {
    store(b.key_scale + c, load_half(params + c));
    store(b.key_zero + c, load_half(params + f.key_zeros() + c));
  }
  const float* scale = b.key_scale;
  if (has_map) {
    for (int j = 0; j < columns; j += kLanes) store(b.column_scale + j, gather(b.key_scale, load(b.channels + j)));
    scale = b.column_scale;
  }
  F32 largest[NR], zeros[NR];
  for (int r = 0; r < NR; ++r) {
    F32 top = splat(0.0f), sum = splat(0.0f);
    for (int j = 0; j < columns; j += kLanes) top = max_abs(top, load(b.q_columns + r * columns + j) * load(scale + j));
    for (int c = 0; c < dim; c += kLanes) sum = fma(load(b.q + r * dim + c), load(b.key_zero + c), sum);
    largest[r] = top;
    zeros[r] = sum;
  }
  for (int r = 0; r < NR; ++r) {
    const float top = reduce(largest[r], Max{}) + 1e-30f;
    b.score_zero[r] = reduce(zeros[r], Add{});
    b.score_scale[r] = top / most;
    b.inverse[r] = most / top;
  }
  for (int r = 0; r < NR; ++r) {
    for (int j = 0; j < columns; j += kLanes) {
      const F32 x = load(b.q_columns + r * columns + j) * splat(b.inverse[r]) * load(scale + j);
      store_u16(reinterpret_cast<uint16_t*>(b.q_codes + r * columns + j), round_to_int(x));
    }
  }
}

// weights[r][t] = score_scale[r] * (q_codes[r] . codes[t]) + score_zero[r]
template <int NR, int bits>
LOGQUANT_INLINE void key_scores(const PageFormat& f, Block<NR>& b, Prefetcher& ahead, int lines) {
  constexpr int kPairs = 16 / bits;  // pairs of elements in a word
  constexpr int kBlock = kAccumulators / NR < 4 ? kAccumulators / NR : 4;
  const int tokens = f.page_tokens, count = f.key_code_words(), pairs_per_row = f.key_columns / 2;
  const int32_t* const q_pairs = reinterpret_cast<const int32_t*>(b.q_codes);
  for (int t = 0; t < tokens; t += kBlock * kLanes) {
    ahead.lines(lines);
    I32 sum[NR][kBlock] = {};
    for (int w = 0; w < count; ++w) {
      I32 x[kBlock];
      for (int k = 0; k < kBlock; ++k) x[k] = load(b.words + w * tokens + t + k * kLanes);
      unroll<kPairs>([&](auto i) __attribute__((always_inline)) {
        I32 codes[kBlock];
        for (int k = 0; k < kBlock; ++k) codes[k] = shift_right(x[k], bits * i) & static_cast<int>(lane_mask(bits));
        for (int r = 0; r < NR; ++r) {
          const I32 pair = splat(q_pairs[r * pairs_per_row + w * kPairs + i]);
          for (int k = 0; k < kBlock; ++k) sum[r][k] = dot_pairs(sum[r][k], codes[k], pair);
        }
      });
    }
    for (int r = 0; r < NR; ++r) {
      for (int k = 0; k < kBlock; ++k) {
        store(b.weights + r * kUnitTokens + t + k * kLanes,
              fma(to_float(sum[r][k]), splat(b.score_scale[r]), splat(b.score_zero[r])));
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- masks
LOGQUANT_INLINE float float_of(AttendArgs::MaskKind kind, const void* mask, int64_t i) {
  switch (kind) {
    case AttendArgs::MaskKind::kBool:
      return static_cast<const uint8_t*>(mask)[i] ? 0.0f : -kInfinity;
    case AttendArgs::MaskKind::kFloat32:
      return static_cast<const float*>(mask)[i];
    case AttendArgs::MaskKind::kBFloat16:
      return bits_as<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(mask)[i]) << 16);
    default: {
      uint16_t lanes[kLanes] = {static_cast<const uint16_t*>(mask)[i]};
      return load_half(lanes)[0];
    }
  }
}

// bias[r][i] = what is added to the score (base 2) of slot first_slot + i; -infinity where row r does not see it.
template <int NR>
void load_bias(const AttendArgs& args, const Range& range, int64_t first_slot, int tokens, Block<NR>& b) {
  const int32_t* const positions =
      args.positions == nullptr ? nullptr : args.positions + range.batch * args.positions_batch_stride + first_slot;
  for (int r = 0; r < range.rows; ++r) {
    const int64_t row = range.first_row + r, query = row % args.queries;
    float* const out = b.bias + r * kUnitTokens;
    // Heads that share a mask share its rows.
    if (r >= args.queries && args.mask_head_stride == 0) {
      __builtin_memcpy(out, out - args.queries * kUnitTokens, sizeof(float) * tokens);
      continue;
    }
    const int64_t head = range.kv_head * args.group + row / args.queries;
    const int64_t base =
        range.batch * args.mask_batch_stride + head * args.mask_head_stride + query * args.mask_query_stride;
    const int64_t last = args.query_positions == nullptr
                             ? INT64_MAX
                             : args.query_positions[range.batch * args.query_positions_batch_stride + query];
    for (int i = 0; i < tokens; ++i) {
      const int64_t position = positions == nullptr ? first_slot + i : positions[i];
      float value = 0.0f;
      if (position < 0 || position > last) {
        value = -kInfinity;
      } else if (args.mask_kind != AttendArgs::MaskKind::kNone) {
        value = position < args.mask_positions
                    ? float_of(args.mask_kind, args.mask, base + position * args.mask_position_stride)
                    : -kInfinity;
      }
      out[i] = value <= kHidden ? -kInfinity : value * kLog2e;
    }
  }
}

// --------------------------------------------------------------------------------------------------------- softmax
// 2 * log2(e) * x and no cancellation for large x: tanh(x) = 1 - 2 / (exp(2x) + 1).
LOGQUANT_INLINE F32 tanh(F32 x) {
  const F32 bounded = max(splat(-15.0f), min(splat(15.0f), x));
  const F32 clamped = select(is_nonfinite(x), x, bounded);
  return 1.0f - 2.0f / (exp2(clamped * (2.0f * kLog2e)) + 1.0f);
}

template <int NR>
LOGQUANT_INLINE void raise_maximum(const PageFormat& f, int r, float maximum, Block<NR>& b) {
  const float old = b.maximum[r];
  const F32 factor = old == kNothingSeen ? splat(0.0f) : exp2(splat(old - maximum));
  for (int c = 0; c < f.value_dim; c += kLanes) {
    store(b.sums + r * f.value_dim + c, load(b.sums + r * f.value_dim + c) * factor);
  }
  for (int g = 0; g < f.value_groups(); ++g) {
    float* const p = b.zero_sums + (r * f.value_groups() + g) * kLanes;
    store(p, load(p) * factor);
  }
  store(b.denominators + r * kLanes, load(b.denominators + r * kLanes) * factor);
  b.maximum[r] = maximum;
}

// Scores of `tokens` slots (a multiple of kLanes; slots that do not count hold -infinity) become weights.
template <int NR>
LOGQUANT_INLINE void softmax(const AttendArgs& args, int tokens, bool biased, Block<NR>& b) {
  for (int r = 0; r < NR; ++r) {
    float* const row = b.weights + r * kUnitTokens;
    const float* const bias = b.bias + r * kUnitTokens;
    F32 top = splat(-kInfinity);
    I32 above = splat(0);
    for (int t = 0; t < tokens; t += kLanes) {
      F32 x = load(row + t);
      if (args.softcap > 0.0f) x = splat(args.softcap * kLog2e) * tanh(x);
      if (biased) {
        const F32 add = load(bias + t);
        x = select(add == splat(-kInfinity), add, x + add);
      }
      if (args.softcap > 0.0f || biased) store(row + t, x);
      above |= ~(x <= splat(b.maximum[r] + kSlack));  // true for a NaN, too
      top = max(top, x);
    }
    if (any(above)) raise_maximum(args.format, r, reduce(max(splat(b.maximum[r]), top), Max{}), b);
    const F32 maximum = splat(b.maximum[r]);
    F32 sum = load(b.denominators + r * kLanes);
    for (int t = 0; t < tokens; t += kLanes) {
      const F32 x = load(row + t);
      const F32 weight = select(x == splat(-kInfinity), splat(0.0f), exp2(x - maximum));
      sum += weight;
      store(row + t, weight);
    }
    store(b.denominators + r * kLanes, sum);
  }
}

// ---------------------------------------------------------------------------------------------------------- values
// Folds the value scales into the weights: int16 codes with one scale per row and group; sums up the zeros.
template <int NR>
LOGQUANT_INLINE void fold_weights(const PageFormat& f, const int32_t* page, bool biased, float (&scale)[NR], int group,
                                  Block<NR>& b) {
  const int tokens = f.page_tokens, groups = f.value_groups();
  const uint16_t* const params = reinterpret_cast<const uint16_t*>(page + f.value_params()) + group * tokens;
  float* const scales = b.value_scale;
  float* const zeros = b.value_zero;
  for (int t = 0; t < tokens; t += kLanes) {
    store(scales + t, load_half(params + t));
    store(zeros + t, load_half(params + f.value_zeros() + t));
  }
  for (int r = 0; r < NR; ++r) {
    const float* const weights = b.weights + r * kUnitTokens;
    float* const zero_sum = b.zero_sums + (r * groups + group) * kLanes;
    F32 top = splat(0.0f), sum = load(zero_sum);
    for (int t = 0; t < tokens; t += kLanes) {
      const F32 weight = load(weights + t);
      top = max_abs(top, weight * load(scales + t));
      F32 zero = load(zeros + t);
      // A token that the row does not see must not poison it with a NaN.
      if (biased) zero = select(weight == splat(0.0f), splat(0.0f), zero);
      sum = fma(weight, zero, sum);
    }
    store(zero_sum, sum);
    const float largest = reduce(top, Max{}) + 1e-30f;
    scale[r] = largest / 32767.0f;
    const F32 inverse = splat(32767.0f / largest);
    int16_t* const codes = b.weight_codes + r * tokens;
    for (int t = 0; t < tokens; t += kLanes) {
      const F32 x = load(weights + t) * inverse * load(scales + t);
      store_u16(reinterpret_cast<uint16_t*>(codes + t), round_to_int(x));
    }
  }
}

// sums[r][c ..] += scale[r] * (weight_codes[r] . codes of kBlock vectors of channels)
template <int NR, int bits, int kBlock>
LOGQUANT_INLINE void value_sums(const PageFormat& f, const int32_t* page, const float (&scale)[NR], int c,
                                Block<NR>& b) {
  constexpr int kPairs = 16 / bits;
  const int32_t* const weight_pairs = reinterpret_cast<const int32_t*>(b.weight_codes);
  const int pairs_per_row = f.page_tokens / 2;
  I32 sum[NR][kBlock] = {};
  for (int row = 0; row < f.value_code_rows(); ++row) {
    I32 x[kBlock];
    for (int k = 0; k < kBlock; ++k) x[k] = load(page + f.value_codes() + row * f.value_dim + c + k * kLanes);
    unroll<kPairs>([&](auto i) __attribute__((always_inline)) {
      I32 codes[kBlock];
      for (int k = 0; k < kBlock; ++k) codes[k] = shift_right(x[k], bits * i) & static_cast<int>(lane_mask(bits));
      for (int r = 0; r < NR; ++r) {
        const I32 pair = splat(weight_pairs[r * pairs_per_row + row * kPairs + i]);
        for (int k = 0; k < kBlock; ++k) sum[r][k] = dot_pairs(sum[r][k], codes[k], pair);
      }
    });
  }
  for (int r = 0; r < NR; ++r) {
    for (int k = 0; k < kBlock; ++k) {
      float* const p = b.sums + r * f.value_dim + c + k * kLanes;
      store(p, fma(to_float(sum[r][k]), splat(scale[r]), load(p)));
    }
  }
}

template <int NR, int bits>
LOGQUANT_INLINE void add_values(const PageFormat& f, const int32_t* page, bool biased, Block<NR>& b, Prefetcher& ahead,
                                int lines) {
  constexpr int kBlock = kAccumulators / NR < 4 ? kAccumulators / NR : 4;
  for (int group = 0; group < f.value_groups(); ++group) {
    float scale[NR];
    fold_weights<NR>(f, page, biased, scale, group, b);
    int c = group * f.value_group;
    const int end = c + f.value_group;
    for (; c + kBlock * kLanes <= end; c += kBlock * kLanes) {
      ahead.lines(lines);
      value_sums<NR, bits, kBlock>(f, page, scale, c, b);
    }
    for (; c < end; c += kLanes) value_sums<NR, bits, 1>(f, page, scale, c, b);
  }
}

// ---------------------------------------------------------------------------------------------------------- window
template <int NR, Dtype dtype>
LOGQUANT_INLINE void window_scores(const PageFormat& f, const void* k, int64_t stride, int tokens, Block<NR>& b) {
  constexpr int kBlock = NR <= 4 ? 4 : 2;  // tokens at a time
  const int dim = f.head_dim;
  for (int t = 0; t < tokens; t += kBlock) {
    F32 sum[NR][kBlock] = {};
    // Past the last token the last one is read again.
    int64_t rows[kBlock];
    for (int k = 0; k < kBlock; ++k) rows[k] = smaller(t + k, tokens - 1) * stride;
    for (int c = 0; c < dim; c += kLanes) {
      F32 x[kBlock];
      for (int k0 = 0; k0 < kBlock; ++k0) x[k0] = load_elements<dtype>(k, rows[k0] + c);
      for (int r = 0; r < NR; ++r) {
        const F32 q = load(b.q + r * dim + c);
        for (int k0 = 0; k0 < kBlock; ++k0) sum[r][k0] = fma(q, x[k0], sum[r][k0]);
      }
    }
    for (int r = 0; r < NR; ++r) {
      const F32 totals = reduce_lanes<kBlock>(sum[r], Add{});
      for (int k0 = 0; k0 < kBlock; ++k0) b.weights[r * kUnitTokens + t + k0] = totals[k0];
    }
  }
}

template <int NR, Dtype dtype>
LOGQUANT_INLINE void window_values(const PageFormat& f, const void* v, int64_t stride, int tokens, bool biased,
                                   Block<NR>& b) {
  constexpr int kBlock = kAccumulators / NR < 4 ? kAccumulators / NR : 4;
  const auto add = [&](auto block, int c) __attribute__((always_inline)) {
    F32 sum[NR][block];
    for (int r = 0; r < NR; ++r) {
      for (int k = 0; k < block; ++k) sum[r][k] = load(b.sums + r * f.value_dim + c + k * kLanes);
    }
    for (int t = 0; t < tokens; ++t) {
      F32 x[block];
      for (int k = 0; k < block; ++k) x[k] = load_elements<dtype>(v, t * stride + c + k * kLanes);
      for (int r = 0; r < NR; ++r) {
        const float weight = b.weights[r * kUnitTokens + t];
        if (biased && weight == 0.0f) continue;  // not seen: its value may be a NaN
        for (int k = 0; k < block; ++k) sum[r][k] = fma(splat(weight), x[k], sum[r][k]);
      }
    }
    for (int r = 0; r < NR; ++r) {
      for (int k = 0; k < block; ++k) store(b.sums + r * f.value_dim + c + k * kLanes, sum[r][k]);
    }
  };
  int c = 0;
  for (; c + kBlock * kLanes <= f.value_dim; c += kBlock * kLanes) add(std::integral_constant<int, kBlock>{}, c);
  for (; c < f.value_dim; c += kLanes) add(std::integral_constant<int, 1>{}, c);
}

// ------------------------------------------------------------------------------------------------------------ task
template <int NR>
void load_queries(const AttendArgs& args, const Range& range, const int16_t* map, Block<NR>& b) {
  const PageFormat& f = args.format;
  const float factor = args.softcap > 0.0f ? args.scale / args.softcap : args.scale * kLog2e;
  for (int r = 0; r < NR; ++r) {
    float* const q = b.q + r * f.head_dim;
    if (r >= range.rows) {
      for (int c = 0; c < f.head_dim; c += kLanes) store(q + c, splat(0.0f));
    } else {
      const int64_t row = range.first_row + r, head = range.kv_head * args.group + row / args.queries;
      const int64_t first =
          range.batch * args.q.batch_stride + head * args.q.head_stride + row % args.queries * args.q.token_stride;
      with_dtype(args.q.dtype, [&](auto type) {
        for (int c = 0; c < f.head_dim; c += kLanes) {
          store(q + c, load_elements<type>(args.q.data, first + c) * factor);
        }
      });
    }
    if (map == nullptr) continue;
    for (int j = 0; j < f.key_columns; ++j) {
      const float weight = static_cast<float>(1 << (f.key_bits * column_digit(map[j])));
      b.q_columns[r * f.key_columns + j] = q[column_channel(map[j])] * weight;
    }
  }
  if (map == nullptr) {
    b.q_columns = b.q;
  } else {
    for (int j = 0; j < f.key_columns; ++j) b.channels[j] = column_channel(map[j]);
  }
}

template <int NR>
void store_partials(const AttendArgs& args, const AttendPlan& plan, const Range& range, int64_t head, int64_t split,
                    const Block<NR>& b) {
  const PageFormat& f = args.format;
  for (int r = 0; r < range.rows; ++r) {
    float* const out =
        plan.partials + ((head * plan.splits + split) * plan.rows + range.first_row + r) * plan.partial_size(args);
    for (int g = 0; g < f.value_groups(); ++g) {
      const F32 zeros = splat(reduce(load(b.zero_sums + (r * f.value_groups() + g) * kLanes), Add{}));
      for (int c = g * f.value_group; c < (g + 1) * f.value_group; c += kLanes) {
        store(out + c, load(b.sums + r * f.value_dim + c) + zeros);
      }
    }
    out[f.value_dim] = b.maximum[r];
    out[f.value_dim + 1] = reduce(load(b.denominators + r * kLanes), Add{});
  }
}

template <int NR>
void attend_rows(const AttendArgs& args, const AttendPlan& plan, const Range& range, int64_t head, int64_t split) {
  const PageFormat& f = args.format;
  Arena measure(nullptr);
  Block<NR> sizes(f, measure);
  Arena arena(thread_scratch(measure.used()));
  Block<NR> b(f, arena);
  const int16_t* const map =
      args.key_map.data == nullptr
          ? nullptr
          : args.key_map.data + range.batch * args.key_map.batch_stride + range.kv_head * args.key_map.head_stride;
  load_queries(args, range, map, b);
  for (int i = 0; i < NR * f.value_dim; i += kLanes) store(b.sums + i, splat(0.0f));
  for (int i = 0; i < NR * f.value_groups() * kLanes; i += kLanes) store(b.zero_sums + i, splat(0.0f));
  for (int i = 0; i < NR * kLanes; i += kLanes) store(b.denominators + i, splat(0.0f));
  for (int i = 0; i < NR * kUnitTokens; i += kLanes) store(b.bias + i, splat(0.0f));
  for (int r = 0; r < NR; ++r) b.maximum[r] = kNothingSeen;

  int64_t pages = args.page_count, window_tokens = args.window_tokens;
  if (args.lengths != nullptr) {
    pages = args.lengths[range.batch * args.lengths_batch_stride];
    window_tokens = args.lengths[range.batch * args.lengths_batch_stride + 1];
  }
  const bool biased =
      args.mask_kind != AttendArgs::MaskKind::kNone || args.query_positions != nullptr || args.positions != nullptr;
  const float overflow = 2147483520.0f / static_cast<float>(f.key_columns * static_cast<int>(code_mask(f.key_bits)));
  const float most = overflow < 32767.0f ? overflow : 32767.0f;
  const auto page_at = [&](int64_t p) {
    const int64_t block =
        args.page_table == nullptr ? p : args.page_table[range.batch * args.page_table_batch_stride + p];
    return args.pages.data + range.batch * args.pages.batch_stride + range.kv_head * args.pages.head_stride +
           block * args.pages.page_stride;
  };

  const int64_t first = split * plan.units_per_split, last = smaller(plan.units, first + plan.units_per_split);
  const int64_t page_end = smaller(last, pages);
  constexpr int kBlock = kAccumulators / NR < 4 ? kAccumulators / NR : 4;
  const int steps = (f.page_tokens + f.value_dim) / (kBlock * kLanes) + 1;
  const int lines = (4 * f.words() / kCacheLine + steps - 1) / steps;
  for (int64_t p = first; p < page_end; ++p) {
    const int32_t* const page = page_at(p);
    Prefetcher ahead;
    if (p + kPrefetchPages < page_end) {
      ahead.at = reinterpret_cast<const char*>(page_at(p + kPrefetchPages));
      ahead.end = ahead.at + 4 * f.words();
    }
    fold_queries<NR>(f, page, map != nullptr, most, b);
    load_key_words(f, page, b.words);
    with_bits(f.key_bits, [&](auto bits) { key_scores<NR, bits>(f, b, ahead, lines); });
    if (biased) load_bias(args, range, p * f.page_tokens, f.page_tokens, b);
    softmax<NR>(args, f.page_tokens, biased, b);
    with_bits(f.value_bits, [&](auto bits) { add_values<NR, bits>(f, page, biased, b, ahead, lines); });
  }

  const auto row_bytes = element_bytes(args.window_k.dtype);
  const auto window = [&](const Tokens& x, int64_t t) {
    const int64_t offset = range.batch * x.batch_stride + range.kv_head * x.head_stride + t * x.token_stride;
    return static_cast<const char*>(x.data) + offset * row_bytes;
  };
  for (int64_t unit = larger(first, args.page_count); unit < last; ++unit) {
    const int64_t start = (unit - args.page_count) * AttendPlan::kWindowBlock;
    const int tokens = static_cast<int>(smaller(AttendPlan::kWindowBlock, window_tokens - start));
    if (tokens <= 0) break;
    const int padded = (tokens + kLanes - 1) / kLanes * kLanes;
    with_dtype(args.window_k.dtype, [&](auto type) {
      window_scores<NR, type>(f, window(args.window_k, start), args.window_k.token_stride, tokens, b);
      for (int r = 0; r < NR; ++r) {
        for (int t = tokens; t < padded; ++t) b.weights[r * kUnitTokens + t] = -kInfinity;
      }
      if (biased) {
        load_bias(args, range, args.page_count * f.page_tokens + start, tokens, b);
        for (int r = 0; r < NR; ++r) {
          for (int t = tokens; t < padded; ++t) b.bias[r * kUnitTokens + t] = -kInfinity;
        }
      }
      softmax<NR>(args, padded, biased, b);
      window_values<NR, type>(f, window(args.window_v, start), args.window_v.token_stride, tokens, biased, b);
    });
  }
  store_partials(args, plan, range, head, split, b);
}

}  // namespace

void attend_split(const AttendArgs& args, const AttendPlan& plan, int64_t task) {
  const int64_t head = task / plan.tasks_per_head(), within = task % plan.tasks_per_head();
  const int64_t split = within / plan.row_blocks, block = within % plan.row_blocks;
  Range range;
  range.batch = head / args.kv_heads;
  range.kv_head = head % args.kv_heads;
  range.first_row = static_cast<int>(block * plan.rows / plan.row_blocks);
  range.rows = static_cast<int>((block + 1) * plan.rows / plan.row_blocks) - range.first_row;
  if (range.rows == 1) {
    attend_rows<1>(args, plan, range, head, split);
  } else if (range.rows == 2) {
    attend_rows<2>(args, plan, range, head, split);
  } else if (range.rows <= 4) {
    attend_rows<4>(args, plan, range, head, split);
  } else {
    attend_rows<8>(args, plan, range, head, split);
  }
}

void attend_merge(const AttendArgs& args, const AttendPlan& plan, int64_t head) {
  const int dim = args.format.value_dim;
  const int64_t size = plan.partial_size(args), batch = head / args.kv_heads, kv_head = head % args.kv_heads;
  for (int64_t row = 0; row < plan.rows; ++row) {
    const int64_t query_head = kv_head * args.group + row / args.queries;
    const auto partial = [&](int64_t split) {
      return plan.partials + ((head * plan.splits + split) * plan.rows + row) * size;
    };
    float maximum = kNothingSeen;
    for (int64_t s = 0; s < plan.splits; ++s) maximum = partial(s)[dim] > maximum ? partial(s)[dim] : maximum;
    float denominator = 0.0f;
    if (args.sinks != nullptr) {
      const float sink = args.sinks[query_head] * kLog2e;
      maximum = sink > maximum ? sink : maximum;
      denominator = exp2(splat(sink - maximum))[0];
    }
    float* const sums = partial(0);
    for (int64_t s = 0; s < plan.splits; ++s) {
      const float* const part = partial(s);
      const float factor = exp2(splat(part[dim] - maximum))[0];
      denominator += part[dim + 1] * factor;
      for (int c = 0; c < dim; c += kLanes) {
        const F32 scaled = load(part + c) * splat(factor);
        store(sums + c, s == 0 ? scaled : load(sums + c) + scaled);
      }
    }
    const bool nothing = denominator == 0.0f;
    const F32 inverse = splat(nothing ? 0.0f : 1.0f / denominator);
    const int64_t out_row = (batch * args.kv_heads * args.group + query_head) * args.queries + row % args.queries;
    args.lse[out_row] = nothing ? -kInfinity : (maximum + __builtin_log2f(denominator)) * kLn2;
    with_dtype(args.q.dtype, [&](auto type) {
      for (int c = 0; c < dim; c += kLanes) store_elements<type>(args.out, out_row * dim + c, load(sums + c) * inverse);
    });
  }
}

}  // namespace logquant::cpu::LOGQUANT_ISA
