// The formats that decoding on tensor cores is compiled for: a Shape each, by its name in instantiations/formats.def.
#pragma once

#include "shape.cuh"

namespace logquant::cuda::tensor {

namespace formats {
#define LOGQUANT_FORMAT(name, ...) using name = Shape<__VA_ARGS__>;
#include "../instantiations/formats.def"
#undef LOGQUANT_FORMAT
}  // namespace formats

// Defined in launch.cuh, which only instantiations/attend.cu includes: a source with all formats would compile for
// long.
template <class T, class S>
cudaError_t launch(const AttendArgs& args, cudaStream_t stream);

}  // namespace logquant::cuda::tensor
