// A small vector abstraction: kLanes floats or 32-bit integers, on the compilers' vector extensions.
//
// Every kernel source is compiled once per instruction set, with LOGQUANT_ISA naming it. The compiler's options say
// which instructions it may use; on aarch64, where NEON is always there, LOGQUANT_NEON says whether it should. What a
// set compiles lives in an unnamed namespace inside a namespace of that name, and calls no shared inline function (no
// std containers or algorithms): the linker keeps one copy of an inline function, and it could be the one with AVX-512
// in it.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(LOGQUANT_NEON)
#include <arm_neon.h>
#endif

#include "kernels.h"

#ifndef LOGQUANT_ISA
#define LOGQUANT_ISA portable
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)
#define LOGQUANT_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LOGQUANT_AVX2
// With AVX-VNNI, one instruction multiplies and adds. The EVEX form is for tests (CMakeLists.txt).
#if defined(__AVXVNNI__)
#define LOGQUANT_DPWSSD _mm256_dpwssd_avx_epi32
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define LOGQUANT_DPWSSD _mm256_dpwssd_epi32
#endif
#endif

#define LOGQUANT_INLINE inline __attribute__((always_inline))

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

#if defined(LOGQUANT_AVX512)
constexpr int kLanes = 16;
#elif defined(LOGQUANT_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));

// Vectors where memory is only as aligned as its elements.
typedef float F32Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t I32Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <class To, class From>
LOGQUANT_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// Calls f with the constants 0 .. N-1.
template <int N, class F>
LOGQUANT_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

LOGQUANT_INLINE F32 splat(float x) { return x - F32{}; }  // of -0, too, so it is no addition
LOGQUANT_INLINE I32 splat(int32_t x) { return I32{} + x; }
LOGQUANT_INLINE F32 load(const float* p) { return *reinterpret_cast<const F32Unaligned*>(p); }
LOGQUANT_INLINE I32 load(const int32_t* p) { return *reinterpret_cast<const I32Unaligned*>(p); }
// From bytes that are aligned to nothing.
LOGQUANT_INLINE I32 load(const char* p) {
  I32 x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
LOGQUANT_INLINE void store(float* p, F32 x) { *reinterpret_cast<F32Unaligned*>(p) = x; }
LOGQUANT_INLINE void store(int32_t* p, I32 x) { *reinterpret_cast<I32Unaligned*>(p) = x; }

// Of 32-bit lanes, and of both halves of each.
LOGQUANT_INLINE I32 shift_halves_right(I32 x, int n) {
  typedef uint16_t U16 __attribute__((vector_size(4 * kLanes)));
  return bits_as<I32>(bits_as<U16>(x) >> static_cast<uint16_t>(n));
}
LOGQUANT_INLINE I32 shift_right(I32 x, int n) { return bits_as<I32>(bits_as<U32>(x) >> static_cast<uint32_t>(n)); }
LOGQUANT_INLINE F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
LOGQUANT_INLINE I32 select(I32 mask, I32 yes, I32 no) { return mask ? yes : no; }
LOGQUANT_INLINE I32 max(I32 a, I32 b) {
#if defined(LOGQUANT_AVX512)
  return bits_as<I32>(_mm512_max_epi32(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(LOGQUANT_AVX2)
  return bits_as<I32>(_mm256_max_epi32(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#else
  return select(a > b, a, b);
#endif
}
LOGQUANT_INLINE F32 abs(F32 x) { return bits_as<F32>(bits_as<I32>(x) & 0x7FFFFFFF); }
LOGQUANT_INLINE I32 is_nonfinite(F32 x) { return (bits_as<I32>(x) & 0x7F800000) == 0x7F800000; }

// Of min and max with a NaN, the second argument comes out; of max_abs, either; any_above is true for a NaN.
// round_positive is to_float(round_to_int(x)) for 0 <= x < 2^22.
#if defined(LOGQUANT_AVX512)
LOGQUANT_INLINE F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
LOGQUANT_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
LOGQUANT_INLINE F32 max_abs(F32 a, F32 b) { return _mm512_range_ps(a, b, 0x0B); }
LOGQUANT_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
LOGQUANT_INLINE F32 to_float(I32 x) { return _mm512_cvtepi32_ps(bits_as<__m512i>(x)); }
LOGQUANT_INLINE I32 round_to_int(F32 x) { return bits_as<I32>(_mm512_cvtps_epi32(x)); }
LOGQUANT_INLINE F32 round_positive(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
LOGQUANT_INLINE bool any_above(F32 x, F32 limit) { return _mm512_cmp_ps_mask(x, limit, _CMP_NLE_UQ) != 0; }
LOGQUANT_INLINE I32 dot_pairs(I32 sum, I32 a, I32 b) {
  return bits_as<I32>(_mm512_dpwssd_epi32(bits_as<__m512i>(sum), bits_as<__m512i>(a), bits_as<__m512i>(b)));
}
LOGQUANT_INLINE F32 gather(const float* p, I32 index) { return _mm512_i32gather_ps(bits_as<__m512i>(index), p, 4); }
LOGQUANT_INLINE I32 gather(const int32_t* p, I32 index) {
  return bits_as<I32>(_mm512_i32gather_epi32(bits_as<__m512i>(index), p, 4));
}
// table[index], index from 0 to 7; gathers are slow.
LOGQUANT_INLINE I32 lookup(const int32_t (&table)[8], I32 index) {
  const __m512i v = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
  return bits_as<I32>(_mm512_permutexvar_epi32(bits_as<__m512i>(index), v));
}
LOGQUANT_INLINE F32 load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LOGQUANT_INLINE void store_half(uint16_t* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
LOGQUANT_INLINE I32 load_u16(const uint16_t* p) {
  return bits_as<I32>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
LOGQUANT_INLINE I32 load_u8(const uint8_t* p) {
  return bits_as<I32>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
LOGQUANT_INLINE I32 load_s8(const int8_t* p) {
  return bits_as<I32>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// The low halves of 32-bit lanes.
LOGQUANT_INLINE void store_u16(uint16_t* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits_as<__m512i>(x)));
}
#elif defined(LOGQUANT_AVX2)
LOGQUANT_INLINE F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
LOGQUANT_INLINE F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
LOGQUANT_INLINE F32 max_abs(F32 a, F32 b) { return _mm256_max_ps(a, abs(b)); }
LOGQUANT_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
LOGQUANT_INLINE F32 to_float(I32 x) { return _mm256_cvtepi32_ps(bits_as<__m256i>(x)); }
LOGQUANT_INLINE I32 round_to_int(F32 x) { return bits_as<I32>(_mm256_cvtps_epi32(x)); }
LOGQUANT_INLINE F32 round_positive(F32 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT); }
LOGQUANT_INLINE bool any_above(F32 x, F32 limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_NLE_UQ)) != 0;
}
LOGQUANT_INLINE I32 dot_pairs(I32 sum, I32 a, I32 b) {
#if defined(LOGQUANT_DPWSSD)
  return bits_as<I32>(LOGQUANT_DPWSSD(bits_as<__m256i>(sum), bits_as<__m256i>(a), bits_as<__m256i>(b)));
#else
  sum += bits_as<I32>(_mm256_madd_epi16(bits_as<__m256i>(a), bits_as<__m256i>(b)));
  // Without this, gcc multiplies for all sums first and keeps the products in memory until it adds them.
  asm("" : "+x"(sum));
  return sum;
#endif
}
LOGQUANT_INLINE F32 gather(const float* p, I32 index) { return _mm256_i32gather_ps(p, bits_as<__m256i>(index), 4); }
LOGQUANT_INLINE I32 gather(const int32_t* p, I32 index) {
  return bits_as<I32>(_mm256_i32gather_epi32(p, bits_as<__m256i>(index), 4));
}
LOGQUANT_INLINE I32 lookup(const int32_t (&table)[8], I32 index) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table));
  return bits_as<I32>(_mm256_permutevar8x32_epi32(v, bits_as<__m256i>(index)));
}
LOGQUANT_INLINE F32 load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LOGQUANT_INLINE void store_half(uint16_t* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
LOGQUANT_INLINE I32 load_u16(const uint16_t* p) {
  return bits_as<I32>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
LOGQUANT_INLINE I32 load_u8(const uint8_t* p) {
  return bits_as<I32>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
LOGQUANT_INLINE I32 load_s8(const int8_t* p) {
  return bits_as<I32>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
LOGQUANT_INLINE void store_u16(uint16_t* p, I32 x) {
  const __m256i even = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 4, 5, 8, 9, 12,
                                        13, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i low = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bits_as<__m256i>(x), even), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(low));
}
#elif defined(LOGQUANT_NEON)
// Not FMIN, FMAX, FMINNM, FMAXNM: those give the NaN always, or the number always.
LOGQUANT_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }
LOGQUANT_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
LOGQUANT_INLINE F32 max_abs(F32 a, F32 b) {
  return bits_as<F32>(vmaxnmq_f32(bits_as<float32x4_t>(a), vabsq_f32(bits_as<float32x4_t>(b))));
}
LOGQUANT_INLINE F32 fma(F32 a, F32 b, F32 c) {
  return bits_as<F32>(vfmaq_f32(bits_as<float32x4_t>(c), bits_as<float32x4_t>(a), bits_as<float32x4_t>(b)));
}
LOGQUANT_INLINE F32 to_float(I32 x) { return bits_as<F32>(vcvtq_f32_s32(bits_as<int32x4_t>(x))); }
LOGQUANT_INLINE I32 round_to_int(F32 x) { return bits_as<I32>(vcvtnq_s32_f32(bits_as<float32x4_t>(x))); }
LOGQUANT_INLINE F32 round_positive(F32 x) { return bits_as<F32>(vrndnq_f32(bits_as<float32x4_t>(x))); }
LOGQUANT_INLINE bool any_above(F32 x, F32 limit) { return vminvq_u32(bits_as<uint32x4_t>(x <= limit)) == 0; }
// b is one pair in every lane, and smlal multiplies by an element of a register: the pair is loaded and not spread,
// and a's two halves are narrowed once for all rows.
LOGQUANT_INLINE I32 dot_pairs(I32 sum, I32 a, I32 b) {
  const int32x4_t codes = bits_as<int32x4_t>(a);
  const int16x4_t pair = vcreate_s16(static_cast<uint32_t>(b[0]));
  const int32x4_t even = vmlal_lane_s16(bits_as<int32x4_t>(sum), vmovn_s32(codes), pair, 0);
  return bits_as<I32>(vmlal_lane_s16(even, vshrn_n_s32(codes, 16), pair, 1));
}
template <class T>
LOGQUANT_INLINE auto gather(const T* p, I32 index) {
  typedef T V __attribute__((vector_size(4 * kLanes)));
  return V{p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
}
LOGQUANT_INLINE I32 lookup(const int32_t (&table)[8], I32 index) {
  const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(table);
  const uint8x16x2_t v = {{vld1q_u8(bytes), vld1q_u8(bytes + 16)}};
  return bits_as<I32>(vqtbl2q_u8(v, bits_as<uint8x16_t>(index * 0x04040404 + 0x03020100)));
}
LOGQUANT_INLINE F32 load_half(const uint16_t* p) {
  return bits_as<F32>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))));
}
LOGQUANT_INLINE void store_half(uint16_t* p, F32 x) {
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(bits_as<float32x4_t>(x))));
}
LOGQUANT_INLINE I32 load_u16(const uint16_t* p) { return bits_as<I32>(vmovl_u16(vld1_u16(p))); }
LOGQUANT_INLINE I32 load_u8(const uint8_t* p) {
  uint32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return bits_as<I32>(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes)))));
}
LOGQUANT_INLINE I32 load_s8(const int8_t* p) {
  uint32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return bits_as<I32>(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(bytes)))));
}
LOGQUANT_INLINE void store_u16(uint16_t* p, I32 x) { vst1_u16(p, vmovn_u32(bits_as<uint32x4_t>(x))); }
#else
#if defined(__SSE2__)
LOGQUANT_INLINE F32 min(F32 a, F32 b) { return _mm_min_ps(a, b); }
LOGQUANT_INLINE F32 max(F32 a, F32 b) { return _mm_max_ps(a, b); }
LOGQUANT_INLINE I32 round_to_int(F32 x) { return bits_as<I32>(_mm_cvtps_epi32(x)); }
LOGQUANT_INLINE bool any_above(F32 x, F32 limit) { return _mm_movemask_ps(_mm_cmpnle_ps(x, limit)) != 0; }
LOGQUANT_INLINE I32 dot_pairs(I32 sum, I32 a, I32 b) {
  return sum + bits_as<I32>(_mm_madd_epi16(bits_as<__m128i>(a), bits_as<__m128i>(b)));
}
#else
LOGQUANT_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }
LOGQUANT_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
// Rounds to nearest even for |x| < 2^22, and is defined for everything else.
LOGQUANT_INLINE I32 round_to_int(F32 x) {
  const F32 magic = splat(12582912.0f);
  return bits_as<I32>(x + magic) - bits_as<I32>(magic);
}
LOGQUANT_INLINE bool any_above(F32 x, F32 limit) {
  const I32 below = x <= limit;
  return (below[0] & below[1] & below[2] & below[3]) == 0;
}
// a holds codes, so its halves are not negative.
LOGQUANT_INLINE I32 dot_pairs(I32 sum, I32 a, I32 b) {
  return sum + (a & 0xFFFF) * bits_as<I32>(bits_as<I32>(bits_as<U32>(b) << 16u) >> 16) + (a >> 16) * (b >> 16);
}
#endif
LOGQUANT_INLINE F32 max_abs(F32 a, F32 b) { return max(a, abs(b)); }
LOGQUANT_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
LOGQUANT_INLINE F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
LOGQUANT_INLINE F32 round_positive(F32 x) { return to_float(round_to_int(x)); }
template <class T>
LOGQUANT_INLINE auto gather(const T* p, I32 index) {
  typedef T V __attribute__((vector_size(4 * kLanes)));
  return V{p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
}
LOGQUANT_INLINE I32 lookup(const int32_t (&table)[8], I32 index) { return gather(table, index); }
LOGQUANT_INLINE I32 load_u16(const uint16_t* p) { return I32{p[0], p[1], p[2], p[3]}; }
LOGQUANT_INLINE I32 load_u8(const uint8_t* p) { return I32{p[0], p[1], p[2], p[3]}; }
LOGQUANT_INLINE I32 load_s8(const int8_t* p) { return I32{p[0], p[1], p[2], p[3]}; }
LOGQUANT_INLINE void store_u16(uint16_t* p, I32 x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(x[i]);
}
LOGQUANT_INLINE F32 load_half(const uint16_t* p) {
  const I32 h = load_u16(p), magnitude = h & 0x7FFF;
  const I32 normal = (magnitude << 13) + (112 << 23);
  const I32 subnormal = bits_as<I32>(to_float(magnitude) * 0x1p-24f);
  const I32 special = (magnitude << 13) | 0x7F800000;
  const I32 bits = select(magnitude < 0x0400, subnormal, select(magnitude >= 0x7C00, special, normal));
  return bits_as<F32>(bits | ((h & 0x8000) << 16));
}
LOGQUANT_INLINE void store_half(uint16_t* p, F32 x) {
  const I32 sign = shift_right(bits_as<I32>(x), 16) & 0x8000, magnitude = bits_as<I32>(x) & 0x7FFFFFFF;
  const I32 normal = ((magnitude + 0x0FFF + ((magnitude >> 13) & 1)) >> 13) - (112 << 10);
  // The unit in the last place of 0.5 is that of a subnormal half, so the addition rounds.
  const I32 subnormal = bits_as<I32>(bits_as<F32>(magnitude) + 0.5f) - 0x3F000000;
  const I32 special = select(magnitude > 0x7F800000, splat(0x7E00), splat(0x7C00));
  const I32 half = select(magnitude < 0x38800000, subnormal, select(magnitude >= 0x477FF000, special, normal));
  store_u16(p, half | sign);
}
#endif

// Two vectors of numbers that fit into 16 bits; of others comes anything.
LOGQUANT_INLINE void store_s16(int16_t* p, I32 low, I32 high) {
#if defined(LOGQUANT_AVX2)
  const __m256i halves = _mm256_packs_epi32(bits_as<__m256i>(low), bits_as<__m256i>(high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(halves, 0xD8));
#else
  typedef int16_t I16 __attribute__((vector_size(4 * kLanes)));
  const I16 x = [&]<int... lane>(std::integer_sequence<int, lane...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(bits_as<I16>(low), bits_as<I16>(high), (2 * lane)...);
  }(std::make_integer_sequence<int, 2 * kLanes>{});
  __builtin_memcpy(p, &x, sizeof(x));
#endif
}

// out[j] = table[index[j]]; gathers are slow, so the table is held in registers where it fits: reads up to
// kTablePadding elements of it, whatever is in them. With AVX2 it does not fit, and single loads are faster.
constexpr int kTablePadding = 128;
template <class T>
LOGQUANT_INLINE void lookup(const T* table, [[maybe_unused]] int size, const int32_t* index, int count, T* out) {
#if defined(LOGQUANT_AVX512)
  const auto in_registers = [&](auto halves) __attribute__((always_inline)) {
    __m512 v[halves];
    for (int i = 0; i < halves; ++i) v[i] = bits_as<__m512>(load(table + i * kLanes));
    for (int j = 0; j < count; j += kLanes) {
      const __m512i lanes = bits_as<__m512i>(load(index + j));
      __m512 x = _mm512_permutex2var_ps(v[0], lanes, v[1]);
      for (int i = 2; i < halves; i += 2) {
        const __mmask16 here = _mm512_cmpge_epi32_mask(lanes, _mm512_set1_epi32(i * kLanes));
        x = _mm512_mask_mov_ps(x, here, _mm512_permutex2var_ps(v[i], lanes, v[i + 1]));
      }
      store(out + j, bits_as<decltype(load(table))>(x));
    }
  };
  if (size <= 4 * kLanes) return in_registers(std::integral_constant<int, 4>{});
  if (size <= 8 * kLanes) return in_registers(std::integral_constant<int, 8>{});
#endif
#if defined(LOGQUANT_AVX2)
  for (int j = 0; j < count; j += 4) {
    const T a = table[index[j]], b = table[index[j + 1]], c = table[index[j + 2]], d = table[index[j + 3]];
    out[j] = a, out[j + 1] = b, out[j + 2] = c, out[j + 3] = d;
  }
#else
  for (int j = 0; j < count; j += kLanes) store(out + j, gather(table, load(index + j)));
#endif
}

// The low bytes of 32-bit lanes.
LOGQUANT_INLINE void store_u8(uint8_t* p, I32 x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(x[i]);
}

// ------------------------------------------------------------------------------------------------------- elements
constexpr int element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

template <Dtype dtype>
LOGQUANT_INLINE F32 load_elements(const void* data, int64_t i) {
  if constexpr (dtype == Dtype::kFloat32) return load(static_cast<const float*>(data) + i);
  const uint16_t* p = static_cast<const uint16_t*>(data) + i;
  if constexpr (dtype == Dtype::kFloat16) return load_half(p);
  return bits_as<F32>(load_u16(p) << 16);
}

template <Dtype dtype>
LOGQUANT_INLINE void store_elements(void* data, int64_t i, F32 x) {
  if constexpr (dtype == Dtype::kFloat32) {
    store(static_cast<float*>(data) + i, x);
  } else if constexpr (dtype == Dtype::kFloat16) {
    store_half(static_cast<uint16_t*>(data) + i, x);
  } else {
    const I32 bits = bits_as<I32>(x);
    const I32 rounded = shift_right(bits + 0x7FFF + (shift_right(bits, 16) & 1), 16);
    const I32 is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    store_u16(static_cast<uint16_t*>(data) + i, select(is_nan, splat(0x7FC0), rounded));
  }
}

// Pairs of neighbours, wherever they lie in memory.
LOGQUANT_INLINE I32 load_pairs(const int16_t* p) {
  I32 x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

// sum + a0 * b0 + a1 * b1 of pairs of bfloat16. The instruction takes subnormal numbers for 0.
#if defined(LOGQUANT_AVX512) && defined(__AVX512BF16__)
constexpr bool kHasBFloat16Dots = true;
LOGQUANT_INLINE F32 dot_bfloat16(F32 sum, I32 a, I32 b) {
  return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(a), bits_as<__m512bh>(b));
}
#else
constexpr bool kHasBFloat16Dots = false;
LOGQUANT_INLINE F32 dot_bfloat16(F32 sum, I32 a, I32 b) {
  constexpr int32_t kHigh = ~0xFFFF;
  return fma(bits_as<F32>(a & kHigh), bits_as<F32>(b & kHigh), fma(bits_as<F32>(a << 16), bits_as<F32>(b << 16), sum));
}
#endif

// Calls f with the dtype as a constant.
template <class F>
LOGQUANT_INLINE void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(std::integral_constant<Dtype, Dtype::kFloat32>{});
    case Dtype::kFloat16:
      return f(std::integral_constant<Dtype, Dtype::kFloat16>{});
    case Dtype::kBFloat16:
      return f(std::integral_constant<Dtype, Dtype::kBFloat16>{});
  }
}

// Calls f with the code width as a constant.
template <class F>
LOGQUANT_INLINE void with_bits(int bits, F&& f) {
  switch (bits) {
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, 8>{});
  }
}

// ------------------------------------------------------------------------------------------------- across the lanes
#if defined(LOGQUANT_AVX2)
// Of the halves of a and b: a's first two, b's first two, a's last two, b's last two. It moves nothing between halves,
// which gcc's own choice of instructions does four times.
template <int Odd, class V>
LOGQUANT_INLINE V every_second_by_halves(V a, V b) {
  return bits_as<V>(_mm256_shuffle_ps(bits_as<__m256>(a), bits_as<__m256>(b), Odd ? 0xDD : 0x88));
}
template <class V>
LOGQUANT_INLINE V swap_middle_pairs(V x) {
  return bits_as<V>(_mm256_permute4x64_epi64(bits_as<__m256i>(x), 0xD8));
}
#endif

template <int Odd, class V, int... I>
LOGQUANT_INLINE V every_second(V a, V b, std::integer_sequence<int, I...>) {
#if defined(LOGQUANT_AVX2)
  return swap_middle_pairs(every_second_by_halves<Odd>(a, b));
#else
  return __builtin_shufflevector(a, b, (2 * I + Odd)...);
#endif
}

// A square of words: lane j of v[i] becomes lane i of v[j].
template <class V>
LOGQUANT_INLINE void transpose(V (&v)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  V next[kLanes];
  for (int round = 1; round < kLanes; round *= 2) {
    for (int i = 0; i < kLanes / 2; ++i) {
      next[i] = every_second<0>(v[2 * i], v[2 * i + 1], lanes);
      next[kLanes / 2 + i] = every_second<1>(v[2 * i], v[2 * i + 1], lanes);
    }
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

// Pairs of neighbouring lanes: a's results in the lower half, b's in the upper.
template <class V, class Op>
LOGQUANT_INLINE V reduce_pairs(V a, V b, Op op) {
#if defined(LOGQUANT_AVX2)
  return swap_middle_pairs(op(every_second_by_halves<0>(a, b), every_second_by_halves<1>(a, b)));
#else
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  return op(every_second<0>(a, b, lanes), every_second<1>(a, b, lanes));
#endif
}

// M vectors into one: lanes i*kLanes/M .. are the results of v[i] over groups of M neighbouring lanes.
template <int M, class V, class Op>
LOGQUANT_INLINE V reduce_groups(const V* v, Op op) {
  if constexpr (M == 1) {
    return v[0];
  } else {
    V half[M / 2];
    unroll<M / 2>([&](auto i) { half[i] = reduce_pairs(v[2 * i], v[2 * i + 1], op); });
    return reduce_groups<M / 2>(half, op);
  }
}

// M vectors into one: lane i is the result of v[i] over all lanes.
template <int M, class V, class Op>
LOGQUANT_INLINE V reduce_lanes(const V* v, Op op) {
  V x = reduce_groups<M>(v, op);
  for (int n = M; n < kLanes; n *= 2) x = reduce_pairs(x, x, op);
  return x;
}

struct Add {
  template <class V>
  LOGQUANT_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Or {
  LOGQUANT_INLINE I32 operator()(I32 a, I32 b) const { return a | b; }
};
struct Min {
  LOGQUANT_INLINE F32 operator()(F32 a, F32 b) const { return min(a, b); }
};
struct Max {
  LOGQUANT_INLINE F32 operator()(F32 a, F32 b) const { return max(a, b); }
};

template <class Op>
LOGQUANT_INLINE float reduce(F32 x, Op op) {
  return reduce_lanes<1>(&x, op)[0];
}

// 2^x for x <= 30 or so, relative error 2e-7; a NaN stays one, and the result is never 0.
LOGQUANT_INLINE F32 exp2(F32 x) {
  x = max(splat(-126.0f), x);
  const F32 magic = splat(12582912.0f);
  const F32 rounded = x + magic;
  const F32 f = x - (rounded - magic);
  F32 p = splat(1.339887e-3f);
  p = fma(p, f, splat(9.618437e-3f));
  p = fma(p, f, splat(5.550332e-2f));
  p = fma(p, f, splat(2.402265e-1f));
  p = fma(p, f, splat(6.931472e-1f));
  p = fma(p, f, splat(1.0f));
  return bits_as<F32>(bits_as<I32>(p) + (bits_as<I32>(rounded) << 23));
}

LOGQUANT_INLINE void prefetch(const char* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace
}  // namespace logquant::cpu::LOGQUANT_ISA
