// Quantises the keys or the values of one page, a block of kQuantizeThreads threads at a time; for quantize and evict.
//
// Bit for bit the quantiser of logquant/reference.py: every operation is one correctly rounded fp32 operation (hence
// the __f*_rn, which nvcc does not fuse). The source is read twice, range then codes; a page of a head (16 KB of keys
// for 64 tokens of dim 128) stays in L1 in between.
#pragma once

#include "elements.cuh"

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
  float scale, inverse, zero;  // as stored: rounded to fp16
};

LOGQUANT_DEVICE float saturate(float x) { return fminf(fmaxf(x, -kParamMax), kParamMax); }

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

LOGQUANT_DEVICE uint32_t code_of(float x, const Group& group, float levels) {
  if (!(group.scale > 0.0f)) return 0;
  return static_cast<uint32_t>(fminf(fmaxf(rintf(__fmul_rn(__fsub_rn(x, group.zero), group.inverse)), 0.0f), levels));
}

struct Range {
  float low, high;
  LOGQUANT_DEVICE void add(float x) {
    low = is_finite(x) && low == low ? fminf(low, x) : NAN;
    high = fmaxf(high, x);
  }
  LOGQUANT_DEVICE void add(const Range& other) {
    low = low == low && other.low == other.low ? fminf(low, other.low) : NAN;
    high = fmaxf(high, other.high);
  }
};

// Shared memory of quantize_keys and quantize_values, in bytes.
inline int quantizer_shared(const PageFormat& f) {
  const int keys = 4 * kQuantizeThreads * static_cast<int>(sizeof(Range)) +
                   f.head_dim * static_cast<int>(sizeof(Group) + 2 * sizeof(float));
  const int values = f.value_groups() * f.page_tokens * static_cast<int>(sizeof(Group));
  return keys > values ? keys : values;
}

// A thread first takes four channels of every n-th token, then a word of one token.
template <class T, class Rows>
LOGQUANT_DEVICE void quantize_keys(const PageFormat& f, const PageSource<T, Rows>& source, const int16_t* map,
                                   uint32_t* page, unsigned char* shared) {
  Range* const partial = reinterpret_cast<Range*>(shared);  // [slice][head_dim]
  Group* const groups = reinterpret_cast<Group*>(partial + 4 * kQuantizeThreads);
  float* const levels = reinterpret_cast<float*>(groups + f.head_dim);
  int* const columns = reinterpret_cast<int*>(levels + f.head_dim);
  const int dim = f.head_dim, tokens = f.page_tokens, bits = f.key_bits, self = threadIdx.x;

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
  for (int c = self; c < dim; c += kQuantizeThreads) columns[c] = map == nullptr ? 1 : 0;
  __syncthreads();
  if (map != nullptr) {
    // One thread a channel counts its columns: no atomics, and the map is short.
    for (int c = self; c < dim; c += kQuantizeThreads) {
      int count = 0;
      for (int j = 0; j < f.key_columns; ++j) count += channel_of(map[j], dim) == c;
      columns[c] = count;
    }
  }

  uint16_t* const scales = reinterpret_cast<uint16_t*>(page + f.key_params());
  uint16_t* const zeros = scales + f.key_zeros();
  for (int c = self; c < dim; c += kQuantizeThreads) {
    Range range = partial[c];
    for (int s = 1; s < slices; ++s) range.add(partial[s * dim + c]);
    const float most = static_cast<float>((1u << min(bits * columns[c], 24)) - 1u);
    if (columns[c] == 0 && range.low == range.low) {  // only the mean, added up token by token, is kept
      float sum = 0.0f;
      for (int t = 0; t < tokens; ++t) {
        sum = __fadd_rn(sum, Element<T>::wide(source.data[source.row(t) * source.stride + c]));
      }
      range.low = range.high = __fdiv_rn(sum, static_cast<float>(tokens));
      if (!is_finite(range.low)) range.low = range.high = sum > 0.0f ? kParamMax : -kParamMax;
    }
    groups[c] = store_group(scales + c, zeros + c, range.low, range.high, fmaxf(most, 1.0f));
    levels[c] = most;
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
        for (int k = 0; k < 4; ++k) codes[k] = code_of(x.x[k], groups[first + e + k], levels[first + e + k]);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int entry = map[first + e + k], c = channel_of(entry, dim);
          codes[k] =
              code_of(Element<T>::wide(row[c]), groups[c], levels[c]) >> bits * column_digit(entry) & code_mask(bits);
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
LOGQUANT_DEVICE void quantize_values(const PageFormat& f, const PageSource<T, Rows>& source, uint32_t* page,
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

}  // namespace logquant::cuda
