#include "attend_pages.cuh"

// Head dim 80, 2 bits, fitted: 96 key columns.
LOGQUANT_TENSOR_KERNELS(attend_d80_c96, 80, 80, 96, 2, 2, 64, 80, 8)
