// Interface of the CUDA kernels: device pointers, sizes and a stream, no torch. The binding has checked shapes, dtypes
// and strides; what lies in device memory (an index, a map, a page table) it cannot check without waiting for the GPU,
// so the kernels clamp every address that they compute from it.
#pragma once

#include <cuda_runtime_api.h>

#include "../kernel_args.h"

namespace logquant::cuda {

// The arguments, and what plan() makes of them.
struct AttendArgs : logquant::AttendArgs {
  bool plain = false;  // no softcap, mask or positions, so that a score is query times key
  // How the slots are cut into parts, and where partial results go.
  int page_splits = 0, window_splits = 0;
  float* partial_out = nullptr;   // [batch, kv head, split, row, value_dim]
  float* partial_sums = nullptr;  // [batch, kv head, split, row, 2]: reference exponent, sum
  // Where somebody asks what the window's slots are given: their scores in units of log2.
  float* window_scores = nullptr;  // [batch, kv head, row, window token]
};

cudaError_t quantize(const QuantizeArgs& args, cudaStream_t stream);
cudaError_t dequantize(const DequantizeArgs& args, cudaStream_t stream);
cudaError_t evict(const EvictArgs& args, cudaStream_t stream);
// A window without room for its new token gets a NaN.
cudaError_t append(const AppendArgs& args, cudaStream_t stream);
cudaError_t page_scores(const PageScoresArgs& args, cudaStream_t stream);

// Chooses the splits for a device with that many multiprocessors; returns how many floats of workspace attend() needs:
// window_scores, partial_out, partial_sums.
int64_t plan(AttendArgs& args, int multiprocessors);
void use_workspace(AttendArgs& args, float* workspace);
cudaError_t attend(const AttendArgs& args, cudaStream_t stream);
// Which kernel attend() takes: "tensor" (decoding, compiled for this format), "general" (any other) or "prefill".
const char* attend_path(const AttendArgs& args);

}  // namespace logquant::cuda
