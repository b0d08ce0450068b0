// The choice of the tokens that leave the window, on a GPU: as kernels.h.
#pragma once

#include <cuda_runtime_api.h>

#include "../choose_leaving.h"

namespace logquant::cuda {

cudaError_t choose_leaving(const ChooseLeavingArgs& args, cudaStream_t stream);

}  // namespace logquant::cuda
