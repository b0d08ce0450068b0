#include "attend_pages.cuh"

// Head dim 128, 2 bits.
LOGQUANT_TENSOR_KERNELS(attend_d128, 128, 128, 128, 2, 2, 64, 64)
