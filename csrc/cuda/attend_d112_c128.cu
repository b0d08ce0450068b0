#include "attend_pages.cuh"

// Head dim 112, 2 bits, fitted: 128 key columns.
LOGQUANT_TENSOR_KERNELS(attend_d112_c128, 112, 112, 128, 2, 2, 64, 112, 8)
