// Quantises one page, for quantize and evict: the plain min-max quantiser, bit for bit that of logquant/reference.py.
//
// Keys: lanes are channels; min and max run down the page's tokens. Values: lanes are channels, reduced across lanes
// for kLanes tokens at a time. The source is read twice (range, then codes), the second time from cache.
#pragma once

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
void quantize_keys(const PageFormat& f, const PageSource& source, const int16_t* map, int32_t* page, Arena& arena) {
  const int dim = f.head_dim, tokens = f.page_tokens;
  float* const scale = arena.take<float>(dim);
  float* const inverse = arena.take<float>(dim);
  float* const zero = arena.take<float>(dim);
  float* const levels = arena.take<float>(dim);
  int32_t* const codes = arena.take<int32_t>(dim);
  int32_t* const columns = arena.take<int32_t>(dim);
  for (int c = 0; c < dim; ++c) columns[c] = map == nullptr ? 1 : 0;
  if (map != nullptr) {
    for (int j = 0; j < f.key_columns; ++j) ++columns[column_channel(map[j])];
  }
  for (int c = 0; c < dim; ++c) {
    const int code_bits = bits * columns[c];
    levels[c] = static_cast<float>((1 << (code_bits < 24 ? code_bits : 24)) - 1);
  }

  uint16_t* const scales = reinterpret_cast<uint16_t*>(page + f.key_params());
  uint16_t* const zeros = scales + f.key_zeros();
  for (int c = 0; c < dim; c += kLanes) {
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

  WordPacker<bits> packer(page + f.key_codes());
  for (int t = 0; t < tokens; ++t) {
    for (int c = 0; c < dim; c += kLanes) {
      const F32 x = load_elements<dtype>(source.k, source.rows[t] * source.k_stride + c);
      const I32 code = code_of(x, load(scale + c), load(inverse + c), load(zero + c), load(levels + c));
      if (map == nullptr) {
        packer.push(code);
      } else {
        store(codes + c, code);
      }
    }
    if (map == nullptr) continue;
    for (int j = 0; j < f.key_columns; j += kLanes) {
      I32 digits;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int entry = map[j + lane];
        digits[lane] = codes[column_channel(entry)] >> (bits * column_digit(entry)) & static_cast<int>(code_mask(bits));
      }
      packer.push(digits);
    }
  }
}

template <Dtype dtype, int bits>
void quantize_values(const PageFormat& f, const PageSource& source, int32_t* page, Arena& arena) {
  constexpr int kElements = elements_per_word(bits);
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
    for (int row = 0; row < f.value_code_rows(); ++row) {
      for (int c = first; c < last; c += kLanes) {
        I32 word = splat(0);
        for (int e = 0; e < kElements; ++e) {
          const int t = row * kElements + e;
          const F32 x = load_elements<dtype>(source.v, source.rows[t] * source.v_stride + c);
          word |= code_of(x, splat(scale[t]), splat(inverse[t]), splat(zero[t]), levels) << bit_position(bits, e);
        }
        store(page + f.value_codes() + row * f.value_dim + c, word);
      }
    }
  }
}

LOGQUANT_INLINE int64_t quantizer_scratch(const PageFormat& f) {
  return 64 * 16 + 4 * (6 * int64_t{f.head_dim} + 3 * int64_t{f.page_tokens}) + 8 * int64_t{f.page_tokens};
}

LOGQUANT_INLINE void quantize_one_page(const PageFormat& f, Dtype dtype, const PageSource& source, const int16_t* map,
                                       int32_t* page, Arena& arena) {
  with_dtype(dtype, [&](auto type) {
    with_bits(f.key_bits, [&](auto bits) { quantize_keys<type, bits>(f, source, map, page, arena); });
    with_bits(f.value_bits, [&](auto bits) { quantize_values<type, bits>(f, source, page, arena); });
  });
}

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
