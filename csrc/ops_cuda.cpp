// The operators' CUDA kernels: device, stream and workspace come from torch, the rest from arguments.h.
//
// The CUDA runtime is linked statically and torch's stream is a weak symbol, so that this file needs no CUDA build of
// torch: a binary with it also imports where there is no GPU, no driver and no CUDA torch.

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "arguments.h"
#include "checks.h"
#include "cuda/choose_leaving.h"
#include "cuda/kernels.h"

// In torch's C shim where torch was built with CUDA, and declared there if USE_CUDA is. The stable C++ API tells a
// stream's handle since 2.13 only.
extern "C" [[gnu::weak]] AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace logquant {
namespace {

void check_launch(cudaError_t error, const char* name) {
  LOGQUANT_CHECK(error == cudaSuccess, name, " failed on the GPU: ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int32_t device) {
  LOGQUANT_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(device, &stream);
  LOGQUANT_CHECK(error == AOTI_TORCH_SUCCESS, "torch told no current stream of GPU ", device);
  return static_cast<cudaStream_t>(stream);
}

// The device of a tensor as the current one, and torch's stream on it.
class Launch {
 public:
  explicit Launch(const Tensor& t) : guard_(t.get_device_index()), stream_(current_stream(t.get_device_index())) {}
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

int multiprocessors(int device) {
  int count = 0;
  check_launch(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

Tensor quantize(const Tensor& k, const Tensor& v, const Fields& format, const OptionalTensor& index,
                const OptionalTensor& key_map, const OptionalTensor& key_weights,
                const OptionalTensor& value_feedback) {
  const Launch launch(k);
  const QuantizeCall call = quantize_call(k, v, format, index, key_map, key_weights, value_feedback);
  if (call.pages.numel() == 0) return call.pages;
  check_launch(cuda::quantize(call.args, launch.stream()), "quantize");
  return call.pages;
}

std::tuple<Tensor, Tensor> dequantize(const Tensor& pages, const Fields& format, ScalarType dtype,
                                      const OptionalTensor& key_map) {
  const Launch launch(pages);
  const DequantizeCall call = dequantize_call(pages, format, dtype, key_map);
  if (call.k.numel() > 0) check_launch(cuda::dequantize(call.args, launch.stream()), "dequantize");
  return {call.k, call.v};
}

void evict(Tensor window_k, Tensor window_v, Tensor pages, const Fields& format, int64_t page, int64_t tokens,
           int64_t start, int64_t step, int64_t count, const OptionalTensor& key_map, const OptionalTensor& key_weights,
           const OptionalTensor& value_feedback) {
  const Launch launch(window_k);
  const EvictCall call = evict_call(window_k, window_v, pages, format, page, tokens, start, step, count, key_map,
                                    key_weights, value_feedback);
  if (window_k.numel() > 0) check_launch(cuda::evict(call.args, launch.stream()), "evict_");
}

Tensor page_scores(const Tensor& q, const Tensor& pages, const Fields& format, double scale,
                   const OptionalTensor& key_map, const OptionalTensor& means, const OptionalTensor& mean_scales) {
  const Launch launch(q);
  const PageScoresCall call = page_scores_call(q, pages, format, scale, key_map, means, mean_scales);
  if (call.scores.numel() > 0) check_launch(cuda::page_scores(call.args, launch.stream()), "page_scores");
  return call.scores;
}

std::tuple<Tensor, Tensor> choose_leaving(const Tensor& weight, int64_t first, int64_t last, int64_t count,
                                          const std::vector<int64_t>& ranks) {
  const Launch launch(weight);
  const ChooseLeavingCall call = choose_leaving_call(weight, first, last, count, ranks);
  if (weight.size(0) > 0) check_launch(cuda::choose_leaving(call.args, launch.stream()), "choose_leaving");
  return {call.leaving, call.staying};
}

void check_fits(const logquant::AttendArgs& args) {
  constexpr int64_t kMostHeads = 65535;  // of a grid's second dimension
  LOGQUANT_CHECK(args.batch * args.kv_heads <= kMostHeads, "q must be of at most ", kMostHeads / args.kv_heads,
                 " sequences of ", args.kv_heads, " KV heads at once on a GPU, got ", args.batch);
}

void run(const AttendCall& call, const Launch& launch) {
  cuda::AttendArgs args{call.args};
  const int64_t floats = cuda::plan(args, multiprocessors(call.q.get_device_index()));
  const Tensor workspace = torch::stable::new_empty(call.q, {floats}, ScalarType::Float);
  cuda::use_workspace(args, static_cast<float*>(workspace.data_ptr()));
  check_launch(cuda::attend(args, launch.stream()), "attend");
}

std::tuple<Tensor, Tensor, Tensor> attend(const Tensor& q, const Tensor& pages, const Tensor& window_k,
                                          const Tensor& window_v, const Fields& format, double scale, double softcap,
                                          const OptionalTensor& key_map, const OptionalTensor& positions,
                                          const OptionalTensor& mask, const OptionalTensor& query_positions,
                                          const OptionalTensor& sinks, const OptionalTensor& page_table,
                                          const OptionalTensor& lengths, const OptionalTensor& attention) {
  const Launch launch(q);
  const AttendCall call = attend_call(q, pages, window_k, window_v, format, scale, softcap, key_map, positions, mask,
                                      query_positions, sinks, page_table, lengths, attention);
  if (call.lse.numel() > 0) {
    check_fits(call.args);
    run(call, launch);
  }
  return {call.out, call.lse, call.attention_out};
}

Tensor decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pages, Tensor window_k,
                   Tensor window_v, Tensor positions, Tensor lengths, Tensor attention, Tensor queries, Tensor seen,
                   const Fields& format, double scale, double softcap, const OptionalTensor& key_map,
                   const OptionalTensor& mask, const OptionalTensor& sinks) {
  const Launch launch(q);
  const DecodeStepCall call = decode_step_call(q, k, v, pages, window_k, window_v, positions, lengths, attention,
                                               queries, seen, format, scale, softcap, key_map, mask, sinks);
  if (call.attend.lse.numel() == 0) return call.attend.out;
  check_fits(call.attend.args);
  check_launch(cuda::append(call.append, launch.stream()), "append");
  run(call.attend, launch);
  return call.attend.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(logquant, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("evict_", TORCH_BOX(&evict));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("decode_step_", TORCH_BOX(&decode_step));
  m.impl("page_scores", TORCH_BOX(&page_scores));
  m.impl("choose_leaving", TORCH_BOX(&choose_leaving));
}

}  // namespace logquant
