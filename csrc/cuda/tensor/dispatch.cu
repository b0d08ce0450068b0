// Which kernel on tensor cores, if any, takes a call.

#include "formats.cuh"

namespace logquant::cuda {
namespace {

constexpr TensorKernel kKernels[] = {
#define LOGQUANT_FORMAT(name, ...)                                                                   \
  {tensor::formats::name::kFormat, Dtype::kFloat16, &tensor::launch<__half, tensor::formats::name>}, \
      {tensor::formats::name::kFormat, Dtype::kBFloat16, &tensor::launch<__nv_bfloat16, tensor::formats::name>},
#include "../instantiations/formats.def"
#undef LOGQUANT_FORMAT
};

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
  // Fitted formats are compiled with a column map, the others without (Shape).
  if ((args.key_map.data != nullptr) != (args.format.key_param_bits == 8)) return nullptr;
  if (!readable(args.q) || !readable(args.pages)) return nullptr;
  if (args.window_tokens > 0 && !(readable(args.window_k) && readable(args.window_v))) return nullptr;
  for (const TensorKernel& kernel : kKernels) {
    if (kernel.format == args.format && kernel.dtype == args.q.dtype) return &kernel;
  }
  return nullptr;
}

}  // namespace logquant::cuda
