#include "attend_pages.cuh"

// Head dim 64, 2 bits, fitted: 80 key columns.
LOGQUANT_TENSOR_KERNELS(attend_d64_c80, 64, 64, 80, 2, 2, 64, 64, 8)
