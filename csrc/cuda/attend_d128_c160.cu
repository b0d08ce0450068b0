#include "attend_pages.cuh"

// Head dim 128, 2 bits, 1.25 key columns a channel.
LOGQUANT_TENSOR_KERNELS(attend_d128_c160, 128, 128, 160, 2, 2, 64, 64)
