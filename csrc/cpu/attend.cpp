// Decode attention over packed pages and the exact window: one softmax, flash-decoding style.
//
// A task is one split of the slots of one KV head, for a block of up to 8 query rows (row = query head of the group x
// query token). It walks over units: pages, then blocks of 64 window tokens. Per page and row the key scales are folded
// into q, which becomes int16 with one scale, so that scores are integer dot products straight on the codes (lanes are
// tokens); softmax weights times value scales become int16 likewise (lanes are channels). The zeros add one number per
// row to the scores, and one per value group to the output. Both roundings are of about 1e-5 relative error. With AMX,
// blocks of several rows have matrix tiles do the dot products (attend_tiles.h), with the same sums.
//
// Memory traffic: each page and window token is read once per row block, nothing is written but the split's partial
// result (value_dim + 2 floats a row). While a page is worked on the next one is prefetched into the first-level cache,
// spread thinly: a burst would stall, and what comes earlier is gone by the time it is needed.

#include "attend_tiles.h"
#include "params.h"
#include "simd.h"
#include "tasks.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kNothingSeen = -1e31f;  // the running maximum before the first token
constexpr float kHidden = -1e30f;       // additive mask values up to here hide a slot (HIDDEN in reference.py)
constexpr float kSlack = 8.0f;          // the maximum is raised only when weights would pass 2^8: rarely
constexpr int kMaxRows = AttendPlan::kRowsPerBlock;
constexpr float kMostCode = 32639.0f;  // 0x7F7F: the low byte is a signed one, too (attend_tiles.h)
constexpr int kUnitTokens = 128;       // the largest unit
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

// Formats that get code of their own: those of head dims 64, 128, ... at 2 bits.
constexpr struct {
  int page_tokens = 64, value_group = 64, key_bits = 2, value_bits = 2;
} kUsual;

// Everything a task holds, in scratch memory. Rows are padded to NR; padding rows hold zeros and are never written out.
template <int NR>
struct Block {
  float *q, *q_columns;   // [NR][D], [NR][C]: times scale * log2(e), or scale / softcap
  int16_t* q_pairs;       // [NR][D]: as it came, where that is bfloat16 and has dot products of pairs
  float* q_scaled;        // [NR][C]: q_columns / score_scale
  float* column_weight;   // [C]: of its digit
  float* most_scale;      // [C]: the largest key scale that overflows no row's codes
  float* key_middle;      // [D]: the middle of the range of a channel's code, in scales
  float* sums;            // [NR][Dv]
  float* zero_sums;       // [NR][groups][kLanes]: what value zeros add to every channel of a group
  float* denominators;    // [NR][kLanes]
  float* weights;         // [NR][kUnitTokens]: scores (base 2), then softmax weights
  float* bias;            // [NR][kUnitTokens]: of masks
  float* key_scale;       // [D]
  float* column_scale;    // [C]
  float* value_scale;     // [G]: of one group
  float* weight_scale;    // [groups][NR], rows padded to kMaxRows + kLanes
  int32_t* channels;      // [C]: of each column
  int32_t* columns_of;    // [D]: how many columns a channel has
  int32_t* words;         // [key_code_words][G]: the key codes, tokens side by side
  int16_t* q_codes;       // [NR][C]
  int16_t* weight_codes;  // [groups][NR][G]
  float* maximum;         // [NR]: of scores so far, or a little less
  float* score_scale;     // [NR]: 0 before the first page
  float* score_zero;      // [NR]

  Block(const PageFormat& f, Arena& arena) {
    const int64_t groups = f.value_groups(), tokens = f.page_tokens;
    q = arena.take<float>(NR * f.head_dim);
    q_columns = arena.take<float>(NR * f.key_columns);
    q_pairs = arena.take<int16_t>(NR * f.head_dim);
    q_scaled = arena.take<float>(NR * f.key_columns);
    column_weight = arena.take<float>(f.key_columns);
    most_scale = arena.take<float>(f.key_columns);
    key_middle = arena.take<float>(f.head_dim);
    sums = arena.take<float>(NR * f.value_dim);
    zero_sums = arena.take<float>(NR * groups * kLanes);
    denominators = arena.take<float>(NR * kLanes);
    weights = arena.take<float>(NR * kUnitTokens);
    bias = arena.take<float>(NR * kUnitTokens);
    key_scale = arena.take<float>(f.head_dim < kTablePadding ? kTablePadding : f.head_dim);
    column_scale = arena.take<float>(f.key_columns);
    channels = arena.take<int32_t>(f.key_columns);
    columns_of = arena.take<int32_t>(f.head_dim);
    value_scale = arena.take<float>(tokens);
    words = arena.take<int32_t>(f.key_code_words() * tokens);
    q_codes = arena.take<int16_t>(NR * f.key_columns);
    weight_codes = arena.take<int16_t>(groups * NR * tokens);
    weight_scale = arena.take<float>(groups * (kMaxRows + kLanes));
    maximum = arena.take<float>(NR);
    score_scale = arena.take<float>(NR);
    score_zero = arena.take<float>(kMaxRows + kLanes);  // whole vectors are stored
  }
};

// Which rows and slots a task works on.
struct Range {
  int64_t batch, kv_head;
  int first_row, rows;
};

// Calls f(first row, vector of the rows' results), kLanes rows at most at a time; lanes past NR are unspecified.
template <int NR, class Op, class F>
LOGQUANT_INLINE void reduce_rows(const F32 (&v)[NR], Op op, F&& f) {
  constexpr int kStep = NR < kLanes ? NR : kLanes;
  for (int r = 0; r < NR; r += kStep) f(r, reduce_lanes<kStep>(v + r, op));
}

// ------------------------------------------------------------------------------------------------------------ keys
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

// [G][M * N] words to [M * N][G], N a power of two, M odd: log2(N) rounds of separating even from odd elements, then
// every M-th.
template <int M, int N>
LOGQUANT_INLINE void transpose_words(const int32_t* in, int32_t* out, int tokens) {
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

// Rounds `count` elements x(j) .. x(j + kLanes - 1) to int16 codes; returns the codes' sum, lane by lane. Of NaNs and
// infinities come any codes, so the sum may wrap.
template <class X>
LOGQUANT_INLINE I32 store_codes(int16_t* codes, int count, X&& x) {
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

// Gives the rows whose q times the page's key scales does not fit a scale that it does, with some room for the next
// pages.
template <int NR>
__attribute__((noinline)) void refit_queries(int columns, const float* scales, float most, Block<NR> b) {
  for (int r = 0; r < NR; ++r) {
    const float* const q = b.q_columns + r * columns;
    F32 largest = splat(0.0f);
    for (int j = 0; j < columns; j += kLanes) largest = max_abs(largest, load(q + j) * load(scales + j));
    const float top = reduce(largest, Max{});
    if (b.score_scale[r] != 0.0f && top <= most * b.score_scale[r]) continue;
    b.score_scale[r] = (1.125f * top + 1e-30f) / most;
    const F32 inverse = splat(1.0f / b.score_scale[r]);
    for (int j = 0; j < columns; j += kLanes) store(b.q_scaled + r * columns + j, load(q + j) * inverse);
  }
  for (int j = 0; j < columns; j += kLanes) {
    F32 largest = splat(1e-30f);
    for (int r = 0; r < NR; ++r) largest = max_abs(largest, load(b.q_scaled + r * columns + j));
    store(b.most_scale + j, splat(0.999999f * most) / largest);
  }
}

// Folds the page's key scales into q: int16 codes with one scale per row, and the sum of q times the zeros. The scale
// lasts until a page needs a larger one: what matters is the absolute error of a score, not that relative to its page.
// What rounding took, times the middle of the codes' range, joins the zeros: that halves the error.
template <int NR, int bits>
LOGQUANT_INLINE void fold_queries(const PageFormat& f, const int32_t* page, bool has_map, float most,
                                  const Block<NR>& b) {
  const int dim = f.head_dim, columns = f.key_columns;
  F32 zeros[NR] = {};
  for (int c = 0; c < dim; c += kLanes) {
    const Params p = key_params_at(f, page, c);
    store(b.key_scale + c, p.scale);
    const F32 middle = fma(p.scale, load(b.key_middle + c), p.zero);
    for (int r = 0; r < NR; ++r) zeros[r] = fma(load(b.q + r * dim + c), middle, zeros[r]);
  }
  const float* scales = b.key_scale;
  if (has_map) {
    lookup(b.key_scale, dim, b.channels, columns, b.column_scale);
    scales = b.column_scale;
  }
  bool too_large = false;
  for (int j = 0; j < columns; j += kLanes) too_large |= any_above(load(scales + j), load(b.most_scale + j));
  if (too_large) refit_queries<NR>(columns, scales, most, b);
  constexpr float kMiddle = 0.5f * static_cast<float>(code_mask(bits));
  for (int r = 0; r < NR; ++r) {
    const I32 codes = store_codes(b.q_codes + r * columns, columns, [&](int j) __attribute__((always_inline)) {
      return load(b.q_scaled + r * columns + j) * load(scales + j);
    });
    zeros[r] = fma(to_float(codes), splat(-kMiddle * b.score_scale[r]), zeros[r]);
  }
  reduce_rows<NR>(zeros, Add{}, [&](int r, F32 sums) { store(b.score_zero + r, sums); });
}

// How many accumulators a row has for each vector of lanes. With few rows, codes stay where they are in the word, and
// those of each place have a sum of their own: fewer shifts, and more additions that do not wait for each other.
template <int NR, int bits>
constexpr int kSums = kAccumulators / (4 * NR) < 1          ? 1
                      : kAccumulators / (4 * NR) < 8 / bits ? kAccumulators / (4 * NR)
                                                            : 8 / bits;

// The largest magnitude of an int16 code that cannot overflow the sums over count elements.
template <int NR, int bits>
constexpr float most_code(int count) {
  constexpr int kLargest = static_cast<int>(code_mask(bits)) << (bits * (kSums<NR, bits> - 1));
  const float most = 2147483520.0f / (static_cast<float>(count / kSums<NR, bits>) * kLargest);
  return most < kMostCode ? most : kMostCode;
}

// Integer dot products of NR rows of int16 pairs with kBlock vectors of codes, down `count` words of each lane;
// finish(r, k, sum) takes the results.
template <int NR, int bits, int kBlock, class Finish>
LOGQUANT_INLINE void dot_codes(const int32_t* words, int count, int64_t stride, const int16_t* row_codes,
                               int codes_per_row, Prefetcher& ahead, int lines, Finish&& finish) {
  constexpr int kPairs = 16 / bits;  // pairs of elements in a word
  constexpr int kSets = kSums<NR, bits>;
  const int32_t* const row_pairs = reinterpret_cast<const int32_t*>(row_codes);
  I32 sum[kSets][NR][kBlock] = {};
  for (int w = 0; w < count; ++w) {
    ahead.lines(lines);
    I32 x[kBlock];
    for (int k = 0; k < kBlock; ++k) x[k] = load(words + w * stride + k * kLanes);
    unroll<kPairs>([&](auto i) __attribute__((always_inline)) {
      constexpr int kSet = i % kSets, kShift = bits * (i - kSet);
      constexpr int kMask = static_cast<int>(lane_mask(bits)) << (bits * kSet);
      I32 codes[kBlock];
      for (int k = 0; k < kBlock; ++k) codes[k] = (kShift == 0 ? x[k] : shift_right(x[k], kShift)) & kMask;
      for (int r = 0; r < NR; ++r) {
        const I32 pair = splat(row_pairs[r * (codes_per_row / 2) + w * kPairs + i]);
        for (int k = 0; k < kBlock; ++k) sum[kSet][r][k] = dot_pairs(sum[kSet][r][k], codes[k], pair);
      }
    });
  }
  for (int r = 0; r < NR; ++r) {
    for (int k = 0; k < kBlock; ++k) {
      I32 total = sum[0][r][k];
      for (int set = 1; set < kSets; ++set) total += sum[set][r][k] >> (bits * set);
      finish(r, k, to_float(total));
    }
  }
}

template <int NR>
constexpr int kVectors = kAccumulators / NR < 4 ? kAccumulators / NR : 4;  // of lanes in a dot_codes

// weights[r][t] = score_scale[r] * (q_codes[r] . codes[t]) + score_zero[r]
template <int NR, int bits>
LOGQUANT_INLINE void key_scores(const PageFormat& f, const Block<NR>& b, Prefetcher& ahead, int lines) {
  const auto block = [&](auto vectors, int t) __attribute__((always_inline)) {
    dot_codes<NR, bits, vectors>(b.words + t, f.key_code_words(), f.page_tokens, b.q_codes, f.key_columns, ahead, lines,
                                 [&](int r, int k, F32 sum) __attribute__((always_inline)) {
                                   store(b.weights + r * kUnitTokens + t + k * kLanes,
                                         fma(sum, splat(b.score_scale[r]), splat(b.score_zero[r])));
                                 });
  };
  int t = 0;
  for (; t + kVectors<NR> * kLanes <= f.page_tokens; t += kVectors<NR> * kLanes) {
    block(std::integral_constant<int, kVectors<NR>>{}, t);
  }
  if (t < f.page_tokens) block(std::integral_constant<int, 2>{}, t);  // 32 tokens in vectors of 16
}

// The same, of sums from tiles.
template <int NR>
LOGQUANT_INLINE void key_scores(const PageFormat& f, const PageTiles<NR>& tiles, const Block<NR>& b) {
  for (int r = 0; r < NR; ++r) {
    float* const row = b.weights + r * kUnitTokens;
    const F32 scale = splat(b.score_scale[r]), zero = splat(b.score_zero[r]);
    tiles.keys.sums(r, 0, f.page_tokens,
                    [&](int64_t t, F32 sum) __attribute__((always_inline)) { store(row + t, fma(sum, scale, zero)); });
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
// Returns whether any of it is not 0.
template <int NR>
__attribute__((noinline)) bool load_bias(const AttendArgs& args, Range range, int64_t first_slot, int tokens,
                                         Block<NR> b) {
  const int32_t* const positions =
      args.positions == nullptr ? nullptr : args.positions + range.batch * args.positions_batch_stride + first_slot;
  const bool has_mask = args.mask_kind != AttendArgs::MaskKind::kNone;
  I32 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  I32 nonzero = splat(0);
  for (int r = 0; r < range.rows; ++r) {
    const int64_t row = range.first_row + r, query = row % args.queries;
    float* const out = b.bias + r * kUnitTokens;
    // Heads that share a mask share its rows.
    if (r >= args.queries && args.mask_head_stride == 0) {
      __builtin_memcpy(out, out - args.queries * kUnitTokens, sizeof(float) * kUnitTokens);
      continue;
    }
    const int32_t last = args.query_positions == nullptr
                             ? INT32_MAX
                             : args.query_positions[range.batch * args.query_positions_batch_stride + query];
    int i = 0;
    if (!has_mask) {
      for (; i + kLanes <= tokens; i += kLanes) {
        const I32 position = positions == nullptr ? lanes + static_cast<int32_t>(first_slot + i) : load(positions + i);
        const F32 value = select((position < 0) | (position > last), splat(-kInfinity), splat(0.0f));
        nonzero |= bits_as<I32>(value);
        store(out + i, value);
      }
    }
    const int64_t head = range.kv_head * args.group + row / args.queries;
    const int64_t base =
        range.batch * args.mask_batch_stride + head * args.mask_head_stride + query * args.mask_query_stride;
    for (; i < tokens; ++i) {
      const int64_t position = positions == nullptr ? first_slot + i : positions[i];
      float value = 0.0f;
      if (position < 0 || position > last || (has_mask && position >= args.mask_positions)) {
        value = -kInfinity;
      } else if (has_mask) {
        value = float_of(args.mask_kind, args.mask, base + position * args.mask_position_stride);
      }
      out[i] = value <= kHidden ? -kInfinity : value * kLog2e;
      nonzero[0] |= out[i] != 0.0f;
    }
  }
  return any_above(abs(to_float(nonzero)), splat(0.0f));
}

// --------------------------------------------------------------------------------------------------------- softmax
// 2 * log2(e) * x and no cancellation for large x: tanh(x) = 1 - 2 / (exp(2x) + 1).
LOGQUANT_INLINE F32 tanh(F32 x) {
  const F32 bounded = max(splat(-15.0f), min(splat(15.0f), x));
  const F32 clamped = select(is_nonfinite(x), x, bounded);
  return 1.0f - 2.0f / (exp2(clamped * (2.0f * kLog2e)) + 1.0f);
}

template <int NR>
__attribute__((noinline)) void raise_maximum(PageFormat f, int r, float maximum, Block<NR> b) {
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
LOGQUANT_INLINE void softmax(const AttendArgs& args, int tokens, bool biased, const Block<NR>& b) {
  for (int r = 0; r < NR; ++r) {
    float* const row = b.weights + r * kUnitTokens;
    const float* const bias = b.bias + r * kUnitTokens;
    F32 top = splat(-kInfinity);
    for (int t = 0; t < tokens; t += kLanes) {
      F32 x = load(row + t);
      if (args.softcap > 0.0f) x = splat(args.softcap * kLog2e) * tanh(x);
      if (biased) {
        const F32 add = load(bias + t);
        x = select(add == splat(-kInfinity), add, x + add);
      }
      if (args.softcap > 0.0f || biased) store(row + t, x);
      top = max(top, x);
    }
    if (any_above(top, splat(b.maximum[r] + kSlack))) {
      raise_maximum(args.format, r, reduce(max(splat(b.maximum[r]), top), Max{}), b);
    }
    const F32 maximum = splat(b.maximum[r]);
    F32 sum = load(b.denominators + r * kLanes);
    for (int t = 0; t < tokens; t += kLanes) {
      const F32 x = load(row + t);
      F32 weight = exp2(x - maximum);
      if (biased) weight = select(x == splat(-kInfinity), splat(0.0f), weight);
      sum += weight;
      store(row + t, weight);
    }
    store(b.denominators + r * kLanes, sum);
  }
}

// ---------------------------------------------------------------------------------------------------------- values
// Folds the value scales of a group into the weights: int16 codes with one scale per row; sums up the zeros, and what
// rounding took, as for queries.
template <int NR, int bits>
LOGQUANT_INLINE void fold_weights(const PageFormat& f, const int32_t* page, bool biased, int group, float* scale,
                                  int16_t* codes, const Block<NR>& b) {
  constexpr float kMiddle = 0.5f * static_cast<float>(code_mask(bits));
  const int tokens = f.page_tokens, groups = f.value_groups();
  // 8-bit parameters have their zero where the middle of the codes stands for 0.
  const bool symmetric = f.value_param_bits == 8;
  F32 largest[NR] = {}, zero_sums[NR];
  for (int r = 0; r < NR; ++r) zero_sums[r] = load(b.zero_sums + (r * groups + group) * kLanes);
  for (int t = 0; t < tokens; t += kLanes) {
    const auto [scale_t, zero_t] = value_params_at(f, page, group * tokens + t);
    store(b.value_scale + t, scale_t);
    const F32 middle = fma(scale_t, splat(kMiddle), zero_t);
    const bool counts = !symmetric || any_above(zero_t, splat(kInfinity));
    for (int r = 0; r < NR; ++r) {
      const F32 weight = load(b.weights + r * kUnitTokens + t);
      largest[r] = max(largest[r], weight * scale_t);
      if (!counts) continue;
      // A token that the row does not see must not poison it with a NaN.
      const F32 seen = biased ? select(weight == splat(0.0f), splat(0.0f), middle) : middle;
      zero_sums[r] = fma(weight, seen, zero_sums[r]);
    }
  }
  float inverse[kMaxRows + kLanes];
  reduce_rows<NR>(largest, Max{}, [&](int r, F32 tops) {
    tops += 1e-30f;
    store(scale + r, tops * (1.0f / kMostCode));
    store(inverse + r, kMostCode / tops);
  });
  for (int r = 0; r < NR; ++r) {
    const F32 factor = splat(inverse[r]);
    const I32 sum = store_codes(codes + r * tokens, tokens, [&](int t) __attribute__((always_inline)) {
      return load(b.weights + r * kUnitTokens + t) * load(b.value_scale + t) * factor;
    });
    store(b.zero_sums + (r * groups + group) * kLanes, fma(to_float(sum), splat(-kMiddle * scale[r]), zero_sums[r]));
  }
}

// sums[r][c] += scale[r] * (weight_codes[r] . codes of channel c), group by group
template <int NR, int bits>
LOGQUANT_INLINE void add_values(const PageFormat& f, const int32_t* page, bool biased, const Block<NR>& b,
                                Prefetcher& ahead, int lines) {
  // Every group is folded before the first is summed: they wait for their divisions together.
  const int scale_size = kMaxRows + kLanes, codes_size = NR * f.page_tokens;
  for (int group = 0; group < f.value_groups(); ++group) {
    fold_weights<NR, bits>(f, page, biased, group, b.weight_scale + group * scale_size,
                           b.weight_codes + group * codes_size, b);
  }
  if constexpr (kTiled<NR>) return;  // tiles sum
  for (int group = 0; group < f.value_groups(); ++group) {
    const float* const scale = b.weight_scale + group * scale_size;
    const auto block = [&](auto vectors, int c) __attribute__((always_inline)) {
      dot_codes<NR, bits, vectors>(page + f.value_codes() + c, f.value_code_rows(), f.value_dim,
                                   b.weight_codes + group * codes_size, f.page_tokens, ahead, lines,
                                   [&](int r, int k, F32 sum) __attribute__((always_inline)) {
                                     float* const p = b.sums + r * f.value_dim + c + k * kLanes;
                                     store(p, fma(sum, splat(scale[r]), load(p)));
                                   });
    };
    int c = group * f.value_group;
    const int end = c + f.value_group;
    for (; c + kVectors<NR> * kLanes <= end; c += kVectors<NR> * kLanes) {
      block(std::integral_constant<int, kVectors<NR>>{}, c);
    }
    for (; c < end; c += kLanes) block(std::integral_constant<int, 1>{}, c);
  }
}

// The same once weights are folded, of sums from tiles.
template <int NR>
LOGQUANT_INLINE void add_values(const PageFormat& f, const PageTiles<NR>& tiles, const Block<NR>& b) {
  for (int group = 0; group < f.value_groups(); ++group) {
    const float* const scale = b.weight_scale + group * (kMaxRows + kLanes);
    const int first = group * f.value_group, last = first + f.value_group;
    for (int r = 0; r < NR; ++r) {
      float* const row = b.sums + r * f.value_dim;
      const F32 factor = splat(scale[r]);
      tiles.values.sums(r, first, last, [&](int64_t c, F32 sum) __attribute__((always_inline)) {
        store(row + c, fma(sum, factor, load(row + c)));
      });
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- window
// Sums of window_scores, which has fewer operands than dot_codes; AVX2 has 16 registers for all.
constexpr int kWindowSums = kLanes == 8 ? 8 : 16;
template <int NR>
constexpr int kWindowTokens = kWindowSums / NR < 4 ? kWindowSums / NR : 4;  // at a time

// With pairs, of bfloat16, q is multiplied as it came, and the scores by `factor`.
template <int NR, Dtype dtype, bool pairs>
LOGQUANT_INLINE void window_scores(const PageFormat& f, const void* k, int64_t stride, int tokens, float factor,
                                   const Block<NR>& b) {
  constexpr int kBlock = kWindowTokens<NR>, kTotals = NR * kBlock, kStep = kTotals < kLanes ? kTotals : kLanes;
  const int dim = f.head_dim;
  for (int t = 0; t < tokens; t += kBlock) {
    F32 sum[kTotals];
    unroll<kTotals>([&](auto i) __attribute__((always_inline)) { sum[i] = splat(0.0f); });
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
            [&](int row) __attribute__((always_inline)) { return pairs_at(b.q_pairs + row + c); }, dot_bfloat16);
      };
      int c = 0;
      for (; c + 2 * kLanes <= dim; c += 2 * kLanes) add_pairs(both, c);
      if (c < dim) add_pairs(with_zeros, c);
    } else {
      for (int c = 0; c < dim; c += kLanes) {
        add([&](int64_t row) __attribute__((always_inline)) { return load_elements<dtype>(k, row + c); },
            [&](int row) __attribute__((always_inline)) { return load(b.q + row + c); },
            [](F32 to, F32 q, F32 x) __attribute__((always_inline)) { return fma(q, x, to); });
      }
    }
    unroll<kTotals / kStep>([&](auto part) __attribute__((always_inline)) {
      F32 total = reduce_lanes<kStep>(sum + part * kStep, Add{});
      if (pairs) total *= splat(factor);
      float totals[kLanes];
      store(totals, total);
      unroll<kStep / kBlock>([&](auto i) __attribute__((always_inline)) {
        constexpr int kRow = part * (kStep / kBlock) + i;
        __builtin_memcpy(b.weights + kRow * kUnitTokens + t, totals + i * kBlock, sizeof(float) * kBlock);
      });
    });
  }
}

template <int NR, Dtype dtype, bool biased>
LOGQUANT_INLINE void window_values(const PageFormat& f, const void* v, int64_t stride, int tokens, const Block<NR>& b) {
  constexpr int kBlock = kVectors<NR>;
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
// What each column of the keys stands for: its channel, its weight, and the middle of each channel's codes.
template <int NR>
void load_columns(const PageFormat& f, const int16_t* map, const Block<NR>& b) {
  int32_t middles[8] = {};  // by the number of columns, as bits
  for (int n = 1; n * f.key_bits <= kMaxCodeBits; ++n) {
    float weights = 0.0f;
    for (int digit = 0; digit < n; ++digit) weights += digit_weight(f, digit, n);
    middles[n] = bits_as<int32_t>(0.5f * static_cast<float>(code_mask(f.key_bits)) * weights);
  }
  count_columns(f, map, b.columns_of);
  for (int c = 0; c < f.head_dim; c += kLanes) {
    store(b.key_middle + c, bits_as<F32>(lookup(middles, load(b.columns_of + c))));
  }
  for (int j = 0; j < f.key_columns; j += kLanes) {
    if (map == nullptr) {
      store(b.column_weight + j, splat(digit_weight(f, 0, 1)));
      continue;
    }
    const I32 column = load_u16(reinterpret_cast<const uint16_t*>(map + j)), channel = column_channel(column);
    store(b.channels + j, channel);
    const I32 exponent = f.digit_exponent(column_digit(column), gather(b.columns_of, channel));
    store(b.column_weight + j, bits_as<F32>((exponent + 127) << 23));
  }
}

LOGQUANT_INLINE float score_factor(const AttendArgs& args) {
  return args.softcap > 0.0f ? args.scale / args.softcap : args.scale * kLog2e;
}

template <int NR>
void load_queries(const AttendArgs& args, const Range& range, const int16_t* map, const Block<NR>& b) {
  const PageFormat& f = args.format;
  const float factor = score_factor(args);
  load_columns<NR>(f, map, b);
  for (int r = 0; r < NR; ++r) {
    float* const q = b.q + r * f.head_dim;
    float* const q_columns = b.q_columns + r * f.key_columns;
    if (r >= range.rows) {
      for (int c = 0; c < f.head_dim; c += kLanes) store(q + c, splat(0.0f));
      __builtin_memset(b.q_pairs + r * f.head_dim, 0, sizeof(int16_t) * f.head_dim);
    } else {
      const int64_t row = range.first_row + r, head = range.kv_head * args.group + row / args.queries;
      const int64_t first =
          range.batch * args.q.batch_stride + head * args.q.head_stride + row % args.queries * args.q.token_stride;
      with_dtype(args.q.dtype, [&](auto type) {
        for (int c = 0; c < f.head_dim; c += kLanes) {
          store(q + c, load_elements<type>(args.q.data, first + c) * factor);
        }
        if (kHasBFloat16Dots && type == Dtype::kBFloat16) {
          const int16_t* const as_is = static_cast<const int16_t*>(args.q.data) + first;
          __builtin_memcpy(b.q_pairs + r * f.head_dim, as_is, sizeof(int16_t) * f.head_dim);
        }
      });
    }
    const float* columns = q;
    if (map != nullptr) {
      lookup(q, f.head_dim, b.channels, f.key_columns, q_columns);
      columns = q_columns;
    }
    for (int j = 0; j < f.key_columns; j += kLanes) {
      store(q_columns + j, load(columns + j) * load(b.column_weight + j));
    }
  }
}

// Pages hold rotated values and the window does not: once a task's pages are summed, the sums are rotated back.
template <int NR>
LOGQUANT_INLINE void rotate_back(const PageFormat& f, const Block<NR>& b) {
  for (int r = 0; r < NR; ++r) {
    float* const sums = b.sums + r * f.value_dim;
    for (int g = 0; g < f.value_groups(); ++g) {
      float* const zero_sums = b.zero_sums + (r * f.value_groups() + g) * kLanes;
      const F32 zeros = splat(reduce(load(zero_sums), Add{}));
      for (int c = g * f.value_group; c < (g + 1) * f.value_group; c += kLanes) store(sums + c, load(sums + c) + zeros);
      store(zero_sums, splat(0.0f));
    }
    hadamard(sums, f.value_dim, f.hadamard_block());
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

// Adds pages first .. end - 1; up to page_count there are others, which come next. Formats as they usually are have
// their sizes as constants, and nothing here has its address taken by a call: then no store can change it, and the
// compiler keeps it in registers.
template <int NR, bool usual>
__attribute__((noinline)) void add_pages(const AttendArgs& args, Range range, Block<NR> b,
                                         [[maybe_unused]] PageTiles<NR> tiles, int64_t first, int64_t end,
                                         int64_t page_count) {
  PageFormat f = args.format;
  if (usual) {
    f.page_tokens = kUsual.page_tokens;
    f.value_group = kUsual.value_group;
    f.key_bits = kUsual.key_bits;
    f.value_bits = kUsual.value_bits;
  }
  const bool has_map = args.key_map.data != nullptr, has_bias = args.has_bias();
  float most = 0.0f;
  with_bits(f.key_bits, [&](auto bits) __attribute__((always_inline)) { most = most_code<NR, bits>(f.key_columns); });
  const int32_t* const pages =
      args.pages.data + range.batch * args.pages.batch_stride + range.kv_head * args.pages.head_stride;
  const int32_t* const table =
      args.page_table == nullptr ? nullptr : args.page_table + range.batch * args.page_table_batch_stride;
  const int64_t stride = args.pages.page_stride;
  const auto page_at = [=](int64_t p) __attribute__((always_inline)) {
    return pages + (table == nullptr ? p : table[p]) * stride;
  };
  const int code_words = f.page_tokens * f.key_code_words() + f.value_dim * f.value_code_rows();
  const int steps = code_words / (kVectors<NR> * kLanes) + 1;
  const int lines = (4 * f.words() / kCacheLine + steps - 1) / steps;
  [[maybe_unused]] const auto unpack_keys = [&](const int32_t* page, Prefetcher& ahead) __attribute__((always_inline)) {
    load_key_words(f, page, b.words);
    if constexpr (kTiled<NR>) {
      tiles.keys.unpack(b.words, [&]() __attribute__((always_inline)) { ahead.lines(1); });
    }
  };
  if constexpr (kTiled<NR>) {
    if (first >= end) return;
    tiles.start();
    Prefetcher nothing;
    unpack_keys(page_at(first), nothing);
  }
  constexpr int kAhead = kTiled<NR> ? 2 : 1;  // tiles have the next page's keys unpacked by the end of a page
  for (int64_t p = first; p < end; ++p) {
    const int32_t* const page = page_at(p);
    Prefetcher ahead;
    if (p + kAhead < page_count) {  // of the next split, too: the same thread mostly
      ahead.at = reinterpret_cast<const char*>(page_at(p + kAhead));
      ahead.end = ahead.at + 4 * f.words();
    }
    if constexpr (kTiled<NR>) {
      ahead.lines(4 * (f.words() - code_words) / kCacheLine);  // then one each time a line of codes is unpacked
    } else {
      load_key_words(f, page, b.words);
    }
    with_bits(f.key_bits, [&](auto bits) __attribute__((always_inline)) {
      fold_queries<NR, bits>(f, page, has_map, most, b);
      if constexpr (!kTiled<NR>) key_scores<NR, bits>(f, b, ahead, lines);
    });
    if constexpr (kTiled<NR>) {
      tiles.keys.split(b.q_codes);
      if (p > first) add_values(f, tiles, b);  // the previous page's
      tiles.keys.multiply();
      tiles.values.unpack(page + f.value_codes(), [&]() __attribute__((always_inline)) { ahead.lines(1); });
      key_scores(f, tiles, b);
    }
    const bool biased = has_bias && load_bias(args, range, p * f.page_tokens, f.page_tokens, b);
    softmax<NR>(args, f.page_tokens, biased, b);
    with_bits(f.value_bits, [&](auto bits) __attribute__((always_inline)) {
      add_values<NR, bits>(f, page, biased, b, ahead, lines);
    });
    if constexpr (kTiled<NR>) {
      tiles.values.split(b.weight_codes);
      if (p + 1 < end) unpack_keys(page_at(p + 1), ahead);
      tiles.values.multiply();
    }
  }
  if constexpr (kTiled<NR>) {
    add_values(f, tiles, b);
    tiles.stop();
  }
}

template <int NR>
void attend_rows(const AttendArgs& args, const AttendPlan& plan, const Range& range, int64_t head, int64_t split) {
  const PageFormat f = args.format;
  Arena measure(nullptr);
  Block<NR> sizes(f, measure);
  PageTiles<NR> tile_sizes(f, measure);
  Arena arena(thread_scratch(measure.used()));
  const Block<NR> b(f, arena);
  const PageTiles<NR> tiles(f, arena);  // after the codes, past whose end it reads
  const int16_t* const map = args.key_map.of(range.batch, range.kv_head);
  load_queries(args, range, map, b);
  for (int i = 0; i < f.key_columns; i += kLanes) store(b.most_scale + i, splat(-1.0f));  // the first page refits
  for (int i = 0; i < NR * f.value_dim; i += kLanes) store(b.sums + i, splat(0.0f));
  for (int i = 0; i < NR * f.value_groups() * kLanes; i += kLanes) store(b.zero_sums + i, splat(0.0f));
  for (int i = 0; i < NR * kLanes; i += kLanes) store(b.denominators + i, splat(0.0f));
  for (int i = 0; i < NR * kUnitTokens; i += kLanes) store(b.bias + i, splat(0.0f));
  for (int r = 0; r < NR; ++r) {
    b.maximum[r] = kNothingSeen;
    b.score_scale[r] = 0.0f;
  }

  int64_t pages = args.page_count, window_tokens = args.window_tokens;
  if (args.lengths != nullptr) {
    pages = args.lengths[range.batch * args.lengths_batch_stride];
    window_tokens = args.lengths[range.batch * args.lengths_batch_stride + 1];
  }
  const int64_t first = split * plan.units_per_split, last = smaller(plan.units, first + plan.units_per_split);
  const int64_t page_end = smaller(last, pages);
  const bool usual = f.page_tokens == kUsual.page_tokens && f.value_group == kUsual.value_group &&
                     f.key_bits == kUsual.key_bits && f.value_bits == kUsual.value_bits;
  if (usual) {
    add_pages<NR, true>(args, range, b, tiles, first, page_end, pages);
  } else {
    add_pages<NR, false>(args, range, b, tiles, first, page_end, pages);
  }

  if (f.hadamard_block() > 1 && first < page_end) rotate_back<NR>(f, b);

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
      const auto scores = [&](auto pairs) __attribute__((always_inline)) {
        window_scores<NR, type, pairs>(f, window(args.window_k, start), args.window_k.token_stride, tokens,
                                       score_factor(args), b);
      };
      constexpr bool kMayPair = kHasBFloat16Dots && type == Dtype::kBFloat16;
      if (kMayPair && args.q.dtype == Dtype::kBFloat16) {
        scores(std::bool_constant<kMayPair>{});
      } else {
        scores(std::false_type{});
      }
      for (int r = 0; r < NR; ++r) {
        for (int t = tokens; t < padded; ++t) b.weights[r * kUnitTokens + t] = -kInfinity;
      }
      const bool biased = args.has_bias() && load_bias(args, range, args.page_count * f.page_tokens + start, tokens, b);
      if (biased) {
        for (int r = 0; r < NR; ++r) {
          for (int t = tokens; t < padded; ++t) b.bias[r * kUnitTokens + t] = -kInfinity;
        }
      }
      softmax<NR>(args, padded, biased, b);
      const void* const values = window(args.window_v, start);
      const int64_t stride = args.window_v.token_stride;
      if (biased) {
        window_values<NR, type, true>(f, values, stride, tokens, b);
      } else {
        window_values<NR, type, false>(f, values, stride, tokens, b);
      }
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
      if (sink > kNothingSeen) denominator = exp2(splat(sink - maximum))[0];
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
