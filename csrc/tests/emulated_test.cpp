// The CUDA kernels on the emulator, without torch: pages are those of the CPU kernels bit for bit, attention is close
// to theirs, in every order of threads. Meant for sanitizers, which see each access of each thread; the full tests are
// in tests/, in Python.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/choose_leaving.h"
#include "cpu/kernels.h"
#include "cuda/choose_leaving.h"
#include "cuda/kernels.h"
#include "emulator/emulator.h"

namespace {

using namespace logquant;

constexpr int64_t kBatch = 1, kHeads = 2;
constexpr int64_t kPagesOfBlocks = 2;  // that a kernel with blocks of its own for each page works on: others are alike

void check(bool ok, const char* what, const PageFormat& f, const char* path = "") {
  if (ok) return;
  std::fprintf(stderr, "%s: %s (D %d, C %d, Dv %d, G %d, bits %d and %d, of parameters %d and %d)\n", what, path,
               f.head_dim, f.key_columns, f.value_dim, f.page_tokens, f.key_bits, f.value_bits, f.key_param_bits,
               f.value_param_bits);
  std::exit(1);
}

void one_by_one(int64_t count, const cpu::Task& task) {
  for (int64_t i = 0; i < count; ++i) task(i);
}

// Random numbers that bfloat16 holds, as float32 and as bfloat16.
struct Data {
  Data(int64_t size, std::mt19937& random) : wide(size), narrow(size) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size; ++i) {
      wide[i] = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &wide[i], sizeof bits);
      narrow[i] = static_cast<uint16_t>(bits >> 16);
      bits &= 0xFFFF0000u;
      std::memcpy(&wide[i], &bits, sizeof bits);
    }
  }
  // [batch, heads, tokens, dim], contiguous.
  template <class View>
  View view(Dtype dtype, int64_t heads, int64_t tokens, int64_t dim) {
    void* const data = dtype == Dtype::kFloat32 ? static_cast<void*>(wide.data()) : narrow.data();
    return {data, dtype, heads * tokens * dim, tokens * dim, dim};
  }
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
};

float from_bfloat16(uint16_t bits) {
  const uint32_t word = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

void run(const PageFormat& f, int64_t page_count, int64_t window, int64_t group, int64_t queries, const char* path) {
  std::mt19937 random(static_cast<unsigned>(f.head_dim + page_count));
  const int64_t packed = page_count * f.page_tokens, rows = kBatch * kHeads, head_words = page_count * f.words();
  Data k(rows * packed * f.head_dim, random), v(rows * packed * f.value_dim, random);
  Data window_k(rows * window * f.head_dim, random), window_v(rows * window * f.value_dim, random);
  Data q(rows * group * queries * f.head_dim, random);
  std::vector<int16_t> map;  // with more columns than channels, the first ones get a second
  for (int c = 0; c < f.key_columns; ++c) map.push_back(static_cast<int16_t>(4 * (c % f.head_dim) + c / f.head_dim));
  const KeyMap key_map{f.key_columns == f.head_dim ? nullptr : map.data(), 0, 0};
  std::vector<float> weights(kHeads * packed);
  for (float& weight : weights) weight = std::uniform_real_distribution<float>(-0.1f, 4.0f)(random);
  const KeyWeights key_weights{weights.data(), 0, packed};
  std::vector<float> factors(kHeads * packed * f.page_tokens);
  for (float& factor : factors) factor = std::normal_distribution<float>(0.0f, 0.2f)(random);
  ValueFeedback value_feedback;
  if (f.value_param_bits == 8) value_feedback = {factors.data(), 0, packed * f.page_tokens};

  const Dtype dtype = Dtype::kBFloat16;
  std::vector<int32_t> expected(rows * head_words);
  QuantizeArgs quantize;
  quantize.tokens = packed;
  quantize.format = f;
  quantize.k = k.view<Tokens>(dtype, kHeads, packed, f.head_dim);
  quantize.v = v.view<Tokens>(dtype, kHeads, packed, f.value_dim);
  quantize.pages = {expected.data(), kHeads * head_words, head_words, f.words()};
  quantize.key_map = key_map;
  quantize.key_weights = key_weights;
  quantize.value_feedback = value_feedback;
  quantize.batch = kBatch;
  quantize.heads = kHeads;
  quantize.page_count = page_count;
  cpu::kernels().quantize(quantize, one_by_one);
  const int64_t few = std::min(page_count, kPagesOfBlocks);
  std::vector<int32_t> pages = expected;
  for (int64_t row = 0; row < rows; ++row) std::fill_n(pages.begin() + row * head_words, few * f.words(), 0);
  quantize.pages.data = pages.data();
  quantize.page_count = few;
  check(cuda::quantize(quantize, nullptr) == cudaSuccess, "quantize failed", f);
  check(pages == expected, "pages differ from those of the CPU", f);

  Data restored_k(k.wide.size(), random), restored_v(v.wide.size(), random), cpu_k = restored_k, cpu_v = restored_v;
  DequantizeArgs dequantize;
  dequantize.format = f;
  dequantize.pages = {pages.data(), kHeads * head_words, head_words, f.words()};
  dequantize.key_map = key_map;
  dequantize.k = restored_k.view<MutableTokens>(dtype, kHeads, packed, f.head_dim);
  dequantize.v = restored_v.view<MutableTokens>(dtype, kHeads, packed, f.value_dim);
  dequantize.batch = kBatch;
  dequantize.heads = kHeads;
  dequantize.page_count = few;
  check(cuda::dequantize(dequantize, nullptr) == cudaSuccess, "dequantize failed", f);
  dequantize.k.data = cpu_k.narrow.data();
  dequantize.v.data = cpu_v.narrow.data();
  cpu::kernels().dequantize(dequantize, one_by_one);
  check(restored_k.narrow == cpu_k.narrow && restored_v.narrow == cpu_v.narrow, "tokens differ", f);

  std::vector<float> out(rows * group * queries * f.value_dim), lse(rows * group * queries), cpu_lse(lse.size());
  std::vector<uint16_t> narrow_out(out.size());
  cuda::AttendArgs attend;
  attend.format = f;
  attend.batch = kBatch;
  attend.kv_heads = kHeads;
  attend.group = group;
  attend.queries = queries;
  attend.page_count = page_count;
  attend.window_tokens = window;
  attend.pages = dequantize.pages;
  attend.key_map = key_map;
  attend.scale = 1.0f / std::sqrt(static_cast<float>(f.head_dim));
  const auto with_dtype = [&](AttendArgs& args, Dtype type, void* to, std::vector<float>& sums) {
    args.q = q.view<Tokens>(type, kHeads * group, queries, f.head_dim);
    args.window_k = window_k.view<Tokens>(type, kHeads, window, f.head_dim);
    args.window_v = window_v.view<Tokens>(type, kHeads, window, f.value_dim);
    args.out = to;
    args.lse = sums.data();
  };
  AttendArgs wide = attend;
  with_dtype(wide, Dtype::kFloat32, out.data(), cpu_lse);
  cpu::kernels().attend(wide, one_by_one);
  with_dtype(attend, dtype, narrow_out.data(), lse);
  std::vector<float> workspace(cuda::plan(attend, emulator::config().multiprocessors));
  cuda::use_workspace(attend, workspace.data());
  check(std::string(cuda::attend_path(attend)) == path, "another kernel was to run", f, cuda::attend_path(attend));
  check(cuda::attend(attend, nullptr) == cudaSuccess, "attend failed", f, path);
  for (size_t i = 0; i < out.size(); ++i) {
    check(std::abs(from_bfloat16(narrow_out[i]) - out[i]) < 2e-2f, "wrong output", f, path);
  }
  for (size_t i = 0; i < lse.size(); ++i) check(std::abs(lse[i] - cpu_lse[i]) < 2e-2f, "wrong log-sum-exp", f, path);

  EvictArgs evict;
  evict.format = f;
  evict.key_map = key_map;
  evict.key_weights = key_weights;
  evict.value_feedback = value_feedback;
  evict.batch = kBatch;
  evict.heads = kHeads;
  evict.tokens = packed;
  evict.start = 1;
  evict.step = 2;
  evict.count = f.page_tokens;
  evict.pages = {expected.data(), kHeads * head_words, head_words, f.words()};
  evict.k = cpu_k.view<MutableTokens>(dtype, kHeads, packed, f.head_dim);
  evict.v = cpu_v.view<MutableTokens>(dtype, kHeads, packed, f.value_dim);
  cpu::kernels().evict(evict, one_by_one);
  evict.pages.data = pages.data();
  evict.k.data = restored_k.narrow.data();
  evict.v.data = restored_v.narrow.data();
  check(cuda::evict(evict, nullptr) == cudaSuccess, "evict failed", f);
  check(pages == expected, "pages differ after an eviction", f);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < (packed - f.page_tokens) * f.head_dim; ++i) {
      const int64_t at = row * packed * f.head_dim + i;
      check(restored_k.narrow[at] == cpu_k.narrow[at], "wrong tokens after an eviction", f);
    }
  }
}

// Few different weights, so that many are equal.
void choose_leaving(int64_t slots, int page_tokens) {
  std::mt19937 random(static_cast<unsigned>(slots));
  ChooseLeavingArgs args;
  args.rows = 2;
  args.slots = slots;
  args.first = 3;
  args.last = slots - 7;
  args.page_tokens = page_tokens;
  args.count = (args.last - args.first) / page_tokens * page_tokens;
  std::vector<float> weight(args.rows * slots);
  for (float& x : weight) x = static_cast<float>(std::uniform_int_distribution<int>(0, 9)(random));
  for (int rank = 0; rank < page_tokens; ++rank) args.places[rank] = static_cast<uint8_t>(page_tokens - 1 - rank);
  std::vector<int32_t> leaving(args.rows * args.count), staying(weight.size() - leaving.size());
  std::vector<int32_t> cpu_leaving = leaving, cpu_staying = staying;
  args.weight = weight.data();
  args.leaving = cpu_leaving.data();
  args.staying = cpu_staying.data();
  cpu::choose_leaving(args, one_by_one);
  args.leaving = leaving.data();
  args.staying = staying.data();
  check(cuda::choose_leaving(args, nullptr) == cudaSuccess, "choose_leaving failed", PageFormat{});
  check(leaving == cpu_leaving && staying == cpu_staying, "other tokens leave", PageFormat{});
}

PageFormat format(int head_dim, int value_dim, int page_tokens, int key_bits, int value_bits, int key_columns) {
  return {head_dim, value_dim, page_tokens, key_bits, value_bits, key_columns, value_dim % 64 ? value_dim : 64};
}
PageFormat fitted(PageFormat f) {
  f.key_param_bits = f.value_param_bits = 8;
  return f;
}
PageFormat fine(PageFormat f, int fine_values = 8) {
  f = fitted(f);
  f.fine_values = fine_values;
  return f;
}

}  // namespace

// emulated_test forward|random: the order of threads and of copies.
int main(int argc, char** argv) {
  using emulator::Copies, emulator::Order;
  const bool random = argc == 2 && std::strcmp(argv[1], "random") == 0;
  if (!random && (argc != 2 || std::strcmp(argv[1], "forward") != 0)) {
    std::fprintf(stderr, "usage: emulated_test forward|random\n");
    return 2;
  }
  emulator::config().order = random ? Order::kRandom : Order::kForward;
  emulator::config().copies = random ? Copies::kRandom : Copies::kLazy;
  choose_leaving(210, 64);
  choose_leaving(1200, 128);
  run(format(128, 128, 64, 2, 2, 128), 9, 40, 4, 1, "tensor");
  run(fitted(format(64, 64, 64, 2, 2, 80)), 9, 1, 4, 3, "tensor");
  run(fitted(format(256, 256, 64, 2, 2, 320)), 5, 20, 4, 3, "tensor");  // two warps share a page
  run(fine(format(64, 64, 64, 2, 2, 96)), 9, 1, 4, 3, "tensor");
  run(format(80, 96, 32, 4, 2, 80), 5, 33, 1, 2, "general");
  run(format(96, 64, 128, 2, 8, 112), 3, 70, 2, 33, "prefill");
  run(fitted(format(80, 96, 32, 4, 8, 96)), 5, 33, 1, 2, "general");
  run(fitted(format(96, 64, 128, 2, 2, 112)), 3, 70, 2, 33, "prefill");
  run(fine(format(96, 64, 64, 2, 2, 112)), 3, 70, 2, 33, "prefill");
  run(fine(format(80, 96, 64, 4, 2, 96)), 5, 33, 1, 2, "general");
  run(fine(format(80, 192, 64, 4, 2, 96), 4), 5, 33, 1, 2, "general");
  run({64, 256, 128, 2, 2, 64, 256, 8, 8}, 2, 1, 1, 1, "general");  // more than values are fed back at once
  std::puts("1 passed, 0 failed");
  return 0;
}
