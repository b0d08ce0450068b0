// Pages back into tokens: zero + scale * code in float32, rounded to the output's dtype. A task is one page of one KV
// head; it reads the page and writes its tokens once.

#include "params.h"
#include "simd.h"
#include "tasks.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

template <Dtype dtype, int bits>
void dequantize_keys(const PageFormat& f, const int32_t* page, const int16_t* map, void* out, int64_t stride,
                     Arena& arena) {
  constexpr int kElements = elements_per_word(bits);
  float* const scale = arena.take<float>(f.head_dim);
  float* const zero = arena.take<float>(f.head_dim);
  int32_t* const codes = arena.take<int32_t>(f.head_dim);
  count_columns(f, map, codes);
  for (int c = 0; c < f.head_dim; c += kLanes) {
    const Params p = key_params_at(f, page, c);
    F32 weight;
    for (int lane = 0; lane < kLanes; ++lane) {
      weight[lane] = codes[c + lane] == 0 ? 1.0f : digit_weight(f, 0, codes[c + lane]);
    }
    store(scale + c, p.scale * weight);
    store(zero + c, p.zero);
  }
  for (int t = 0; t < f.page_tokens; ++t) {
    const int32_t* const words = page + f.key_codes() + t * f.key_code_words();
    for (int c = 0; c < f.head_dim; ++c) codes[c] = 0;
    for (int w = 0; w < f.key_code_words(); ++w) {
      for (int e = 0; e < kElements; ++e) {
        const int digit = static_cast<int>(extract(static_cast<uint32_t>(words[w]), bits, e));
        const int column = w * kElements + e;
        if (map == nullptr) {
          codes[column] = digit;
        } else {
          codes[column_channel(map[column])] += digit << (bits * column_digit(map[column]));
        }
      }
    }
    for (int c = 0; c < f.head_dim; c += kLanes) {
      store_elements<dtype>(out, t * stride + c, load(zero + c) + load(scale + c) * to_float(load(codes + c)));
    }
  }
}

template <Dtype dtype, int bits>
void dequantize_values(const PageFormat& f, const int32_t* page, void* out, int64_t stride, Arena& arena) {
  constexpr int kElements = elements_per_word(bits);
  float* const scale = arena.take<float>(f.value_zeros());
  float* const zero = arena.take<float>(f.value_zeros());
  float* const rotated = arena.take<float>(f.hadamard_block() > 1 ? kElements * f.value_dim : 0);
  for (int i = 0; i < f.value_zeros(); i += kLanes) {
    const Params p = value_params_at(f, page, i);
    store(scale + i, p.scale);
    // The zeros of fine tokens, but NaNs stay.
    const bool fine = f.fine_values > 0;
    const F32 own = -value_middles(f, i % f.page_tokens) * p.scale;
    store(zero + i, fine ? select(is_nonfinite(p.zero), p.zero, own) : p.zero);
  }
  for (int row = 0; row < f.value_code_rows(); ++row) {
    for (int c = 0; c < f.value_dim; c += kLanes) {
      const I32 word = load(page + f.value_codes() + row * f.value_dim + c);
      const I32 fine = f.fine_values > 0 ? load(page + f.fine_word(c)) : splat(0);
      const int group = c / f.value_group;
      for (int e = 0; e < kElements; ++e) {
        const int t = row * kElements + e, param = group * f.page_tokens + t;
        I32 code = shift_right(word, bit_position(bits, e)) & static_cast<int>(code_mask(bits));
        if (f.is_fine(t)) {
          code |= (shift_right(fine, f.fine_position(c, t)) & static_cast<int>(code_mask(bits))) << bits;
        }
        const F32 x = splat(zero[param]) + splat(scale[param]) * to_float(code);
        if (f.hadamard_block() > 1) {
          store(rotated + e * f.value_dim + c, x);
        } else {
          store_elements<dtype>(out, t * stride + c, x);
        }
      }
    }
    for (int e = 0; f.hadamard_block() > 1 && e < kElements; ++e) {
      hadamard(rotated + e * f.value_dim, f.value_dim, f.hadamard_block());
      for (int c = 0; c < f.value_dim; c += kLanes) {
        store_elements<dtype>(out, (row * kElements + e) * stride + c, load(rotated + e * f.value_dim + c));
      }
    }
  }
}

}  // namespace

void dequantize_page(const DequantizeArgs& args, int64_t task) {
  const PageFormat& f = args.format;
  const int64_t p = task % args.page_count, head = task / args.page_count % args.heads;
  const int64_t batch = task / args.page_count / args.heads;
  Arena arena(thread_scratch(64 * 6 +
                             4 * (3 * int64_t{f.head_dim} + 2 * int64_t{f.value_zeros()} + 16 * int64_t{f.value_dim})));
  const int32_t* const page =
      args.pages.data + batch * args.pages.batch_stride + head * args.pages.head_stride + p * args.pages.page_stride;
  const int16_t* const map = args.key_map.of(batch, head);
  const auto out = [&](const MutableTokens& x) {
    const int64_t first = batch * x.batch_stride + head * x.head_stride + p * f.page_tokens * x.token_stride;
    return static_cast<char*>(x.data) + first * element_bytes(x.dtype);
  };
  with_dtype(args.k.dtype, [&](auto type) {
    with_bits(f.key_bits,
              [&](auto bits) { dequantize_keys<type, bits>(f, page, map, out(args.k), args.k.token_stride, arena); });
    with_bits(f.value_bits,
              [&](auto bits) { dequantize_values<type, bits>(f, page, out(args.v), args.v.token_stride, arena); });
  });
}

}  // namespace logquant::cpu::LOGQUANT_ISA
