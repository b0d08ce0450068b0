// The emulated kernels as a C interface for ctypes (tests/helpers/emulated.py). Arguments come as one array of int64,
// in the order in which they are taken below; floats and strings do not occur in it but as bits and as what is
// returned.

#include <algorithm>
#include <cstring>
#include <exception>
#include <iterator>
#include <string>

#include "../cuda/choose_leaving.h"
#include "../cuda/kernels.h"
#include "../emulator/emulator.h"

namespace {

namespace cuda = logquant::cuda;

class Reader {
 public:
  explicit Reader(const int64_t* next) : next_(next) {}
  int64_t number() { return *next_++; }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(number());
  }
  float real() {
    const auto bits = static_cast<uint32_t>(number());
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  logquant::PageFormat format() {
    logquant::PageFormat f;
    for (int* field : {&f.head_dim, &f.value_dim, &f.page_tokens, &f.key_bits, &f.value_bits, &f.key_columns,
                       &f.value_group, &f.key_param_bits, &f.value_param_bits, &f.fine_values}) {
      *field = static_cast<int>(number());
    }
    return f;
  }
  template <class View>
  void tokens(View& x) {
    x.data = pointer<void>();
    x.dtype = static_cast<logquant::Dtype>(number());
    strides(x.batch_stride, x.head_stride, x.token_stride);
  }
  template <class View>
  void pages(View& x) {
    x.data = pointer<int32_t>();
    strides(x.batch_stride, x.head_stride, x.page_stride);
  }
  template <class T>
  void per_head(logquant::PerHead<T>& x) {
    x.data = pointer<const T>();
    strides(x.batch_stride, x.head_stride);
  }
  template <class... Strides>
  void strides(Strides&... s) {
    ((s = number()), ...);
  }

 private:
  const int64_t* next_;
};

std::string message;

// Runs a launcher; nullptr or what went wrong.
template <class F>
const char* guarded(F launch) {
  try {
    const cudaError_t error = launch();
    if (error == cudaSuccess) return nullptr;
    message = "CUDA error " + std::to_string(static_cast<int>(error));
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" {

const char* emulated_quantize(const int64_t* numbers) {
  Reader in(numbers);
  logquant::QuantizeArgs a;
  a.format = in.format();
  in.tokens(a.k);
  in.tokens(a.v);
  in.pages(a.pages);
  in.per_head(a.key_map);
  in.per_head(a.key_weights);
  in.per_head(a.value_feedback);
  a.index = in.pointer<const int32_t>();
  in.strides(a.index_batch_stride, a.batch, a.heads, a.page_count, a.tokens);
  return guarded([&] { return cuda::quantize(a, nullptr); });
}

const char* emulated_dequantize(const int64_t* numbers) {
  Reader in(numbers);
  logquant::DequantizeArgs a;
  a.format = in.format();
  in.tokens(a.k);
  in.tokens(a.v);
  in.pages(a.pages);
  in.per_head(a.key_map);
  in.strides(a.batch, a.heads, a.page_count);
  return guarded([&] { return cuda::dequantize(a, nullptr); });
}

const char* emulated_choose_leaving(const int64_t* numbers) {
  Reader in(numbers);
  logquant::ChooseLeavingArgs a;
  a.weight = in.pointer<const float>();
  in.strides(a.rows, a.slots, a.first, a.last, a.count);
  a.leaving = in.pointer<int32_t>();
  a.staying = in.pointer<int32_t>();
  a.page_tokens = static_cast<int>(in.number());
  for (int place = 0; place < a.page_tokens; ++place) a.places[in.number()] = static_cast<uint8_t>(place);
  return guarded([&] { return cuda::choose_leaving(a, nullptr); });
}

const char* emulated_evict(const int64_t* numbers) {
  Reader in(numbers);
  logquant::EvictArgs a;
  a.format = in.format();
  in.tokens(a.k);
  in.tokens(a.v);
  in.pages(a.pages);
  in.per_head(a.key_map);
  in.per_head(a.key_weights);
  in.per_head(a.value_feedback);
  in.strides(a.batch, a.heads, a.tokens, a.start, a.step, a.count);
  return guarded([&] { return cuda::evict(a, nullptr); });
}

const char* emulated_append(const int64_t* numbers) {
  Reader in(numbers);
  logquant::AppendArgs a;
  in.tokens(a.q);
  in.tokens(a.k);
  in.tokens(a.v);
  in.tokens(a.window_k);
  in.tokens(a.window_v);
  in.tokens(a.queries);
  in.strides(a.batch, a.kv_heads, a.query_heads, a.head_dim, a.value_dim, a.window_slots, a.query_slots);
  a.positions = in.pointer<int32_t>();
  a.positions_batch_stride = in.number();
  a.lengths = in.pointer<int32_t>();
  a.seen = in.pointer<int64_t>();
  return guarded([&] { return cuda::append(a, nullptr); });
}

const char* emulated_page_scores(const int64_t* numbers) {
  Reader in(numbers);
  logquant::PageScoresArgs a;
  a.format = in.format();
  in.strides(a.batch, a.kv_heads, a.group, a.queries, a.page_count);
  in.tokens(a.q);
  in.pages(a.pages);
  in.per_head(a.key_map);
  a.scale = in.real();
  a.means = in.pointer<const int8_t>();
  in.strides(a.means_batch_stride, a.means_head_stride, a.means_page_stride);
  in.per_head(a.mean_scales);
  a.scores = in.pointer<float>();
  return guarded([&] { return cuda::page_scores(a, nullptr); });
}

cuda::AttendArgs attend_args(Reader& in) {
  cuda::AttendArgs a;
  a.format = in.format();
  in.strides(a.batch, a.kv_heads, a.group, a.queries, a.page_count, a.window_tokens, a.page_blocks);
  in.tokens(a.q);
  in.pages(a.pages);
  in.tokens(a.window_k);
  in.tokens(a.window_v);
  in.per_head(a.key_map);
  a.scale = in.real();
  a.softcap = in.real();
  a.page_table = in.pointer<const int32_t>();
  a.page_table_batch_stride = in.number();
  a.lengths = in.pointer<const int32_t>();
  a.lengths_batch_stride = in.number();
  a.positions = in.pointer<const int32_t>();
  a.positions_batch_stride = in.number();
  a.query_positions = in.pointer<const int32_t>();
  a.query_positions_batch_stride = in.number();
  a.mask_kind = static_cast<cuda::AttendArgs::MaskKind>(in.number());
  a.mask = in.pointer<const void>();
  in.strides(a.mask_batch_stride, a.mask_head_stride, a.mask_query_stride, a.mask_position_stride, a.mask_positions);
  a.sinks = in.pointer<const float>();
  a.out = in.pointer<void>();
  a.lse = in.pointer<float>();
  in.per_head(a.attention);
  a.attention_slots = in.number();
  a.attention_out = in.pointer<float>();
  return a;
}

int64_t emulated_attend_workspace(const int64_t* numbers) {
  Reader in(numbers);
  cuda::AttendArgs a = attend_args(in);
  return cuda::plan(a, emulator::config().multiprocessors);
}

const char* emulated_attend_path(const int64_t* numbers) {
  Reader in(numbers);
  return cuda::attend_path(attend_args(in));
}

// The last number is the workspace, of the size that emulated_attend_workspace asked for.
const char* emulated_attend(const int64_t* numbers) {
  Reader in(numbers);
  cuda::AttendArgs a = attend_args(in);
  cuda::plan(a, emulator::config().multiprocessors);
  cuda::use_workspace(a, in.pointer<float>());
  return guarded([&] { return cuda::attend(a, nullptr); });
}

void emulated_configure(int order, int copies, int64_t seed, int mma_block, int mma_guard_bits, int multiprocessors) {
  emulator::Config& c = emulator::config();
  c.order = static_cast<emulator::Order>(order);
  c.copies = static_cast<emulator::Copies>(copies);
  c.seed = static_cast<uint64_t>(seed);
  c.mma_block = mma_block;
  c.mma_guard_bits = mma_guard_bits;
  c.multiprocessors = multiprocessors;
}

// blocks, barriers, collectives, mma, most shared memory, bytes by cp.async, bytes by load; since the last call.
void emulated_counters(int64_t* out) {
  emulator::Counters& c = emulator::counters();
  const uint64_t values[] = {c.blocks, c.barriers, c.collectives, c.mma, c.shared_bytes, c.async_bytes, c.load_bytes};
  std::copy(std::begin(values), std::end(values), out);
  c = {};
}

}  // extern "C"
