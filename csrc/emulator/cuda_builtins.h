// What nvcc would have built in: the keywords, the index variables and the intrinsics that the kernels use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulator.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(n) alignas(n)
// Nothing would guard the ends of a static array, nor fill it with NaNs.
#define __shared__ _Pragma("GCC error \"__shared__ arrays are not emulated: use dynamic shared memory\"")

#define threadIdx (::emulator::place().thread_index)
#define blockIdx (::emulator::place().block_index)
#define blockDim (::emulator::place().block_size)
#define gridDim (::emulator::place().grid_size)
// The default argument that tells a collective where it was called.
#define EMULATOR_HERE ::emulator::Location here_ = {__builtin_FILE(), __builtin_LINE()}

using std::max;
using std::min;

inline void __syncthreads(EMULATOR_HERE) { emulator::barrier(0, here_); }
inline int __syncthreads_or(int predicate, EMULATOR_HERE) { return emulator::barrier(predicate != 0, here_); }
inline void __syncwarp(unsigned mask = emulator::kFullMask, EMULATOR_HERE) {
  emulator::Unwatched unwatched;
  emulator::leave(emulator::meet(emulator::Collective::kSyncWarp, mask, nullptr, 0, here_));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, EMULATOR_HERE) {
  return emulator::shuffle(mask, value, source & 31, here_);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, EMULATOR_HERE) {
  return emulator::shuffle(mask, value, emulator::place().lane ^ other, here_);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_HERE) {
  emulator::Unwatched unwatched;
  emulator::Slot& slot = emulator::meet(emulator::Collective::kBallot, mask, &predicate, sizeof predicate, here_);
  unsigned votes = 0;
  for (int lane = 0; lane < emulator::kWarp; ++lane) {
    int vote;
    std::memcpy(&vote, slot.in[lane], sizeof vote);
    if ((slot.mask >> lane & 1) && vote) votes |= 1u << lane;
  }
  emulator::leave(slot);
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_HERE) {
  return __ballot_sync(mask, predicate, here_) != 0;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
// Roundings that the compiler must not fuse (the emulated build has -ffp-contract=off).
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
