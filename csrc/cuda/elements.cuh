// Elements of the three dtypes in global memory, four at a time where alignment allows it.
#pragma once

#include "kernels.h"
#include "ptx.cuh"

namespace logquant::cuda {

template <class T>
struct Element;
template <>
struct Element<float> {
  static LOGQUANT_DEVICE float wide(float x) { return x; }
  static LOGQUANT_DEVICE float narrow(float x) { return x; }
};
template <>
struct Element<__half> {
  static LOGQUANT_DEVICE float wide(__half x) { return __half2float(x); }
  static LOGQUANT_DEVICE __half narrow(float x) { return __float2half_rn(x); }
};
template <>
struct Element<__nv_bfloat16> {
  static LOGQUANT_DEVICE float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
  static LOGQUANT_DEVICE __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};
struct Float4 {
  float x[4];
};

// Not ld.global.nc: evict changes what it reads.
template <class T>
LOGQUANT_DEVICE Float4 load4(const T* p, bool aligned) {
  Four<T> four;
  if (aligned) {
    four = *reinterpret_cast<const Four<T>*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) four.x[i] = p[i];
  }
  Float4 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.x[i] = Element<T>::wide(four.x[i]);
  return out;
}

template <class T>
LOGQUANT_DEVICE void store4(T* p, const Float4& value, bool aligned) {
  Four<T> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.x[i] = Element<T>::narrow(value.x[i]);
  if (aligned) {
    *reinterpret_cast<Four<T>*>(p) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = four.x[i];
  }
}

// Host: may every row of this tensor be read four elements at a time?
template <class View>
bool rows_aligned(const View& view, int bytes) {
  const int64_t strides = view.batch_stride | view.head_stride | view.token_stride;
  return reinterpret_cast<uintptr_t>(view.data) % (4 * bytes) == 0 && strides % 4 == 0;
}

LOGQUANT_DEVICE bool is_finite(float x) { return fabsf(x) <= 3.4028234663852886e38f; }
LOGQUANT_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
LOGQUANT_DEVICE uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

// An entry of the column map, whatever it holds, inside the head.
LOGQUANT_DEVICE int channel_of(int entry, int head_dim) { return min(max(column_channel(entry), 0), head_dim - 1); }

inline int element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Calls f with a value of the element type.
template <class F>
cudaError_t with_element(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat32) return f(float{});
  return dtype == Dtype::kFloat16 ? f(__half{}) : f(__nv_bfloat16{});
}

}  // namespace logquant::cuda
