// A new token at the end of each row's window: plain pointers and sizes, no torch.
#pragma once

#include "../kernel_args.h"

namespace logquant::cpu {

// Every row must have room: lengths[batch][1] < window_slots.
void append(const AppendArgs& args);

}  // namespace logquant::cpu
