#include "attend_pages.cuh"

// Head dim 192, 2 bits, fitted: 240 key columns.
LOGQUANT_TENSOR_KERNELS(attend_d192_c240, 192, 192, 240, 2, 2, 64, 64, 8)
