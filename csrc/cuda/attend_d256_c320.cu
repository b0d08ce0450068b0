#include "attend_pages.cuh"

// Head dim 256, 2 bits, 1.25 key columns a channel.
LOGQUANT_TENSOR_KERNELS(attend_d256_c320, 256, 256, 320, 2, 2, 64, 64)
