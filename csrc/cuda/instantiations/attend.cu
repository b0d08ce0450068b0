// Decoding on tensor cores for one format: the build compiles this once for each line of formats.def, with its name as
// LOGQUANT_FORMAT_NAME.

#include "../tensor/launch.cuh"

namespace logquant::cuda::tensor {

using Format = formats::LOGQUANT_FORMAT_NAME;
template cudaError_t launch<__half, Format>(const AttendArgs& args, cudaStream_t stream);
template cudaError_t launch<__nv_bfloat16, Format>(const AttendArgs& args, cudaStream_t stream);

}  // namespace logquant::cuda::tensor
