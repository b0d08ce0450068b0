#include "attend_pages.cuh"

// Head dim 96, 2 bits.
LOGQUANT_TENSOR_KERNELS(attend_d96, 96, 96, 96, 2, 2, 64, 48)
