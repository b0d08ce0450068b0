// Quantises the keys or the values of one page, a block of kQuantizeThreads threads at a time; for quantize and evict.
//
// Bit for bit the quantiser of logquant/ops/reference: every operation is one correctly rounded fp32 operation (hence
// the __f*_rn, which nvcc does not fuse). 16-bit parameters are minimum and maximum, 8-bit ones come from the search of
// fit.cuh. The source is read twice, parameters then codes; a page of a head (16 KB of keys for 64 tokens of dim 128)
// stays in L1 in between. Rotated values are read once and kept in shared memory. With feedback they are read three
// times, again from L1 or L2, and the half of the factors that counts (8 KB for 64 tokens) twice.
#pragma once

#include "fit.cuh"

namespace logquant::cuda {

inline constexpr int kQuantizeThreads = 256;

// Token t of the page is row(t) of `data`, which has `stride` elements between rows.
template <class T, class Rows>
struct PageSource {
  const T* data;
  int64_t stride;
  bool aligned;
  Rows row;
};

struct Group {
  float scale, inverse, zero;  // as stored, of codes
};

LOGQUANT_DEVICE float saturate(float x) { return fminf(fmaxf(x, -kParamMax), kParamMax); }
// For the search, which wants no infinities; that there was one is not lost.
LOGQUANT_DEVICE float settled(float x) { return is_finite(x) ? saturate(x) : NAN; }

// low is a NaN for a group with an element that is not finite. + 0.0f turns -0.0 into 0.0.
LOGQUANT_DEVICE Group store_group(uint16_t* scale_at, uint16_t* zero_at, float low, float high, float levels) {
  const bool finite = low == low;
  const float range = __fadd_rn(__fsub_rn(high, low), 0.0f);
  const uint16_t scale = finite ? float_to_half(fminf(__fdiv_rn(range, levels), kParamMax)) : uint16_t{0};
  const uint16_t zero = finite ? float_to_half(saturate(__fadd_rn(low, 0.0f))) : kPoison;
  *scale_at = scale;
  *zero_at = zero;
  const float s = half_to_float(scale);
  return {s, __frcp_rn(s), half_to_float(zero)};
}

LOGQUANT_DEVICE Group group_of(const Fit& fit) {
  return {fit.finite ? fit.scale.value : 0.0f, __frcp_rn(fit.scale.value), fit.zero.value};
}

LOGQUANT_DEVICE uint32_t code_of(float x, const Group& group, float levels) {
  if (!(group.scale > 0.0f)) return 0;
  return static_cast<uint32_t>(fminf(fmaxf(rintf(__fmul_rn(__fsub_rn(x, group.zero), group.inverse)), 0.0f), levels));
}

inline constexpr int kQuantizeWarps = kQuantizeThreads / 32;
// Four blocks of that much fit on an SM. Large groups leave room for fewer warps, and have fewer pieces of work.
inline constexpr int kFitBytes = 40 << 10;

// What a warp rotates, fits and packs at a time: one group of the tokens that share words, and their parameters.
LOGQUANT_HOST_DEVICE constexpr int value_fit_bytes(const PageFormat& f) {
  const int row = fit_pitch(f.value_group) * static_cast<int>(sizeof(float)) + static_cast<int>(sizeof(Group));
  return elements_per_word(f.value_bits) * row;
}
LOGQUANT_HOST_DEVICE constexpr int value_fit_warps(const PageFormat& f) {
  const int warps = kFitBytes / value_fit_bytes(f);
  return warps < 1 ? 1 : warps > kQuantizeWarps ? kQuantizeWarps : warps;
}

// What a block works on at a time where values are fed back. Of `span` channels (whole groups) it fits `rows` tokens at
// a time; errors are passed on within `strip` channels (whole Hadamard blocks) of all tokens. Both lie in shared
// memory. They are the same where all tokens of a group fit there, and a span is then as many groups as leave room for
// four blocks on an SM: 128 channels of 64 tokens take 38 KB. A larger group (from 176 channels of 128 tokens on) is
// cut into strips, and these are computed again for each set of rows.
struct FeedbackTile {
  int span, strip, rows, groups;  // groups: of a span
  LOGQUANT_HOST_DEVICE constexpr bool whole() const { return span == strip; }
};
inline constexpr int kFeedbackTokens = 8;        // whose errors are passed on together
inline constexpr int kFeedbackBytes = 96 << 10;  // every device has as much
inline constexpr int kFeedbackRowBytes = 33 << 10;

constexpr int feedback_bytes(const PageFormat& f, const FeedbackTile& tile) {
  const int strip = f.page_tokens * fit_pitch(tile.strip), rows = tile.whole() ? 0 : tile.rows * fit_pitch(tile.span);
  const int groups = 2 * f.page_tokens * tile.groups * static_cast<int>(sizeof(Group));
  return static_cast<int>(sizeof(float)) * (strip + rows + f.page_tokens * kFeedbackTokens) + groups;
}
constexpr FeedbackTile feedback_tile(const PageFormat& f) {
  const int group = f.value_group, tokens = f.page_tokens;
  FeedbackTile tile{group, group, tokens, 1};
  if (feedback_bytes(f, tile) > kFeedbackBytes) {
    tile = {group, f.hadamard_block(), kFitGroups, 1};
    while (2 * tile.rows * fit_pitch(group) * static_cast<int>(sizeof(float)) <= kFeedbackRowBytes) tile.rows *= 2;
    return tile;
  }
  for (int span = group; span <= f.value_dim; span += group) {
    const FeedbackTile larger{span, span, tokens, span / group};
    if (f.value_dim % span == 0 && feedback_bytes(f, larger) <= kFitBytes) tile = larger;
  }
  return tile;
}

// Whether a block works on a tile: with feedback, and for fine values, whose digits share words across rows.
LOGQUANT_HOST_DEVICE constexpr bool needs_feedback_tile(const PageFormat& f, bool feedback) {
  return f.value_param_bits == 8 && (feedback || f.fine_values > 0);
}

// Shared memory of quantize_keys and quantize_values, in bytes.
inline int quantizer_shared(const PageFormat& f, bool feedback) {
  const int range = 4 * kQuantizeThreads * static_cast<int>(sizeof(Range));
  const int key_fit =
      static_cast<int>(sizeof(float)) * (f.page_tokens + kQuantizeWarps * kFitGroups * fit_pitch(f.page_tokens));
  const int keys =
      f.head_dim * static_cast<int>(sizeof(Group) + 2 * sizeof(float)) + (f.key_param_bits == 16 ? range : key_fit);
  const int values = f.value_param_bits == 16 ? f.value_groups() * f.page_tokens * static_cast<int>(sizeof(Group))
                     : needs_feedback_tile(f, feedback) ? feedback_bytes(f, feedback_tile(f))
                                                        : value_fit_warps(f) * value_fit_bytes(f);
  return keys > values ? keys : values;
}

// Minimum and maximum of a channel; of a channel without columns, the mean. A thread takes four channels of every n-th
// token. columns, levels and groups: [head_dim].
template <class T, class Rows>
LOGQUANT_DEVICE void measure_keys(const PageFormat& f, const PageSource<T, Rows>& source, const int* columns,
                                  const float* levels, Group* groups, uint32_t* page, unsigned char* shared) {
  Range* const partial = reinterpret_cast<Range*>(shared);  // [slice][head_dim]
  const int dim = f.head_dim, tokens = f.page_tokens, self = threadIdx.x;
  const int quads = dim / 4, slices = kQuantizeThreads / quads;
  const int quad = self % quads, slice = self / quads;
  if (slice < slices) {
    Range range[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) range[i] = {INFINITY, -INFINITY};
    for (int t = slice; t < tokens; t += slices) {
      const Float4 x = load4(source.data + source.row(t) * source.stride + 4 * quad, source.aligned);
#pragma unroll
      for (int i = 0; i < 4; ++i) range[i].add(x.x[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[slice * dim + 4 * quad + i] = range[i];
  }
  __syncthreads();

  uint16_t* const scales = reinterpret_cast<uint16_t*>(page + f.key_params());
  uint16_t* const zeros = scales + f.key_zeros();
  for (int c = self; c < dim; c += kQuantizeThreads) {
    Range range = partial[c];
    for (int s = 1; s < slices; ++s) range.add(partial[s * dim + c]);
    if (columns[c] == 0 && range.finite()) {  // only the mean, added up token by token, is kept
      float sum = 0.0f;
      for (int t = 0; t < tokens; ++t) {
        sum = __fadd_rn(sum, Element<T>::wide(source.data[source.row(t) * source.stride + c]));
      }
      range.low = range.high = __fdiv_rn(sum, static_cast<float>(tokens));
      if (!is_finite(range.low)) range.low = range.high = sum > 0.0f ? kParamMax : -kParamMax;
    }
    groups[c] = store_group(scales + c, zeros + c, range.low, range.high, fmaxf(levels[c], 1.0f));
  }
}

// The same by the search of fit.cuh. A warp takes eight channels.
template <class T, class Rows>
LOGQUANT_DEVICE void search_keys(const PageFormat& f, const PageSource<T, Rows>& source, const float* weights,
                                 const int* columns, const float* levels, Group* groups, uint32_t* page,
                                 unsigned char* shared) {
  const int tokens = f.page_tokens, pitch = fit_pitch(tokens), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const valid = reinterpret_cast<float*>(shared);          // weights [token]
  float* const own = valid + tokens + warp * kFitGroups * pitch;  // [channel][token]
  for (int t = threadIdx.x; t < tokens; t += kQuantizeThreads) {
    valid[t] = weights == nullptr ? 1.0f : valid_weight(weights[t]);
  }
  __syncthreads();

  uint8_t* const scales = reinterpret_cast<uint8_t*>(page + f.key_params());
  for (int first = warp * kFitGroups; first < f.head_dim; first += kQuantizeWarps * kFitGroups) {
    for (int i = lane; i < 2 * tokens; i += 32) {
      const int t = i / 2, quad = i % 2 * 4;
      const Float4 x = load4(source.data + source.row(t) * source.stride + first + quad, source.aligned);
#pragma unroll
      for (int k = 0; k < 4; ++k) own[(quad + k) * pitch + t] = settled(x.x[k]);
    }
    __syncwarp();
    const int c = first + lane / kFitLanes, part = lane % kFitLanes;
    const float lift = columns[c] == 0 ? 1.0f : __frcp_rn(digit_weight(f, 0, columns[c]));
    const Fit fit = fit_keys({own + lane / kFitLanes * pitch + part, valid + part, tokens}, levels[c], lift);
    if (part == 0) {
      scales[c] = static_cast<uint8_t>(fit.finite ? fit.byte : kPoisonScale);
      scales[f.key_zeros() + c] = static_cast<uint8_t>(fit.finite ? fit.zero_byte : 0);
      groups[c] = group_of(fit);
    }
    __syncwarp();
  }
}

// Parameters first, then a thread takes a word of one token.
template <class T, class Rows>
LOGQUANT_DEVICE void quantize_keys(const PageFormat& f, const PageSource<T, Rows>& source, const int16_t* map,
                                   const float* weights, uint32_t* page, unsigned char* shared) {
  const int dim = f.head_dim, tokens = f.page_tokens, bits = f.key_bits, self = threadIdx.x;
  Group* const groups = reinterpret_cast<Group*>(shared);
  float* const levels = reinterpret_cast<float*>(groups + dim);
  int* const columns = reinterpret_cast<int*>(levels + dim);
  unsigned char* const rest = reinterpret_cast<unsigned char*>(columns + dim);
  for (int c = self; c < dim; c += kQuantizeThreads) {
    // One thread a channel counts its columns: no atomics, and the map is short.
    int count = map == nullptr ? 1 : 0;
    for (int j = 0; map != nullptr && j < f.key_columns; ++j) count += channel_of(map[j], dim) == c;
    columns[c] = count;
    levels[c] = static_cast<float>((1u << min(bits * count, 24)) - 1u);
  }
  const bool fitted = f.key_param_bits == 8;
  if (fitted) {
    search_keys(f, source, weights, columns, levels, groups, page, rest);
  } else {
    measure_keys(f, source, columns, levels, groups, page, rest);
  }
  __syncthreads();

  const int words = f.key_code_words(), elements = elements_per_word(bits);
  for (int i = self; i < tokens * words; i += kQuantizeThreads) {
    const int t = i / words, first = i % words * elements;
    const T* const row = source.data + source.row(t) * source.stride;
    uint32_t word = 0;
    for (int e = 0; e < elements; e += 4) {
      uint32_t codes[4];
      if (map == nullptr) {
        const Float4 x = load4(row + first + e, source.aligned);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float own = fitted ? saturate(x.x[k]) : x.x[k];
          codes[k] = code_of(own, groups[first + e + k], levels[first + e + k]);
        }
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int entry = map[first + e + k], c = channel_of(entry, dim);
          const float x = Element<T>::wide(row[c]);
          codes[k] =
              code_of(fitted ? saturate(x) : x, groups[c], levels[c]) >> bits * column_digit(entry) & code_mask(bits);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) word |= place(codes[k], bits, e + k);
    }
    page[f.key_codes() + i] = word;
  }
}

// A thread first takes a group of one token, then the words of four channels.
template <class T, class Rows>
LOGQUANT_DEVICE void quantize_plain_values(const PageFormat& f, const PageSource<T, Rows>& source, uint32_t* page,
                                           unsigned char* shared) {
  Group* const groups = reinterpret_cast<Group*>(shared);  // [group][page_tokens]
  const int tokens = f.page_tokens, bits = f.value_bits, self = threadIdx.x;
  const float levels = static_cast<float>(code_mask(bits));

  uint16_t* const scales = reinterpret_cast<uint16_t*>(page + f.value_params());
  uint16_t* const zeros = scales + f.value_zeros();
  for (int i = self; i < tokens * f.value_groups(); i += kQuantizeThreads) {
    const int group = i / tokens, t = i % tokens;
    const T* const row = source.data + source.row(t) * source.stride + group * f.value_group;
    Range range{INFINITY, -INFINITY};
    for (int c = 0; c < f.value_group; c += 4) {
      const Float4 x = load4(row + c, source.aligned);
#pragma unroll
      for (int k = 0; k < 4; ++k) range.add(x.x[k]);
    }
    groups[i] = store_group(scales + i, zeros + i, range.low, range.high, levels);
  }
  __syncthreads();

  const int quads = f.value_dim / 4, elements = elements_per_word(bits);
  for (int i = self; i < f.value_code_rows() * quads; i += kQuantizeThreads) {
    const int row = i / quads, c = i % quads * 4;
    const Group* const group = groups + c / f.value_group * tokens;
    uint32_t word[4] = {};
    for (int e = 0; e < elements; ++e) {
      const int t = row * elements + e;
      const Float4 x = load4(source.data + source.row(t) * source.stride + c, source.aligned);
#pragma unroll
      for (int k = 0; k < 4; ++k) word[k] |= place(code_of(x.x[k], group[t], levels), bits, e);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) page[f.value_codes() + row * f.value_dim + c + k] = word[k];
  }
}

// A warp takes one group of the tokens that share words: it rotates them into shared memory, fits their parameters and
// packs the words, a channel a lane.
template <class T, class Rows>
LOGQUANT_DEVICE void quantize_rotated_values(const PageFormat& f, const PageSource<T, Rows>& source, uint32_t* page,
                                             unsigned char* shared) {
  const int bits = f.value_bits, elements = elements_per_word(bits), channels = f.value_group;
  const int pitch = fit_pitch(channels), lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = value_fit_warps(f);
  if (warp >= warps) return;
  float* const x = reinterpret_cast<float*>(shared + warp * value_fit_bytes(f));  // [element][channel]
  Group* const groups = reinterpret_cast<Group*>(x + elements * pitch);           // [element]
  const float levels = static_cast<float>(code_mask(bits));
  uint8_t* const scales = reinterpret_cast<uint8_t*>(page + f.value_params());
  for (int i = warp; i < f.value_code_rows() * f.value_groups(); i += warps) {
    const int row = i / f.value_groups(), group = i % f.value_groups();
    const int first_token = row * elements, first_channel = group * channels;
    const int quads = channels / 4, total = elements * quads;
    for (int j = lane; j - lane < total; j += 32) {  // all lanes, for the rotation
      const int e = j / quads, c = j % quads * 4;
      Float4 four = {};
      if (j < total) {
        four = load4(source.data + source.row(first_token + e) * source.stride + first_channel + c, source.aligned);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) four.x[k] = settled(four.x[k]);
      four = rotated(four, f.hadamard_block());
      if (j < total) store4(x + e * pitch + c, four, true);
    }
    __syncwarp();
    for (int first = 0; first < elements; first += kFitGroups) {
      // A word of four elements leaves half of the lanes without one of their own: they repeat the last.
      const int own = first + lane / kFitLanes, e = min(own, elements - 1), part = lane % kFitLanes;
      const Fit fit = fit_values({x + e * pitch + part, nullptr, channels}, levels);
      if (own == e && part == 0) {
        scales[group * f.page_tokens + first_token + e] = static_cast<uint8_t>(fit.finite ? fit.byte : kPoisonScale);
        groups[e] = group_of(fit);
      }
    }
    __syncwarp();
    for (int c = lane; c < channels; c += 32) {
      uint32_t word = 0;
      for (int e = 0; e < elements; ++e) word |= place(code_of(x[e * pitch + c], groups[e], levels), bits, e);
      page[f.value_codes() + row * f.value_dim + first_channel + c] = word;
    }
    __syncwarp();
  }
}

// x less the errors of `count` tokens.
template <int count>
LOGQUANT_DEVICE float less_errors(float x, const float* factors, const float (&errors)[kFeedbackTokens]) {
#pragma unroll
  for (int first = 0; first < count; first += 4) {
    const Float4 four = load4(factors + first, true);
#pragma unroll
    for (int i = first; i < min(first + 4, count); ++i) {
      x = __fsub_rn(x, __fmul_rn(four.x[i - first], errors[i]));
    }
  }
  return x;
}

// The largest code of a value of token t.
LOGQUANT_DEVICE float value_levels(const PageFormat& f, int t) {
  return static_cast<float>(code_mask(f.value_code_bits(t)));
}

// Codes the first of kFeedbackTokens tokens of a channel, then the next. x, groups: [token], x `pitch` apart; factors:
// [later token][token]; all from `first` of the page on, the first of the tokens.
template <int token = 0>
LOGQUANT_DEVICE void feed_back_among(const PageFormat& f, float* x, int pitch, const Group* groups, int first,
                                     const float* factors, float (&errors)[kFeedbackTokens]) {
  if constexpr (token < kFeedbackTokens) {
    const float own = less_errors<token>(x[token * pitch], factors + token * kFeedbackTokens, errors);
    const Group group = groups[token];
    const float code = static_cast<float>(code_of(own, group, value_levels(f, first + token)));
    const float error = __fsub_rn(own, __fadd_rn(group.zero, __fmul_rn(group.scale, code)));
    errors[token] = group.scale > 0.0f ? error : 0.0f;  // a poisoned group has none
    x[token * pitch] = own;
    feed_back_among<token + 1>(f, x, pitch, groups, first, factors, errors);
  }
}

// Takes each token's error off the later ones, in place, for the first `tokens` tokens of `channels` channels. A thread
// has a channel: it codes kFeedbackTokens tokens and keeps their errors, then takes all of them off each later token;
// that is 2.8 instructions a product, with neighbouring channels in neighbouring banks and the factors broadcast.
//
// x: [token][channel]; groups_at(c): the groups [token] of a channel; feedback: [token][later token]; factors: room for
// those of the tokens at hand, [later token][token].
template <class GroupsAt>
LOGQUANT_DEVICE void feed_back(const PageFormat& f, float* x, int pitch, int channels, int tokens, GroupsAt groups_at,
                               const float* feedback, float* factors) {
  for (int first = 0; first < tokens; first += kFeedbackTokens) {
    const int later = tokens - first;
    for (int i = threadIdx.x; i < kFeedbackTokens * later; i += kQuantizeThreads) {
      const int t = i / later, s = i % later;
      factors[s * kFeedbackTokens + t] = valid_feedback(feedback[(first + t) * f.page_tokens + first + s]);
    }
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += kQuantizeThreads) {
      float* const own = x + first * pitch + c;
      float errors[kFeedbackTokens];
      feed_back_among(f, own, pitch, groups_at(c) + first, first, factors, errors);
      for (int s = kFeedbackTokens; s < later; s += 4) {
#pragma unroll
        for (int i = s; i < s + 4; ++i) {
          own[i * pitch] = less_errors<kFeedbackTokens>(own[i * pitch], factors + i * kFeedbackTokens, errors);
        }
      }
    }
    __syncthreads();
  }
}

// Words of fine digits of `channels` channels, from channel `first` of the page on; the others as for feed_back. A
// thread takes a word, or what these channels have of it.
template <class GroupsAt>
LOGQUANT_DEVICE void pack_fine_digits(const PageFormat& f, const float* x, int pitch, int channels, int first,
                                      GroupsAt groups_at, uint32_t* page) {
  const int span = 16 * f.fine_channels();  // of the words of 16 channels
  const int from = first / span, until = (first + channels + span - 1) / span;
#pragma unroll 1
  for (int i = threadIdx.x; i < 16 * (until - from); i += kQuantizeThreads) {
    const int lowest = (from + i / 16) * span + i % 16 - first;
    uint32_t word = 0;
    for (int c = lowest; c < lowest + span; c += 16) {
      if (c < 0 || c >= channels) continue;
      for (int t = 0; t < f.page_tokens; ++t) {
        if (!f.is_fine(t)) continue;
        const uint32_t code = code_of(x[t * pitch + c], groups_at(c)[t], value_levels(f, t));
        word |= code >> f.value_bits << f.fine_position(first + c, t);
      }
    }
    uint32_t& at = page[f.fine_word(first + lowest)];
    at = lowest >= 0 ? word : at | word;
  }
}

// The same with feedback, and for fine values also without, for their digits are packed once all rows are coded. Three
// rounds: scales are fitted to the values, then to what feedback with these makes of them, and then codes come from
// feedback with the new scales. Without feedback, the second is left out.
template <class T, class Rows>
LOGQUANT_DEVICE void quantize_fed_back_values(const PageFormat& f, const PageSource<T, Rows>& source,
                                              const FeedbackTile& tile, const float* feedback, uint32_t* page,
                                              unsigned char* shared) {
  const int bits = f.value_bits, elements = elements_per_word(bits), tokens = f.page_tokens;
  const int pitch = fit_pitch(tile.strip), row_pitch = fit_pitch(tile.span);
  const int self = threadIdx.x, lane = self % 32, warp = self / 32;
  float* const x = reinterpret_cast<float*>(shared);                                   // [token][channel of the strip]
  float* const factors = x + tokens * pitch;                                           // [later token][token]
  Group* const groups = reinterpret_cast<Group*>(factors + tokens * kFeedbackTokens);  // [round][group][token]
  float* const rows = tile.whole() ? x : reinterpret_cast<float*>(groups + 2 * tile.groups * tokens);
  uint8_t* const scales = reinterpret_cast<uint8_t*>(page + f.value_params());

  for (int span = 0; span < f.value_dim; span += tile.span) {
#pragma unroll 1
    for (int round = 0; round < 3; round += feedback == nullptr ? 2 : 1) {
      const bool last = round == 2;
      const int step = last ? tokens : tile.rows;
      const Group* const old =
          groups + (last && feedback != nullptr ? tile.groups * tokens : 0);  // of the round before
      for (int from = 0; from < tokens; from += step) {
        const int until = from + step;
        for (int strip = 0; strip < tile.span; strip += tile.strip) {
          const int quads = tile.strip / 4, total = until * quads;
          for (int j = self; j - lane < total; j += kQuantizeThreads) {  // all lanes, for the rotation
            const int t = j / quads, c = j % quads * 4;
            Float4 four = {};
            if (j < total) {
              four = load4(source.data + source.row(t) * source.stride + span + strip + c, source.aligned);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) four.x[k] = settled(four.x[k]);
            four = rotated(four, f.hadamard_block());
            if (j < total) store4(x + t * pitch + c, four, true);
          }
          __syncthreads();
          if (round > 0 && feedback != nullptr) {
            const auto groups_at = [&](int c) { return old + (strip + c) / f.value_group * tokens; };
            feed_back(f, x, pitch, tile.strip, until, groups_at, feedback, factors);
          }
          if (last) {
#pragma unroll 1
            for (int i = self; i < f.value_code_rows() * tile.strip; i += kQuantizeThreads) {
              const int row = i / tile.strip, c = i % tile.strip;
              const Group* const own = old + (strip + c) / f.value_group * tokens + row * elements;
              const float* const at = x + row * elements * pitch + c;
              uint32_t word = 0;
              for (int e = 0; e < elements; ++e) {
                const uint32_t code = code_of(at[e * pitch], own[e], value_levels(f, row * elements + e));
                word |= place(code & code_mask(bits), bits, e);
              }
              page[f.value_codes() + row * f.value_dim + span + strip + c] = word;
            }
            if (f.fine_values > 0) {
              const auto groups_at = [&](int c) { return old + (strip + c) / f.value_group * tokens; };
              pack_fine_digits(f, x, pitch, tile.strip, span + strip, groups_at, page);
            }
            __syncthreads();
          } else if (!tile.whole()) {
#pragma unroll 1
            for (int i = self; i < step * tile.strip; i += kQuantizeThreads) {
              const int t = i / tile.strip, c = i % tile.strip;
              rows[t * row_pitch + strip + c] = x[(from + t) * pitch + c];
            }
            __syncthreads();
          }
        }
        if (last) continue;
        for (int i = warp * kFitGroups; i < tile.groups * step; i += kQuantizeWarps * kFitGroups) {
          const int group = i / step, t = i % step + lane / kFitLanes, part = lane % kFitLanes;
          const float levels = value_levels(f, from + t);
          Fit fit = fit_values({rows + t * row_pitch + group * f.value_group + part, nullptr, f.value_group}, levels);
          // Poisoned is what was: large factors make numbers of any size, and more.
          const int at = group * tokens + from + t;
          if (round > 0) fit.finite = groups[at].scale > 0.0f;
          if (part == 0) {
            groups[round * tile.groups * tokens + at] = group_of(fit);
            scales[span / f.value_group * tokens + at] = static_cast<uint8_t>(fit.finite ? fit.byte : kPoisonScale);
          }
        }
        __syncthreads();
      }
    }
  }
}

// feedback: [token][later token], or nullptr
template <class T, class Rows>
LOGQUANT_DEVICE void quantize_values(const PageFormat& f, const PageSource<T, Rows>& source, const FeedbackTile& tile,
                                     const float* feedback, uint32_t* page, unsigned char* shared) {
  if (f.value_param_bits == 16) {
    quantize_plain_values(f, source, page, shared);
  } else if (!needs_feedback_tile(f, feedback != nullptr)) {
    quantize_rotated_values(f, source, page, shared);
  } else {
    quantize_fed_back_values(f, source, tile, feedback, page, shared);
  }
}

}  // namespace logquant::cuda
