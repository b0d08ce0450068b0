#include "attend_pages.cuh"

// Head dim 80, 2 bits.
LOGQUANT_TENSOR_KERNELS(attend_d80, 80, 80, 80, 2, 2, 64, 80)
