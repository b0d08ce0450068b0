#include "attend_pages.cuh"

// Head dim 112, 2 bits.
LOGQUANT_TENSOR_KERNELS(attend_d112, 112, 112, 112, 2, 2, 64, 112)
