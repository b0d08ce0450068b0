// The kernels without torch, on several threads: every instruction set of this machine gives the same pages, and
// attention over them is that of a plain loop in double. Meant for sanitizers, above all TSan; the full tests are in
// tests/, in Python.

#include "cpu/kernels.h"

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "format.h"

namespace {

using namespace logquant;

constexpr int kThreads = 4;
constexpr int64_t kBatch = 2, kHeads = 2, kGroup = 3, kQueries = 2;

void check(bool ok, const char* what, const char* isa, const PageFormat& f) {
  if (ok) return;
  std::fprintf(stderr, "%s: %s (D %d, Dv %d, G %d, bits %d and %d)\n", isa, what, f.head_dim, f.value_dim,
               f.page_tokens, f.key_bits, f.value_bits);
  std::exit(1);
}

void on_threads(int64_t count, const cpu::Task& task) {
  std::atomic<int64_t> next = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (int64_t t = next++; t < count; t = next++) task(t);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// [batch, heads, tokens, dim], contiguous.
template <class View>
View view(std::vector<float>& x, int64_t heads, int64_t tokens, int64_t dim) {
  return {x.data(), cpu::Dtype::kFloat32, heads * tokens * dim, tokens * dim, dim};
}

void run(const PageFormat& f, int64_t page_count, int64_t window) {
  std::mt19937 random(static_cast<unsigned>(f.head_dim + page_count));
  std::normal_distribution<float> normal;
  const auto tensor = [&](int64_t size) {
    std::vector<float> x(static_cast<size_t>(size));
    for (float& value : x) value = normal(random);
    return x;
  };
  const int64_t packed = page_count * f.page_tokens, rows = kBatch * kHeads;
  std::vector<float> k = tensor(rows * packed * f.head_dim), v = tensor(rows * packed * f.value_dim);
  std::vector<float> window_k = tensor(rows * window * f.head_dim), window_v = tensor(rows * window * f.value_dim);
  std::vector<float> q = tensor(rows * kGroup * kQueries * f.head_dim);
  std::vector<float> dense_k(k.size()), dense_v(v.size());
  std::vector<int32_t> first_pages;
  const int64_t head_words = page_count * f.words();

  for (const cpu::Kernels* set : cpu::available_kernels()) {
    std::vector<int32_t> pages(static_cast<size_t>(rows * head_words));
    cpu::QuantizeArgs quantize;
    quantize.format = f;
    quantize.k = view<cpu::Tokens>(k, kHeads, packed, f.head_dim);
    quantize.v = view<cpu::Tokens>(v, kHeads, packed, f.value_dim);
    quantize.pages = {pages.data(), kHeads * head_words, head_words, f.words()};
    quantize.batch = kBatch;
    quantize.heads = kHeads;
    quantize.page_count = page_count;
    set->quantize(quantize, on_threads);
    if (first_pages.empty()) first_pages = pages;
    check(pages == first_pages, "pages differ from those of the first instruction set", set->name, f);

    cpu::DequantizeArgs dequantize;
    dequantize.format = f;
    dequantize.pages = {pages.data(), kHeads * head_words, head_words, f.words()};
    dequantize.k = view<cpu::MutableTokens>(dense_k, kHeads, packed, f.head_dim);
    dequantize.v = view<cpu::MutableTokens>(dense_v, kHeads, packed, f.value_dim);
    dequantize.batch = kBatch;
    dequantize.heads = kHeads;
    dequantize.page_count = page_count;
    set->dequantize(dequantize, on_threads);

    std::vector<float> out(static_cast<size_t>(rows * kGroup * kQueries * f.value_dim));
    std::vector<float> lse(static_cast<size_t>(rows * kGroup * kQueries));
    cpu::AttendArgs attend;
    attend.format = f;
    attend.batch = kBatch;
    attend.kv_heads = kHeads;
    attend.group = kGroup;
    attend.queries = kQueries;
    attend.q = view<cpu::Tokens>(q, kHeads * kGroup, kQueries, f.head_dim);
    attend.pages = dequantize.pages;
    attend.page_count = page_count;
    attend.window_k = view<cpu::Tokens>(window_k, kHeads, window, f.head_dim);
    attend.window_v = view<cpu::Tokens>(window_v, kHeads, window, f.value_dim);
    attend.window_tokens = window;
    attend.scale = 1.0f / std::sqrt(static_cast<float>(f.head_dim));
    attend.out = out.data();
    attend.lse = lse.data();
    set->attend(attend, on_threads);

    for (int64_t row = 0; row < rows * kGroup * kQueries; ++row) {
      const int64_t head = row / (kGroup * kQueries);
      std::vector<double> sum(static_cast<size_t>(f.value_dim));
      double denominator = 0;
      for (int64_t t = 0; t < packed + window; ++t) {
        const bool in_pages = t < packed;
        const int64_t token = in_pages ? head * packed + t : head * window + t - packed;
        const float* key = (in_pages ? dense_k : window_k).data() + token * f.head_dim;
        const float* value = (in_pages ? dense_v : window_v).data() + token * f.value_dim;
        double score = 0;
        for (int c = 0; c < f.head_dim; ++c) score += static_cast<double>(q[row * f.head_dim + c]) * key[c];
        const double weight = std::exp(score * attend.scale);
        denominator += weight;
        for (int c = 0; c < f.value_dim; ++c) sum[c] += weight * value[c];
      }
      check(std::abs(lse[row] - std::log(denominator)) < 1e-3, "wrong log-sum-exp", set->name, f);
      for (int c = 0; c < f.value_dim; ++c) {
        check(std::abs(out[row * f.value_dim + c] - sum[c] / denominator) < 1e-3, "wrong output", set->name, f);
      }
    }

    // One eviction of every second token of the first two pages' worth.
    std::vector<float> thinned_k = k, thinned_v = v;
    cpu::EvictArgs evict;
    evict.format = f;
    evict.k = view<cpu::MutableTokens>(thinned_k, kHeads, packed, f.head_dim);
    evict.v = view<cpu::MutableTokens>(thinned_v, kHeads, packed, f.value_dim);
    evict.pages = {pages.data(), kHeads * head_words, head_words, f.words()};
    evict.batch = kBatch;
    evict.heads = kHeads;
    evict.tokens = packed;
    evict.start = 1;
    evict.step = 2;
    evict.count = f.page_tokens;
    set->evict(evict, on_threads);
    for (int64_t t = 0; t < packed - f.page_tokens; ++t) {
      const int64_t from = t < f.page_tokens ? 2 * t : t + f.page_tokens;
      check(thinned_k[t * f.head_dim] == k[from * f.head_dim], "wrong token after an eviction", set->name, f);
    }
  }
}

PageFormat format(int head_dim, int value_dim, int page_tokens, int key_bits, int value_bits, int value_group) {
  PageFormat f;
  f.head_dim = f.key_columns = head_dim;
  f.value_dim = value_dim;
  f.page_tokens = page_tokens;
  f.key_bits = key_bits;
  f.value_bits = value_bits;
  f.value_group = value_group;
  return f;
}

}  // namespace

int main() {
  run(format(128, 128, 64, 2, 2, 64), 20, 100);
  run(format(64, 64, 32, 2, 2, 64), 40, 1);
  run(format(80, 80, 64, 4, 2, 80), 10, 33);
  run(format(192, 128, 128, 8, 4, 32), 10, 64);
  for (PageFormat f : {format(64, 64, 64, 2, 2, 64), format(128, 96, 32, 2, 4, 96)}) {
    f.key_param_bits = f.value_param_bits = 8;
    run(f, 20, 100);
  }
  std::puts("1 passed, 0 failed");
  return 0;
}
