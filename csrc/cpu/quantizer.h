// Quantises one page, for quantize and evict, bit for bit as logquant/ops/reference: with 16-bit parameters by minimum
// and maximum, with 8-bit ones by the search of fit.h.
//
// Keys: lanes are channels; min and max run down the page's tokens. Values: lanes are channels, reduced across lanes
// for kLanes tokens at a time. The source is read twice (range, then codes), the second time from cache. Where values
// are rotated, a rotated copy of the page's takes the source's place; to be fitted, lanes are tokens. With feedback
// scales are fitted twice, and each time 2,016 products for each channel of 64 tokens carry errors on.
#pragma once

#include "fit.h"
#include "simd.h"
#include "tasks.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

// Where a page's tokens come from: token t of the page is row rows[t] of k and v.
struct PageSource {
  const void* k;
  const void* v;
  int64_t k_stride, v_stride;  // elements from one row to the next
  const int64_t* rows;
};

struct ScaleZero {
  F32 scale, inverse, zero;  // as stored: rounded to fp16; inverse = 1 / scale
};

// A NaN becomes -kParamMax.
LOGQUANT_INLINE F32 saturate(F32 x) { return min(max(x, splat(-kParamMax)), splat(kParamMax)); }

// Rounds to fp16, writes it, and gives back what was written.
LOGQUANT_INLINE F32 store_param(uint16_t* p, F32 x) {
  store_half(p, x);
  return load_half(p);
}

// + 0.0f turns -0.0 into 0.0: which of the two a minimum or maximum gives differs between processors.
LOGQUANT_INLINE ScaleZero store_scale_zero(uint16_t* scales, uint16_t* zeros, F32 low, F32 high, F32 levels,
                                           I32 nonfinite) {
  const F32 poison = bits_as<F32>(splat(0x7FC00000));
  const F32 scale = select(nonfinite, splat(0.0f), min((high - low + 0.0f) / levels, splat(kParamMax)));
  const F32 zero = select(nonfinite, poison, saturate(low + 0.0f));
  ScaleZero out;
  out.scale = store_param(scales, scale);
  out.zero = store_param(zeros, zero);
  out.inverse = 1.0f / out.scale;
  return out;
}

LOGQUANT_INLINE I32 code_of(F32 x, F32 scale, F32 inverse, F32 zero, F32 levels) {
  const F32 code = min(max((x - zero) * inverse, splat(0.0f)), levels);
  return round_to_int(select(scale > splat(0.0f), code, splat(0.0f)));
}

// Packs a stream of codes into words: vectors of kLanes codes come in, vectors of kLanes words go out.
template <int bits>
class WordPacker {
 public:
  explicit WordPacker(int32_t* words) : words_(words) {
    for (int v = 0; v < kVectors; ++v) {
      for (int lane = 0; lane < kLanes; ++lane) shifts_[v][lane] = bit_position(bits, (v * kLanes + lane) % kElements);
    }
  }

  LOGQUANT_INLINE void push(I32 codes) {
    part_ |= codes << shifts_[vector_];
    if (++vector_ < kVectors) return;
    vector_ = 0;
    parts_[filled_++] = part_;
    part_ = splat(0);
    if (filled_ < kGroup) return;
    filled_ = 0;
    store(words_, reduce_groups<kGroup>(parts_, Or{}));
    words_ += kLanes;
  }

 private:
  static constexpr int kElements = elements_per_word(bits);
  static constexpr int kVectors = kElements > kLanes ? kElements / kLanes : 1;  // vectors that share their words
  static constexpr int kGroup = kElements < kLanes ? kElements : kLanes;        // lanes that share a word

  int32_t* words_;
  I32 shifts_[kVectors], parts_[kGroup], part_ = splat(0);
  int vector_ = 0, filled_ = 0;
};

template <Dtype dtype, int bits>
void quantize_keys(const PageFormat& f, const PageSource& source, const int16_t* map, const float* weights,
                   int32_t* page, Arena& arena) {
  const int dim = f.head_dim, tokens = f.page_tokens;
  float* const scale = arena.take<float>(dim);
  float* const inverse = arena.take<float>(dim);
  float* const zero = arena.take<float>(dim);
  float* const levels = arena.take<float>(dim);
  int32_t* const codes = arena.take<int32_t>(dim < kTablePadding ? kTablePadding : dim);
  int32_t* const columns = arena.take<int32_t>(dim);
  count_columns(f, map, columns);
  for (int c = 0; c < dim; ++c) {
    const int code_bits = bits * columns[c];
    levels[c] = static_cast<float>((1 << (code_bits < 24 ? code_bits : 24)) - 1);
  }

  const bool fitted = f.key_param_bits == 8;
  if (fitted) {
    uint8_t* const scale_bytes = reinterpret_cast<uint8_t*>(page + f.key_params());
    float* const x = arena.take<float>(tokens * kLanes);
    float* const valid_weights = arena.take<float>(tokens);
    for (int t = 0; t < tokens; ++t) {
      const float weight = weights == nullptr ? 1.0f : weights[t];
      valid_weights[t] = valid_weight(weight);
    }
    for (int c = 0; c < dim; c += kLanes) {
      I32 nonfinite = splat(0);
      for (int t = 0; t < tokens; ++t) {
        const F32 element = load_elements<dtype>(source.k, source.rows[t] * source.k_stride + c);
        nonfinite |= is_nonfinite(element);
        store(x + t * kLanes, saturate(element));
      }
      F32 lift;
      for (int lane = 0; lane < kLanes; ++lane) {
        lift[lane] = columns[c + lane] == 0 ? 1.0f : 1.0f / digit_weight(f, 0, columns[c + lane]);
      }
      const KeyFit best = fit_keys(x, valid_weights, tokens, load(levels + c), lift);
      store_u8(scale_bytes + c, select(nonfinite, splat(kPoisonScale), best.byte));
      store_u8(scale_bytes + f.key_zeros() + c, select(nonfinite, splat(0), best.zero_byte));
      store(scale + c, select(nonfinite, splat(0.0f), best.scale));
      store(inverse + c, 1.0f / best.scale);
      store(zero + c, best.zero);
    }
  }
  uint16_t* const scales = reinterpret_cast<uint16_t*>(page + f.key_params());
  uint16_t* const zeros = scales + f.key_zeros();
  for (int c = 0; c < dim && !fitted; c += kLanes) {
    F32 low = splat(kInfinity), high = splat(-kInfinity), sum = splat(0.0f);
    I32 nonfinite = splat(0);
    for (int t = 0; t < tokens; ++t) {
      const F32 x = load_elements<dtype>(source.k, source.rows[t] * source.k_stride + c);
      low = min(x, low);
      high = max(x, high);
      nonfinite |= is_nonfinite(x);
      sum += x;
    }
    // A channel without columns has scale 0 and its mean as zero.
    const F32 most = load(levels + c);
    const I32 bare = most == splat(0.0f);
    const F32 mean = sum / static_cast<float>(tokens);
    const ScaleZero p = store_scale_zero(scales + c, zeros + c, select(bare, mean, low), select(bare, mean, high),
                                         max(splat(1.0f), most), nonfinite);
    store(scale + c, p.scale);
    store(inverse + c, p.inverse);
    store(zero + c, p.zero);
  }

  int32_t* const channels = arena.take<int32_t>(f.key_columns);
  int32_t* const shifts = arena.take<int32_t>(f.key_columns);
  int32_t* const spread = arena.take<int32_t>(f.key_columns);
  for (int j = 0; j < f.key_columns && map != nullptr; j += kLanes) {
    const I32 column = load_u16(reinterpret_cast<const uint16_t*>(map + j));
    store(channels + j, column_channel(column));
    store(shifts + j, column_digit(column) * bits);
  }
  WordPacker<bits> packer(page + f.key_codes());
  for (int t = 0; t < tokens; ++t) {
    for (int c = 0; c < dim; c += kLanes) {
      F32 x = load_elements<dtype>(source.k, source.rows[t] * source.k_stride + c);
      if (fitted) x = saturate(x);
      const I32 code = code_of(x, load(scale + c), load(inverse + c), load(zero + c), load(levels + c));
      if (map == nullptr) {
        packer.push(code);
      } else {
        store(codes + c, code);
      }
    }
    if (map == nullptr) continue;
    lookup(codes, dim, channels, f.key_columns, spread);
    for (int j = 0; j < f.key_columns; j += kLanes) {
      packer.push((load(spread + j) >> load(shifts + j)) & static_cast<int32_t>(code_mask(bits)));
    }
  }
}

// The words of one group's codes; x_at(t, c) are elements of token t from channel c on.
template <int bits, class XAt>
LOGQUANT_INLINE void pack_values(const PageFormat& f, int group, const float* scale, const float* inverse,
                                 const float* zero, int32_t* page, XAt&& x_at) {
  constexpr int kElements = elements_per_word(bits);
  const int first = group * f.value_group, last = first + f.value_group;
  for (int row = 0; row < f.value_code_rows(); ++row) {
    for (int c = first; c < last; c += kLanes) {
      I32 word = splat(0), fine = splat(0);
      for (int e = 0; e < kElements; ++e) {
        const int t = row * kElements + e;
        const F32 levels = splat(static_cast<float>(code_mask(f.value_code_bits(t))));
        const I32 code = code_of(x_at(t, c), splat(scale[t]), splat(inverse[t]), splat(zero[t]), levels);
        word |= (code & static_cast<int>(code_mask(bits))) << bit_position(bits, e);
        if (f.is_fine(t)) fine |= (code >> bits) << f.fine_position(c, t);
      }
      store(page + f.value_codes() + row * f.value_dim + c, word);
      if (f.fine_values == 0) continue;
      int32_t* const at = page + f.fine_word(c);
      const bool is_first = row == 0 && f.fine_byte(c) == 0;  // of the channels, and their rows, that share the word
      store(at, is_first ? fine : load(at) | fine);
    }
  }
}

template <Dtype dtype, int bits>
void quantize_values(const PageFormat& f, const PageSource& source, int32_t* page, Arena& arena) {
  const int tokens = f.page_tokens;
  const F32 levels = splat(static_cast<float>(code_mask(bits)));
  float* const scale = arena.take<float>(tokens);
  float* const inverse = arena.take<float>(tokens);
  float* const zero = arena.take<float>(tokens);
  uint16_t* const scales = reinterpret_cast<uint16_t*>(page + f.value_params());
  uint16_t* const zeros = scales + f.value_zeros();
  for (int group = 0; group < f.value_groups(); ++group) {
    const int first = group * f.value_group, last = first + f.value_group;
    for (int t0 = 0; t0 < tokens; t0 += kLanes) {
      F32 low[kLanes], high[kLanes];
      I32 nonfinite[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = source.rows[t0 + i] * source.v_stride;
        low[i] = splat(kInfinity);
        high[i] = splat(-kInfinity);
        nonfinite[i] = splat(0);
        for (int c = first; c < last; c += kLanes) {
          const F32 x = load_elements<dtype>(source.v, row + c);
          low[i] = min(x, low[i]);
          high[i] = max(x, high[i]);
          nonfinite[i] |= is_nonfinite(x);
        }
      }
      const ScaleZero p =
          store_scale_zero(scales + group * tokens + t0, zeros + group * tokens + t0, reduce_lanes<kLanes>(low, Min{}),
                           reduce_lanes<kLanes>(high, Max{}), levels, reduce_lanes<kLanes>(nonfinite, Or{}));
      store(scale + t0, p.scale);
      store(inverse + t0, p.inverse);
      store(zero + t0, p.zero);
    }
    pack_values<bits>(f, group, scale, inverse, zero, page, [&](int t, int c) __attribute__((always_inline)) {
      return load_elements<dtype>(source.v, source.rows[t] * source.v_stride + c);
    });
  }
}

// What a page's rotated values become when each token's error is taken off the later ones: in place, group by group.
// x: [token][dim]; feedback: [later token][token]; counts: which tokens have an error that does, all bits or none;
// errors: scratch, [token][kErrorVectors * kLanes]. A token is corrected all at once, when its turn comes, so
// that it stays in registers; several vectors of its channels side by side, as each subtraction waits for the last.
constexpr int kErrorVectors = 4;
template <int bits>
LOGQUANT_INLINE void feed_back(const PageFormat& f, int group, const float* scale, const float* inverse,
                               const float* zero, const int32_t* counts, const float* feedback, float* errors,
                               float* x) {
  const int tokens = f.page_tokens, dim = f.value_dim;
  const auto run = [&](auto vectors, int c) __attribute__((always_inline)) {
    for (int t = 0; t < tokens; ++t) {
      F32 own[vectors];
      for (int i = 0; i < vectors; ++i) own[i] = load(x + t * dim + c + i * kLanes);
      for (int earlier = 0; earlier < t; ++earlier) {
        const F32 factor = splat(feedback[t * tokens + earlier]);
        const float* const error = errors + earlier * vectors * kLanes;
        for (int i = 0; i < vectors; ++i) own[i] -= factor * load(error + i * kLanes);
      }
      const F32 s = splat(scale[t]), z = splat(zero[t]);
      const F32 levels = splat(static_cast<float>(code_mask(f.value_code_bits(t))));
      for (int i = 0; i < vectors; ++i) {
        store(x + t * dim + c + i * kLanes, own[i]);
        const F32 code = to_float(code_of(own[i], s, splat(inverse[t]), z, levels));
        const I32 error = bits_as<I32>(own[i] - (z + s * code)) & splat(counts[t]);
        store(errors + (t * vectors + i) * kLanes, bits_as<F32>(error));
      }
    }
  };
  int c = group * f.value_group;
  const int end = c + f.value_group, step = kErrorVectors * kLanes;
  for (; c + step <= end; c += step) run(std::integral_constant<int, kErrorVectors>{}, c);
  for (; c < end; c += kLanes) run(std::integral_constant<int, 1>{}, c);
}

// feedback: [token][token], or nullptr
template <Dtype dtype, int bits>
void quantize_rotated_values(const PageFormat& f, const PageSource& source, const float* feedback, int32_t* page,
                             Arena& arena) {
  const int tokens = f.page_tokens, dim = f.value_dim, groups = f.value_groups();
  float* const scale = arena.take<float>(tokens);
  float* const inverse = arena.take<float>(tokens);
  float* const zero = arena.take<float>(tokens);
  float* const rotated = arena.take<float>(tokens * dim);
  float* const x = arena.take<float>(f.value_group * kLanes);
  int32_t* const finite = arena.take<int32_t>(groups * tokens);
  for (int t = 0; t < tokens; ++t) {
    for (int group = 0; group < groups; ++group) {
      I32 bad = splat(0);
      for (int c = group * f.value_group; c < (group + 1) * f.value_group; c += kLanes) {
        const F32 element = load_elements<dtype>(source.v, source.rows[t] * source.v_stride + c);
        bad |= is_nonfinite(element);
        store(rotated + t * dim + c, saturate(element));
      }
      finite[group * tokens + t] = ~reduce_lanes<1>(&bad, Or{})[0];
    }
    hadamard(rotated + t * dim, dim, f.hadamard_block());
  }
  float* corrected = rotated;
  float *factors = nullptr, *errors = nullptr;
  if (feedback != nullptr) {
    corrected = arena.take<float>(tokens * dim);
    factors = arena.take<float>(tokens * tokens);
    errors = arena.take<float>(tokens * kErrorVectors * kLanes);
    for (int t = 0; t < tokens; ++t) {
      for (int later = t + 1; later < tokens; ++later) {
        factors[later * tokens + t] = valid_feedback(feedback[t * tokens + later]);
      }
    }
    __builtin_memcpy(corrected, rotated, sizeof(float) * tokens * dim);
  }
  uint8_t* const scale_bytes = reinterpret_cast<uint8_t*>(page + f.value_params());
  for (int group = 0; group < groups; ++group) {
    const int first = group * f.value_group;
    const int32_t* const counts = finite + group * tokens;
    const auto fit = [&] {
      for (int t = 0; t < tokens; t += kLanes) {
        for (int c = 0; c < f.value_group; c += kLanes) {
          F32 square[kLanes];
          for (int i = 0; i < kLanes; ++i) square[i] = load(corrected + (t + i) * dim + first + c);
          transpose(square);
          for (int i = 0; i < kLanes; ++i) store(x + (c + i) * kLanes, square[i]);
        }
        const I32 good = load(counts + t);
        const ValueFit best = fit_values(x, f.value_group, 2.0f * value_middles(f, t));
        store_u8(scale_bytes + group * tokens + t, select(good, best.byte, splat(kPoisonScale)));
        store(scale + t, select(good, best.scale, splat(0.0f)));
        store(inverse + t, 1.0f / best.scale);
        store(zero + t, best.zero);
      }
    };
    fit();
    if (feedback != nullptr) {
      // The scales that fit the values are not those that fit what becomes of them.
      feed_back<bits>(f, group, scale, inverse, zero, counts, factors, errors, corrected);
      fit();
      for (int t = 0; t < tokens; ++t) {
        __builtin_memcpy(corrected + t * dim + first, rotated + t * dim + first, sizeof(float) * f.value_group);
      }
      feed_back<bits>(f, group, scale, inverse, zero, counts, factors, errors, corrected);
    }
    pack_values<bits>(f, group, scale, inverse, zero, page,
                      [&](int t, int c) __attribute__((always_inline)) { return load(corrected + t * dim + c); });
  }
}

LOGQUANT_INLINE int64_t quantizer_scratch(const PageFormat& f) {
  const int64_t tokens = f.page_tokens, groups = f.value_groups();
  const int64_t keys = 6 * int64_t{f.head_dim} + kTablePadding + 3 * int64_t{f.key_columns} +
                       (f.key_param_bits == 8 ? tokens * (kLanes + 1) : 0);
  const int64_t rotated =
      2 * tokens * f.value_dim + f.value_group * kLanes + groups * tokens + tokens * (tokens + kErrorVectors * kLanes);
  return 64 * 28 + 4 * (keys + 3 * tokens + (f.hadamard_block() > 1 ? rotated : 0)) + 8 * tokens;
}

LOGQUANT_INLINE void quantize_one_page(const PageFormat& f, Dtype dtype, const PageSource& source, const int16_t* map,
                                       const float* weights, const float* feedback, int32_t* page, Arena& arena) {
  with_dtype(dtype, [&](auto type) {
    with_bits(f.key_bits, [&](auto bits) { quantize_keys<type, bits>(f, source, map, weights, page, arena); });
    with_bits(f.value_bits, [&](auto bits) {
      if (f.hadamard_block() > 1) {
        quantize_rotated_values<type, bits>(f, source, feedback, page, arena);
      } else {
        quantize_values<type, bits>(f, source, page, arena);
      }
    });
  });
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
