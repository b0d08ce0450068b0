#include "attend_pages.cuh"

// Head dim 96, 2 bits, fitted: 112 key columns.
LOGQUANT_TENSOR_KERNELS(attend_d96_c112, 96, 96, 112, 2, 2, 64, 96, 8)
