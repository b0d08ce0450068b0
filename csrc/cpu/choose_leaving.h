// The choice of the tokens that leave the window (reference/choose_leaving.py): plain pointers and sizes, no torch.
#pragma once

#include "../choose_leaving.h"
#include "kernels.h"

namespace logquant::cpu {

void choose_leaving(const ChooseLeavingArgs& args, const ParallelFor& parallel_for);

}  // namespace logquant::cpu
