// The formats with tensor-core kernels. A format is one source, attend_FORMAT.cu, so that they compile side by side.

#include "attend.cuh"

namespace logquant::cuda {

#if defined(LOGQUANT_FEW_FORMATS)  // for sanitizer builds, which take long
#define LOGQUANT_TENSOR_FORMATS(X) X(attend_d128) X(attend_d64_c80) X(attend_d256_c320)
#else
#define LOGQUANT_TENSOR_FORMATS(X) \
  X(attend_d64)                    \
  X(attend_d80)                    \
  X(attend_d96)                    \
  X(attend_d112)                   \
  X(attend_d128)                   \
  X(attend_d192)                   \
  X(attend_d256)                   \
  X(attend_d128_b4)                \
  X(attend_d64_c80)                \
  X(attend_d80_c96)                \
  X(attend_d96_c112) X(attend_d112_c128) X(attend_d128_c160) X(attend_d192_c240) X(attend_d256_c320)
#endif

#define LOGQUANT_DECLARE(name) extern const TensorKernel name[2];
LOGQUANT_TENSOR_FORMATS(LOGQUANT_DECLARE)

namespace {

constexpr int kElementsPerLoad = 8;  // rows of q and the window are read 16 bytes at a time

bool readable(const Tokens& x) {
  const int64_t strides = x.batch_stride | x.head_stride | x.token_stride;
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && strides % kElementsPerLoad == 0;
}
bool readable(const Pages& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.batch_stride | x.head_stride | x.page_stride) % 4 == 0;
}

}  // namespace

const TensorKernel* find_tensor_kernel(const AttendArgs& args) {
#define LOGQUANT_LIST(name) name,
  static const TensorKernel* const kernels[] = {LOGQUANT_TENSOR_FORMATS(LOGQUANT_LIST)};
  // A column map on a format that is compiled without one.
  const bool mapped = args.key_map.data != nullptr;
  if (mapped != (args.format.key_columns != args.format.head_dim)) return nullptr;
  if (!readable(args.q) || !readable(args.pages)) return nullptr;
  if (args.window_tokens > 0 && !(readable(args.window_k) && readable(args.window_v))) return nullptr;
  for (const TensorKernel* pair : kernels) {
    for (int i = 0; i < 2; ++i) {
      if (pair[i].format == args.format && pair[i].dtype == args.q.dtype) return &pair[i];
    }
  }
  return nullptr;
}

}  // namespace logquant::cuda
