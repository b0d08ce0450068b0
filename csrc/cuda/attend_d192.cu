#include "attend_pages.cuh"

// Head dim 192, 2 bits.
LOGQUANT_TENSOR_KERNELS(attend_d192, 192, 192, 192, 2, 2, 64, 64)
