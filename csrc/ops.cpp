// The operators torch.ops.logquant.*: their schemas, and their CPU kernels. ops_cuda.cpp adds the CUDA kernels.
//
// Only torch's stable C++ ABI is used, so one build works with every torch from TORCH_TARGET_VERSION on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "arguments.h"
#include "cpu/append.h"
#include "cpu/choose_leaving.h"
#include "cpu/kernels.h"

namespace logquant {
namespace {

using torch::headeronly::ScalarType;

void parallel_for(int64_t count, const cpu::Task& task) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

Tensor quantize(const Tensor& k, const Tensor& v, const Fields& format, const OptionalTensor& index,
                const OptionalTensor& key_map, const OptionalTensor& key_weights,
                const OptionalTensor& value_feedback) {
  const QuantizeCall call = quantize_call(k, v, format, index, key_map, key_weights, value_feedback);
  if (call.pages.numel() > 0) cpu::kernels().quantize(call.args, parallel_for);
  return call.pages;
}

std::tuple<Tensor, Tensor> dequantize(const Tensor& pages, const Fields& format, ScalarType dtype,
                                      const OptionalTensor& key_map) {
  const DequantizeCall call = dequantize_call(pages, format, dtype, key_map);
  if (call.k.numel() > 0) cpu::kernels().dequantize(call.args, parallel_for);
  return {call.k, call.v};
}

void evict(Tensor window_k, Tensor window_v, Tensor pages, const Fields& format, int64_t page, int64_t tokens,
           int64_t start, int64_t step, int64_t count, const OptionalTensor& key_map, const OptionalTensor& key_weights,
           const OptionalTensor& value_feedback) {
  const EvictCall call = evict_call(window_k, window_v, pages, format, page, tokens, start, step, count, key_map,
                                    key_weights, value_feedback);
  if (window_k.numel() > 0) cpu::kernels().evict(call.args, parallel_for);
}

Tensor page_scores(const Tensor& q, const Tensor& pages, const Fields& format, double scale,
                   const OptionalTensor& key_map, const OptionalTensor& means, const OptionalTensor& mean_scales) {
  const PageScoresCall call = page_scores_call(q, pages, format, scale, key_map, means, mean_scales);
  if (call.scores.numel() > 0) cpu::kernels().page_scores(call.args, parallel_for);
  return call.scores;
}

Tensor choose_pages(const Tensor& scores, const Tensor& counts, int64_t heads, int64_t most,
                    const OptionalTensor& others, const OptionalTensor& used) {
  const ChoosePagesCall call = choose_pages_call(scores, counts, heads, most, others, used);
  if (call.pages.numel() > 0) cpu::kernels().choose_pages(call.args, parallel_for);
  return call.pages;
}

std::tuple<Tensor, Tensor> choose_leaving(const Tensor& weight, int64_t first, int64_t last, int64_t count,
                                          const std::vector<int64_t>& ranks) {
  const ChooseLeavingCall call = choose_leaving_call(weight, first, last, count, ranks);
  if (weight.size(0) > 0) cpu::choose_leaving(call.args, parallel_for);
  return {call.leaving, call.staying};
}

std::tuple<Tensor, Tensor, Tensor> attend(const Tensor& q, const Tensor& pages, const Tensor& window_k,
                                          const Tensor& window_v, const Fields& format, double scale, double softcap,
                                          const OptionalTensor& key_map, const OptionalTensor& positions,
                                          const OptionalTensor& mask, const OptionalTensor& query_positions,
                                          const OptionalTensor& sinks, const OptionalTensor& page_table,
                                          const OptionalTensor& lengths, const OptionalTensor& attention) {
  const AttendCall call = attend_call(q, pages, window_k, window_v, format, scale, softcap, key_map, positions, mask,
                                      query_positions, sinks, page_table, lengths, attention);
  if (call.lse.numel() > 0) cpu::kernels().attend(call.args, parallel_for);
  return {call.out, call.lse, call.attention_out};
}

Tensor decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pages, Tensor window_k,
                   Tensor window_v, Tensor positions, Tensor lengths, Tensor attention, Tensor queries, Tensor seen,
                   const Fields& format, double scale, double softcap, const OptionalTensor& key_map,
                   const OptionalTensor& mask, const OptionalTensor& sinks) {
  const DecodeStepCall call = decode_step_call(q, k, v, pages, window_k, window_v, positions, lengths, attention,
                                               queries, seen, format, scale, softcap, key_map, mask, sinks);
  if (call.attend.lse.numel() == 0) return call.attend.out;
  cpu::append(call.append);
  cpu::kernels().attend(call.attend.args, parallel_for);
  return call.attend.out;
}

}  // namespace

STABLE_TORCH_LIBRARY(logquant, m) {
  m.def(
      "quantize(Tensor k, Tensor v, int[] format, Tensor? index=None, Tensor? key_map=None, Tensor? key_weights=None, "
      "Tensor? value_feedback=None) -> Tensor");
  m.def("dequantize(Tensor pages, int[] format, ScalarType dtype, Tensor? key_map=None) -> (Tensor, Tensor)");
  m.def(
      "evict_(Tensor(a!) window_k, Tensor(b!) window_v, Tensor(c!) pages, int[] format, int page, int tokens, "
      "int start, int step, int count, Tensor? key_map=None, Tensor? key_weights=None, Tensor? value_feedback=None) -> "
      "()");
  m.def(
      "attend(Tensor q, Tensor pages, Tensor window_k, Tensor window_v, int[] format, float scale, "
      "float softcap=0.0, Tensor? key_map=None, Tensor? positions=None, Tensor? mask=None, "
      "Tensor? query_positions=None, Tensor? sinks=None, Tensor? page_table=None, Tensor? lengths=None, "
      "Tensor? attention=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "decode_step_(Tensor q, Tensor k, Tensor v, Tensor pages, Tensor(a!) window_k, Tensor(b!) window_v, "
      "Tensor(c!) positions, Tensor(d!) lengths, Tensor(e!) attention, Tensor(f!) queries, Tensor(g!) seen, "
      "int[] format, float scale, float softcap=0.0, Tensor? key_map=None, Tensor? mask=None, Tensor? sinks=None) -> "
      "Tensor");
  m.def(
      "page_scores(Tensor q, Tensor pages, int[] format, float scale, Tensor? key_map=None, Tensor? means=None, "
      "Tensor? mean_scales=None) -> Tensor");
  m.def(
      "choose_pages(Tensor scores, Tensor counts, int heads, int most, Tensor? others=None, Tensor? used=None) -> "
      "Tensor");
  m.def("choose_leaving(Tensor weight, int first, int last, int count, int[] ranks) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(logquant, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("evict_", TORCH_BOX(&evict));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("decode_step_", TORCH_BOX(&decode_step));
  m.impl("page_scores", TORCH_BOX(&page_scores));
  m.impl("choose_pages", TORCH_BOX(&choose_pages));
  m.impl("choose_leaving", TORCH_BOX(&choose_leaving));
}

}  // namespace logquant
