#include "attend_pages.cuh"

// Head dim 256, 2 bits.
LOGQUANT_TENSOR_KERNELS(attend_d256, 256, 256, 256, 2, 2, 64, 64)
