#include "attend_pages.cuh"

// Head dim 64, 2 bits, 1.25 key columns a channel.
LOGQUANT_TENSOR_KERNELS(attend_d64_c80, 64, 64, 80, 2, 2, 64, 64)
