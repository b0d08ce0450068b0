#include "attend_pages.cuh"

// Head dim 128, 2 bits, fitted: 160 key columns.
LOGQUANT_TENSOR_KERNELS(attend_d128_c160, 128, 128, 160, 2, 2, 64, 64, 8)
