#include "attend_pages.cuh"

// Head dim 64, 2 bits.
LOGQUANT_TENSOR_KERNELS(attend_d64, 64, 64, 64, 2, 2, 64, 64)
