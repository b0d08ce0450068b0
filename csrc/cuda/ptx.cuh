// The PTX instructions and launch calls that kernels use, each beside its emulation. The only file with inline PTX.
//
// nvcc compiles the first half; the host compiler compiles the second, which follows the register layouts of the PTX
// ISA ("Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix", "movmatrix").
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LOGQUANT_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "../emulator/cuda_builtins.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif
#define LOGQUANT_DYNAMIC_SHARED(name) unsigned char* const name = ::emulator::place().shared
#endif

namespace logquant::cuda::ptx {

inline constexpr uint32_t kFullMask = 0xFFFFFFFFu;

#if defined(__CUDACC__)
// ------------------------------------------------------------------------------------------------------------ device
#define LOGQUANT_DEVICE __device__ __forceinline__

LOGQUANT_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// d += a * b: a is 16 x 16 by rows, b is 16 x 8 by columns, sums in fp32.
template <class T>
LOGQUANT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
LOGQUANT_DEVICE void mma<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
LOGQUANT_DEVICE void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Transposes an 8 x 8 matrix of 16-bit elements held by the warp: lane 4i + j has row i, columns 2j and 2j + 1.
LOGQUANT_DEVICE uint32_t movmatrix_trans(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
// Four 8 x 8 matrices of 16-bit elements from shared memory; lanes 8i to 8i + 7 point to the rows of matrix i.
LOGQUANT_DEVICE void ldmatrix(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each matrix transposed.
LOGQUANT_DEVICE void ldmatrix_trans(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
LOGQUANT_DEVICE void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
LOGQUANT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups_left>
LOGQUANT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}
// Global memory that no thread of the launch writes. Volatile: loads stay where they are written, for if they moved up
// to overlap, their results would not fit in the registers.
template <class T>
LOGQUANT_DEVICE T load(const void* p);
template <>
LOGQUANT_DEVICE uint4 load<uint4>(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
template <>
LOGQUANT_DEVICE uint2 load<uint2>(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
LOGQUANT_DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
LOGQUANT_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// a * b - c
LOGQUANT_DEVICE uint32_t mul_sub_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("{\n .reg .b32 minus;\n neg.f16x2 minus, %3;\n fma.rn.f16x2 %0, %1, %2, minus;\n}"
      : "=r"(d)
      : "r"(a), "r"(b), "r"(c));
  return d;
}
LOGQUANT_DEVICE uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
LOGQUANT_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
LOGQUANT_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
LOGQUANT_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The same value in a register of its own. What the compiler can compute from the thread's index it would rather
// compute again in every turn of a loop.
template <class T>
LOGQUANT_DEVICE T keep(T x) {
  if constexpr (sizeof(T) == 4) {
    asm volatile("" : "+r"(x));
  } else {
    asm volatile("" : "+l"(x));
  }
  return x;
}
LOGQUANT_DEVICE unsigned char* keep_shared(unsigned char* p) {
  return static_cast<unsigned char*>(__cvta_shared_to_generic(keep(shared_address(p))));
}
// blockIdx.x, read again rather than kept in a register.
LOGQUANT_DEVICE int block_x() {
  int x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}
// The byte i of the result is the one of {a, b}, numbered 0 to 3 and 4 to 7, that bits 4i to 4i + 3 of the selector
// say.
LOGQUANT_DEVICE uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
// a & b | c in one instruction.
LOGQUANT_DEVICE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// -------------------------------------------------------------------------------------------------------------- host
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                   const std::type_identity_t<Parameters>&... arguments) {
  if (shared_bytes > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

#else
// --------------------------------------------------------------------------------------------------------- emulation
#define LOGQUANT_DEVICE inline

template <class T>
float to_float(uint16_t bits);
template <>
inline float to_float<__half>(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  return __half2float(__half(__half_raw{bits}));
#endif
}
template <>
inline float to_float<__nv_bfloat16>(uint16_t bits) {
  return __uint_as_float(uint32_t{bits} << 16);
}

struct MmaOperands {
  uint32_t a[4], b[2];
  float c[4];
};

// One sum of 16 products as tensor cores are said to do it (Fasi et al., PeerJ CS 330; Khattak and Mikaitis,
// arXiv 2512.07004): the terms of a block are aligned to the largest exponent (a subnormal counts as the smallest
// normal one), truncated, added, and truncated to fp32. A stress test: it was not compared with a GPU.
template <class T>
float truncating_sum(float sum, const float* a, const float* b, int b_stride) {
  constexpr int kSmallest = std::is_same_v<T, __half> ? -14 : -126, kNone = -100000;
  const auto exponent = [](float x, int smallest) {
    if (x == 0) return kNone;
    return std::max(std::ilogb(x), smallest);
  };
  const int block = emulator::config().mma_block;
  for (int first = 0; first < 16; first += block) {
    int top = exponent(sum, -126);
    bool finite = std::isfinite(sum);
    for (int k = first; k < first + block; ++k) {
      const float y = b[k * b_stride];
      finite = finite && std::isfinite(a[k]) && std::isfinite(y);
      if (a[k] != 0 && y != 0) top = std::max(top, exponent(a[k], kSmallest) + exponent(y, kSmallest));
    }
    if (!finite) {
      for (int k = first; k < first + block; ++k) sum += a[k] * b[k * b_stride];
      continue;
    }
    if (top == kNone) continue;
    const int unit = top - 23 - emulator::config().mma_guard_bits;
    double total = std::trunc(std::ldexp(double{sum}, -unit));
    for (int k = first; k < first + block; ++k) {
      total += std::trunc(std::ldexp(double{a[k]} * b[k * b_stride], -unit));
    }
    const double exact = std::ldexp(total, unit);
    sum = static_cast<float>(exact);
    if (std::fabs(double{sum}) > std::fabs(exact)) sum = std::nextafterf(sum, 0.0f);
  }
  return sum;
}

template <class T>
void finish_mma(emulator::Slot& slot) {
  alignas(64) float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    MmaOperands in;
    std::memcpy(&in, slot.in[lane], sizeof in);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) {  // element i of a: register i / 2, half i % 2
      const int row = g + (i / 2 % 2 ? 8 : 0), column = 2 * t + i % 2 + (i >= 4 ? 8 : 0);
      a[row][column] = to_float<T>(static_cast<uint16_t>(in.a[i / 2] >> 16 * (i % 2)));
    }
    for (int i = 0; i < 4; ++i) {
      b[2 * t + i % 2 + (i >= 2 ? 8 : 0)][g] = to_float<T>(static_cast<uint16_t>(in.b[i / 2] >> 16 * (i % 2)));
      d[g + (i >= 2 ? 8 : 0)][2 * t + i % 2] = in.c[i];
    }
  }
  if (emulator::config().mma_block) {
    for (int r = 0; r < 16; ++r) {
      for (int c = 0; c < 8; ++c) d[r][c] = truncating_sum<T>(d[r][c], a[r], &b[0][c], 8);
    }
  } else {
    for (int r = 0; r < 16; ++r) {
      float sums[8] = {};
      for (int k = 0; k < 16; ++k) {
        for (int c = 0; c < 8; ++c) sums[c] += a[r][k] * b[k][c];
      }
      for (int c = 0; c < 8; ++c) d[r][c] += sums[c];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) slot.out[lane][i] = d[lane / 4 + (i >= 2 ? 8 : 0)][2 * (lane % 4) + i % 2];
  }
  ++emulator::counters().mma;
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_HERE) {
  emulator::Unwatched unwatched;
  MmaOperands in;
  std::memcpy(in.a, a, sizeof in.a);
  std::memcpy(in.b, b, sizeof in.b);
  std::memcpy(in.c, d, sizeof in.c);
  emulator::Slot& slot = emulator::meet(emulator::Collective::kMma, kFullMask, &in, sizeof in, here_, &finish_mma<T>);
  std::memcpy(d, slot.out[emulator::place().lane], sizeof d);
  emulator::leave(slot);
}
inline uint32_t movmatrix_trans(uint32_t a, EMULATOR_HERE) {
  emulator::Unwatched unwatched;
  emulator::Slot& slot = emulator::meet(emulator::Collective::kMovMatrix, kFullMask, &a, sizeof a, here_);
  const int column = emulator::place().lane / 4, pair = emulator::place().lane % 4;
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {  // element (row, column) sits in lane 4 * row + column / 2
    uint32_t word;
    std::memcpy(&word, slot.in[(2 * pair + i) * 4 + column / 2], sizeof word);
    result |= (word >> 16 * (column % 2) & 0xFFFF) << 16 * i;
  }
  emulator::leave(slot);
  return result;
}
inline void load_matrices(uint32_t (&d)[4], const void* row, bool transposed, emulator::Location where) {
  emulator::Unwatched unwatched;
  const auto* const first = static_cast<const unsigned char*>(row);
  const emulator::Place& place = emulator::place();
  if (reinterpret_cast<uintptr_t>(row) % 16 || first < place.shared || first + 16 > place.shared + place.shared_bytes) {
    emulator::fail("ldmatrix: a row must be 16 aligned bytes of shared memory", where);
  }
  emulator::Slot& slot = emulator::meet(emulator::Collective::kLdMatrix, kFullMask, row, 16, where);
  const int g = place.lane / 4, t = place.lane % 4;
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int r, int c) {
      uint16_t x;
      std::memcpy(&x, slot.in[8 * i + r] + 2 * c, sizeof x);
      return uint32_t{x};
    };
    d[i] =
        transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16 : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
  emulator::leave(slot);
}
inline void ldmatrix(uint32_t (&d)[4], const void* row, EMULATOR_HERE) { load_matrices(d, row, false, here_); }
inline void ldmatrix_trans(uint32_t (&d)[4], const void* row, EMULATOR_HERE) { load_matrices(d, row, true, here_); }
inline void cp_async16(void* shared, const void* global, EMULATOR_HERE) {
  emulator::async_copy(shared, global, 16, 16, here_);
}
inline void cp_async_commit() { emulator::async_commit(); }
template <int groups_left>
void cp_async_wait() {
  emulator::async_wait(groups_left);
}
template <class T>
T load(const void* p, EMULATOR_HERE) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emulator::fail("misaligned load", here_);
  {
    emulator::Unwatched unwatched;
    emulator::counters().load_bytes += sizeof(T);
  }
  return *static_cast<const T*>(p);
}

inline float low_f16(uint32_t pair) { return to_float<__half>(static_cast<uint16_t>(pair)); }
inline float high_f16(uint32_t pair) { return to_float<__half>(static_cast<uint16_t>(pair >> 16)); }
inline uint32_t f16_bits(float x) {
  const __half h = __float2half_rn(x);
  uint16_t bits;
  std::memcpy(&bits, &h, sizeof bits);
  return bits;
}
inline uint32_t pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }
inline uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat16 h[2] = {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
  uint32_t pair;
  std::memcpy(&pair, h, sizeof pair);
  return pair;
}
// Products, sums and maxima of two fp16 numbers are exact in fp32 (sums of ours: no more than 2^11 apart).
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  return pack_f16(low_f16(a) * low_f16(b), high_f16(a) * high_f16(b));
}
inline uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  return pack_f16(low_f16(a) - low_f16(b), high_f16(a) - high_f16(b));
}
inline uint32_t mul_sub_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  const auto half = [](float x, float y, float z) { return static_cast<float>(double{x} * y - z); };
  return pack_f16(half(low_f16(a), low_f16(b), low_f16(c)), half(high_f16(a), high_f16(b), high_f16(c)));
}
inline uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  const auto max_nan = [](float x, float y) { return x != x || y != y ? NAN : std::max(x, y); };
  return pack_f16(max_nan(low_f16(a), low_f16(b)), max_nan(high_f16(a), high_f16(b)));
}
inline float exp2(float x) { return ::exp2f(x); }
template <class T>
T keep(T x) {
  return x;
}
inline unsigned char* keep_shared(unsigned char* p) { return p; }
inline int block_x() { return static_cast<int>(blockIdx.x); }
inline uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return d;
}
inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t,
                   const std::type_identity_t<Parameters>&... arguments) {
  const void* const key = reinterpret_cast<const void*>(kernel);
  if (static_cast<size_t>(shared_bytes) > emulator::config().shared_limit) return cudaErrorInvalidValue;
  if (shared_bytes > 48 << 10) emulator::set_shared_limit(key, shared_bytes);
  emulator::launch(key, grid, block, shared_bytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
#endif

}  // namespace logquant::cuda::ptx
