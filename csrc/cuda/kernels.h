// Interface of the CUDA kernels: device pointers, sizes and a stream, no torch. The binding has checked shapes, dtypes
// and strides; what lies in device memory (an index, a map, a page table) it cannot check without waiting for the GPU,
// so the kernels clamp every address that they compute from it.
#pragma once

#include <cuda_runtime_api.h>

#include "../cpu/kernels.h"

namespace logquant::cuda {

using cpu::Dtype;
using cpu::MutablePages;
using cpu::MutableTokens;
using cpu::Pages;
using cpu::PerHead;
using cpu::Tokens;

struct QuantizeArgs : cpu::QuantizeArgs {
  int64_t tokens = 0;  // of k and v: what an index must stay below
};
using cpu::DequantizeArgs;
using cpu::EvictArgs;

struct AttendArgs : cpu::AttendArgs {
  int64_t page_blocks = 0;  // with a page table: what its entries must stay below
  bool plain = false;       // set by plan(): no softcap, mask or positions, so that a score is query times key
  // Set by plan(): how the slots are cut into parts, and where partial results go.
  int page_splits = 0, window_splits = 0;
  float* partial_out = nullptr;   // [batch, kv head, split, row, value_dim]
  float* partial_sums = nullptr;  // [batch, kv head, split, row, 2]: reference exponent, sum
};

cudaError_t quantize(const QuantizeArgs& args, cudaStream_t stream);
cudaError_t dequantize(const DequantizeArgs& args, cudaStream_t stream);
cudaError_t evict(const EvictArgs& args, cudaStream_t stream);

// Chooses the splits for a device with that many multiprocessors; returns how many floats of workspace attend() needs,
// partial_out first, then partial_sums.
int64_t plan(AttendArgs& args, int multiprocessors);
void use_workspace(AttendArgs& args, float* workspace);
cudaError_t attend(const AttendArgs& args, cudaStream_t stream);
// Which kernel attend() takes: "tensor" (compiled for this format, tensor/) or "general".
const char* attend_path(const AttendArgs& args);

}  // namespace logquant::cuda
