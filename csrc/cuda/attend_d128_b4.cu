#include "attend_pages.cuh"

// Head dim 128, 4 bits.
LOGQUANT_TENSOR_KERNELS(attend_d128_b4, 128, 128, 128, 4, 4, 64, 64)
