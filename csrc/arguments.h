// From operator arguments to kernel arguments: everything that kernels read of a tensor's shape, dtype and strides is
// checked here, once for every device; a failed check leaves every tensor as it was. Meanings: logquant/ops/reference.
//
// What an integer tensor holds (an index, a map, a page table) is checked where the CPU can read it. On a GPU that
// would wait for the stream; CUDA kernels clamp what they compute from it instead.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "choose_leaving.h"
#include "cpu/choose_pages.h"
#include "kernel_args.h"

namespace logquant {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Fields = std::vector<int64_t>;  // of a format

// Each holds the tensors that its arguments point into, and the results.
struct QuantizeCall {
  QuantizeArgs args;
  Tensor k, v, pages;
  OptionalTensor index, key_map, key_weights, value_feedback;
};
struct DequantizeCall {
  DequantizeArgs args;
  Tensor pages, k, v;
  OptionalTensor key_map;
};
struct EvictCall {
  EvictArgs args;
  Tensor window_k, window_v, pages;
  OptionalTensor key_map, key_weights, value_feedback;
};
struct PageScoresCall {
  PageScoresArgs args;
  Tensor q, pages, scores;
  OptionalTensor key_map, means, mean_scales;
};
struct AttendCall {
  AttendArgs args;
  Tensor q, pages, window_k, window_v, out, lse, attention_out;
  OptionalTensor key_map, positions, mask, query_positions, sinks, page_table, lengths, attention;
};

// The attention sums are where they were before.
struct DecodeStepCall {
  AppendArgs append;
  AttendCall attend;
  Tensor q, k, v;
};

QuantizeCall quantize_call(const Tensor& k, const Tensor& v, const Fields& format, const OptionalTensor& index,
                           const OptionalTensor& key_map, const OptionalTensor& key_weights,
                           const OptionalTensor& value_feedback);
DequantizeCall dequantize_call(const Tensor& pages, const Fields& format, torch::headeronly::ScalarType dtype,
                               const OptionalTensor& key_map);
EvictCall evict_call(const Tensor& window_k, const Tensor& window_v, const Tensor& pages, const Fields& format,
                     int64_t page, int64_t tokens, int64_t start, int64_t step, int64_t count,
                     const OptionalTensor& key_map, const OptionalTensor& key_weights,
                     const OptionalTensor& value_feedback);
PageScoresCall page_scores_call(const Tensor& q, const Tensor& pages, const Fields& fields, double scale,
                                const OptionalTensor& key_map, const OptionalTensor& means,
                                const OptionalTensor& mean_scales);
struct ChoosePagesCall {
  cpu::ChoosePagesArgs args;
  Tensor scores, counts, pages;
  OptionalTensor others, used;
};
ChoosePagesCall choose_pages_call(const Tensor& scores, const Tensor& counts, int64_t heads, int64_t most,
                                  const OptionalTensor& others, const OptionalTensor& used);
struct ChooseLeavingCall {
  ChooseLeavingArgs args;
  Tensor weight, leaving, staying;
};
ChooseLeavingCall choose_leaving_call(const Tensor& weight, int64_t first, int64_t last, int64_t count,
                                      const std::vector<int64_t>& ranks);
AttendCall attend_call(const Tensor& q, const Tensor& pages, const Tensor& window_k, const Tensor& window_v,
                       const Fields& format, double scale, double softcap, const OptionalTensor& key_map,
                       const OptionalTensor& positions, const OptionalTensor& mask,
                       const OptionalTensor& query_positions, const OptionalTensor& sinks,
                       const OptionalTensor& page_table, const OptionalTensor& lengths,
                       const OptionalTensor& attention);
DecodeStepCall decode_step_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pages,
                                const Tensor& window_k, const Tensor& window_v, const Tensor& positions,
                                const Tensor& lengths, const Tensor& attention, const Tensor& queries,
                                const Tensor& seen, const Fields& fields, double scale, double softcap,
                                const OptionalTensor& key_map, const OptionalTensor& mask, const OptionalTensor& sinks);

}  // namespace logquant
