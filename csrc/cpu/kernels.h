// Interface of the CPU kernels: plain pointers and sizes, no torch. ops.cpp has checked everything that is read here.
//
// Each kernel is one source compiled once per instruction set (simd.h); kernels() returns the best set that this
// machine runs. Work is cut into tasks by shape alone, so results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../kernel_args.h"
#include "choose_pages.h"

namespace logquant::cpu {

// Runs task(0) .. task(count - 1), in any order, on any threads.
using Task = std::function<void(int64_t)>;
using ParallelFor = std::function<void(int64_t count, const Task& task)>;

struct Kernels {
  const char* name;  // of the instruction set
  void (*quantize)(const QuantizeArgs&, const ParallelFor&);
  void (*dequantize)(const DequantizeArgs&, const ParallelFor&);
  void (*evict)(const EvictArgs&, const ParallelFor&);
  void (*page_scores)(const PageScoresArgs&, const ParallelFor&);
  void (*choose_pages)(const ChoosePagesArgs&, const ParallelFor&);
  void (*attend)(const AttendArgs&, const ParallelFor&);
};

// The kernels in use: the best set this machine runs, or the one that LOGQUANT_CPU_ISA names.
// Throws std::runtime_error if that name is unknown or the machine cannot run it.
const Kernels& kernels();

// Another set from now on. Throws std::runtime_error if this machine does not run it, or its system does not allow it.
void use_kernels(const std::string& name);

// Every set that was compiled, and those of them that this machine runs; last the one that is in use by default. Call
// their kernels only once they have been in use.
std::vector<const Kernels*> compiled_kernels();
std::vector<const Kernels*> available_kernels();

}  // namespace logquant::cpu
