// Pages back into tokens: zero + scale * code in float32, rounded to the output's dtype. A block is the keys or the
// values of one page of one KV head.
//
// Grid (2 * pages, heads, batch), 256 threads. Memory: each page once from DRAM, each token once to it (80 + 512 bytes
// a token for dim 128, fp16, 2 bits). Budget: 64 registers, shared memory only for a column map (8 bytes a channel).

#include "elements.cuh"

namespace logquant::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kDigits = 4;  // a channel's code has at most that many columns
constexpr uint16_t kNoColumn = 0xFFFF;

LOGQUANT_DEVICE float restored(uint16_t zero, uint16_t scale, uint32_t code) {
  return __fadd_rn(half_to_float(zero), __fmul_rn(half_to_float(scale), static_cast<float>(code)));
}

// A thread writes four channels of one token.
template <class T>
LOGQUANT_DEVICE void dequantize_keys(const PageFormat& f, const uint32_t* page, const int16_t* map, T* out,
                                     int64_t stride, bool aligned, unsigned char* shared) {
  uint16_t* const column_of = reinterpret_cast<uint16_t*>(shared);  // [channel][digit]
  const int bits = f.key_bits, words = f.key_code_words(), elements = elements_per_word(bits);
  if (map != nullptr) {
    for (int i = threadIdx.x; i < kDigits * f.head_dim; i += kThreads) column_of[i] = kNoColumn;
    __syncthreads();
    for (int j = threadIdx.x; j < f.key_columns; j += kThreads) {
      column_of[kDigits * channel_of(map[j], f.head_dim) + column_digit(map[j])] = static_cast<uint16_t>(j);
    }
    __syncthreads();
  }
  const uint16_t* const scales = reinterpret_cast<const uint16_t*>(page + f.key_params());
  const uint16_t* const zeros = scales + f.key_zeros();
  const int quads = f.head_dim / 4;
  for (int i = threadIdx.x; i < f.page_tokens * quads; i += kThreads) {
    const int t = i / quads, first = i % quads * 4;
    const uint32_t* const row = page + f.key_codes() + t * words;
    Float4 x;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int c = first + k;
      uint32_t code = 0;
      if (map == nullptr) {
        code = extract(row[c / elements], bits, c % elements);
      } else {
#pragma unroll
        for (int digit = 0; digit < kDigits; ++digit) {
          const int j = column_of[kDigits * c + digit];
          if (j != kNoColumn) code += extract(row[j / elements], bits, j % elements) << bits * digit;
        }
      }
      x.x[k] = restored(zeros[c], scales[c], code);
    }
    store4(out + t * stride + first, x, aligned);
  }
}

// A thread takes the words of four channels and writes their tokens.
template <class T>
LOGQUANT_DEVICE void dequantize_values(const PageFormat& f, const uint32_t* page, T* out, int64_t stride,
                                       bool aligned) {
  const int bits = f.value_bits, elements = elements_per_word(bits), quads = f.value_dim / 4;
  const uint16_t* const scales = reinterpret_cast<const uint16_t*>(page + f.value_params());
  const uint16_t* const zeros = scales + f.value_zeros();
  for (int i = threadIdx.x; i < f.value_code_rows() * quads; i += kThreads) {
    const int row = i / quads, c = i % quads * 4, group = c / f.value_group * f.page_tokens;
    uint32_t word[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) word[k] = page[f.value_codes() + row * f.value_dim + c + k];
    for (int e = 0; e < elements; ++e) {
      const int t = row * elements + e;
      Float4 x;
#pragma unroll
      for (int k = 0; k < 4; ++k) x.x[k] = restored(zeros[group + t], scales[group + t], extract(word[k], bits, e));
      store4(out + t * stride + c, x, aligned);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    dequantize_pages(__grid_constant__ const DequantizeArgs args, bool k_aligned, bool v_aligned) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  const PageFormat& f = args.format;
  const int64_t p = blockIdx.x / 2, head = blockIdx.y, batch = blockIdx.z;
  const uint32_t* const page = reinterpret_cast<const uint32_t*>(args.pages.data) + batch * args.pages.batch_stride +
                               head * args.pages.head_stride + p * args.pages.page_stride;
  const auto out = [&](const MutableTokens& x) {
    return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride + p * f.page_tokens * x.token_stride;
  };
  if (blockIdx.x % 2 == 0) {
    const int16_t* const map = args.key_map.data == nullptr ? nullptr
                                                            : args.key_map.data + batch * args.key_map.batch_stride +
                                                                  head * args.key_map.head_stride;
    dequantize_keys(f, page, map, out(args.k), args.k.token_stride, k_aligned, shared);
  } else {
    dequantize_values(f, page, out(args.v), args.v.token_stride, v_aligned);
  }
}

}  // namespace

cudaError_t dequantize(const DequantizeArgs& args, cudaStream_t stream) {
  const int bytes = element_bytes(args.k.dtype);
  const int shared = args.key_map.data == nullptr ? 0 : 2 * kDigits * args.format.head_dim;
  const dim3 grid(2 * args.page_count, args.heads, args.batch);
  return with_element(args.k.dtype, [&](auto element) {
    return ptx::launch(&dequantize_pages<decltype(element)>, grid, kThreads, shared, stream, args,
                       rows_aligned(args.k, bytes), rows_aligned(args.v, bytes));
  });
}

}  // namespace logquant::cuda
