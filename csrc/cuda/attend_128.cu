#include "attend_pages.cuh"
LOGQUANT_TENSOR_KERNELS(attend_128, 128, 128, 128, 2, 2, 64, 64)
