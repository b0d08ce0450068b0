#include "attend_pages.cuh"

// Head dim 256, 2 bits, fitted: 320 key columns.
LOGQUANT_TENSOR_KERNELS(attend_d256_c320, 256, 256, 320, 2, 2, 64, 64, 8)
