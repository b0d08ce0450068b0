// Codes back into numbers, for a block of threads: zero + scale * code in float32, rounded to the output's type.
#pragma once

#include "params.cuh"

namespace logquant::cuda {

inline constexpr int kDigits = 4;  // a channel's code has at most that many columns
inline constexpr uint16_t kNoColumn = 0xFFFF;

inline int column_table_bytes(const PageFormat& f) { return 2 * kDigits * f.head_dim; }

// Which column holds each digit of each channel: [channel][digit].
LOGQUANT_DEVICE void fill_column_table(const PageFormat& f, const int16_t* map, uint16_t* column_of, int threads) {
  for (int i = threadIdx.x; i < kDigits * f.head_dim; i += threads) column_of[i] = kNoColumn;
  __syncthreads();
  for (int j = threadIdx.x; j < f.key_columns; j += threads) {
    column_of[kDigits * channel_of(map[j], f.head_dim) + column_digit(map[j])] = static_cast<uint16_t>(j);
  }
  __syncthreads();
}

LOGQUANT_DEVICE float restored(const Params& p, uint32_t code) {
  return __fadd_rn(p.zero, __fmul_rn(p.scale, static_cast<float>(code)));
}

// Keys of the page's tokens from `from` on into out [token][channel]. Without a map, column_of is nullptr. A thread
// keeps the parameters of four channels and writes these of every n-th token.
template <class T>
LOGQUANT_DEVICE void dequantize_keys(const PageFormat& f, const uint32_t* page, const uint16_t* column_of, int from,
                                     int count, T* out, int64_t stride, bool aligned, int threads) {
  const int bits = f.key_bits, words = f.key_code_words(), elements = elements_per_word(bits);
  const int quads = f.head_dim / 4, slices = threads / quads;
  const int first = threadIdx.x % quads * 4, slice = threadIdx.x / quads;
  if (slice >= slices) return;
  Params params[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    int columns = 1;
    if (column_of != nullptr) {
      columns = 0;
#pragma unroll
      for (int digit = 0; digit < kDigits; ++digit) {
        columns += column_of[kDigits * (first + k) + digit] != kNoColumn;
      }
    }
    params[k] = key_params_at(f, page, first + k);
    params[k].scale *= digit_weight(f, 0, columns);
  }
  for (int t = slice; t < count; t += slices) {
    const uint32_t* const row = page + f.key_codes() + (from + t) * words;
    Float4 x;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int c = first + k;
      uint32_t code = 0;
      if (column_of == nullptr) {
        code = extract(row[c / elements], bits, c % elements);
      } else {
#pragma unroll
        for (int digit = 0; digit < kDigits; ++digit) {
          const int j = column_of[kDigits * c + digit];
          if (j != kNoColumn) code += extract(row[j / elements], bits, j % elements) << bits * digit;
        }
      }
      x.x[k] = restored(params[k], code);
    }
    store4(out + t * stride + first, x, aligned);
  }
}

// Values of the page's tokens from `from` on (a multiple of 16) into out [token][channel], blocks of `block` channels
// rotated back; with a block of 1, as they are stored. All are multiplied by `unit`, a power of two. A thread takes the
// words of four channels and writes their tokens.
template <class T>
LOGQUANT_DEVICE void dequantize_values(const PageFormat& f, const uint32_t* page, int from, int count, int block,
                                       float unit, T* out, int64_t stride, bool aligned, int threads) {
  const int bits = f.value_bits, elements = elements_per_word(bits), quads = f.value_dim / 4;
  const uint32_t* const codes = page + f.value_codes() + from / elements * f.value_dim;
  const int total = count / elements * quads, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i - lane < total; i += threads) {  // whole warps, for the rotation
    const bool own = i < total;
    const int row = i / quads, c = i % quads * 4, params = c / f.value_group * f.page_tokens + from;
    uint32_t word[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (own) word[k] = codes[row * f.value_dim + c + k];
    }
    for (int e = 0; e < elements; ++e) {
      const int t = row * elements + e;
      Float4 x = {};
      if (own) {
        Params p = value_params_at(f, page, params + t);
        p.scale *= unit;
        p.zero *= unit;
#pragma unroll
        for (int k = 0; k < 4; ++k) x.x[k] = restored(p, value_code(f, page, word[k], c + k, from + t));
      }
      if (block > 1) x = rotated(x, block);
      if (own) store4(out + t * stride + c, x, aligned);
    }
  }
}

}  // namespace logquant::cuda
