// Pages back into tokens: zero + scale * code in float32, rounded to the output's dtype. A task is one page of one KV
// head; it reads the page and writes its tokens once.

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
  const uint16_t* const params = reinterpret_cast<const uint16_t*>(page + f.key_params());
  for (int c = 0; c < f.head_dim; c += kLanes) {
    store(scale + c, load_half(params + c));
    store(zero + c, load_half(params + f.key_zeros() + c));
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
  const uint16_t* const params = reinterpret_cast<const uint16_t*>(page + f.value_params());
  for (int i = 0; i < f.value_zeros(); i += kLanes) {
    store(scale + i, load_half(params + i));
    store(zero + i, load_half(params + f.value_zeros() + i));
  }
  for (int row = 0; row < f.value_code_rows(); ++row) {
    for (int c = 0; c < f.value_dim; c += kLanes) {
      const I32 word = load(page + f.value_codes() + row * f.value_dim + c);
      const int group = c / f.value_group;
      for (int e = 0; e < kElements; ++e) {
        const int t = row * kElements + e, param = group * f.page_tokens + t;
        const I32 code = shift_right(word, bit_position(bits, e)) & static_cast<int>(code_mask(bits));
        store_elements<dtype>(out, t * stride + c, splat(zero[param]) + splat(scale[param]) * to_float(code));
      }
    }
  }
}

}  // namespace

void dequantize_page(const DequantizeArgs& args, int64_t task) {
  const PageFormat& f = args.format;
  const int64_t p = task % args.page_count, head = task / args.page_count % args.heads;
  const int64_t batch = task / args.page_count / args.heads;
  Arena arena(thread_scratch(64 * 5 + 4 * (3 * int64_t{f.head_dim} + 2 * int64_t{f.value_zeros()})));
  const int32_t* const page =
      args.pages.data + batch * args.pages.batch_stride + head * args.pages.head_stride + p * args.pages.page_stride;
  const int16_t* const map = args.key_map.data == nullptr ? nullptr
                                                          : args.key_map.data + batch * args.key_map.batch_stride +
                                                                head * args.key_map.head_stride;
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
