// The kernels without torch, on several threads: every instruction set of this machine quantises, dequantises and
// evicts bit for bit alike, with the bits that every other machine has, too, and attention is that of a plain loop in
// double; with matrix tiles, bit for bit what it is without. Meant for sanitizers, above all TSan, and for processors
// that are emulated; the full tests are in tests/, in Python.

#include "cpu/kernels.h"

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cpu/append.h"
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

// Of all that main() quantises, dequantises and evicts, on every processor. A change of the format, of the quantiser or
// of this test changes it.
constexpr uint64_t kChecksum = 0x00FD0D01A51318A0u;
uint64_t checksum = 0xCBF29CE484222325u;

// FNV-1a.
template <class T>
void add_to_checksum(const std::vector<T>& x) {
  const auto* const bytes = reinterpret_cast<const unsigned char*>(x.data());
  for (size_t i = 0; i < x.size() * sizeof(T); ++i) checksum = (checksum ^ bytes[i]) * 0x100000001B3u;
}

// From integers, which are the same on every machine: about normal, and exact in every dtype; what a float32 has room
// for besides is random.
float draw(std::mt19937& random, Dtype dtype) {
  int sum = -126;
  for (int i = 0; i < 4; ++i) sum += static_cast<int>(random() >> 26);
  const float x = static_cast<float>(sum) / 32.0f;
  return dtype == Dtype::kFloat32 ? x + static_cast<float>(random() >> 16) * 0x1p-21f : x;
}

uint32_t element_of(float x, Dtype dtype) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (dtype == Dtype::kFloat32) return bits;
  if (dtype == Dtype::kBFloat16) return bits >> 16;
  return x == 0.0f ? 0 : (bits >> 16 & 0x8000) | ((bits & 0x7FFFFFFF) - (112u << 23)) >> 13;
}

// Any bits at all: subnormals, and in some channels infinities and NaNs, of which a half would have too many.
uint32_t raw_element(std::mt19937& random, Dtype dtype) {
  const uint32_t bits = static_cast<uint32_t>(random());
  return dtype == Dtype::kFloat16 && random() % 16 != 0 ? bits & 0xBFFF : bits;
}

// [batch, heads, tokens, dim], contiguous.
struct Tensor {
  Dtype dtype;
  int64_t heads, tokens, dim;
  std::vector<char> data;

  Tensor(Dtype dtype, int64_t heads, int64_t tokens, int64_t dim)
      : dtype(dtype), heads(heads), tokens(tokens), dim(dim) {
    data.resize(static_cast<size_t>(kBatch * heads * tokens * dim * bytes()));
  }

  int64_t bytes() const { return dtype == Dtype::kFloat32 ? 4 : 2; }

  template <class View>
  View view() {
    return {data.data(), dtype, heads * tokens * dim, tokens * dim, dim};
  }

  // Random elements; what they are as floats is put into values.
  void fill(std::mt19937& random, bool raw, std::vector<float>* values = nullptr) {
    for (size_t at = 0; at < data.size(); at += static_cast<size_t>(bytes())) {
      const float x = draw(random, dtype);
      const uint32_t element = raw ? raw_element(random, dtype) : element_of(x, dtype);
      std::memcpy(data.data() + at, &element, static_cast<size_t>(bytes()));  // little-endian
      if (values != nullptr) values->push_back(x);
    }
  }
};

struct Case {
  PageFormat format;
  int64_t page_count, window;
  Dtype dtype;
  bool raw = false;  // any bits for elements, and no attention
};

void run(const Case& c) {
  const PageFormat& f = c.format;
  std::mt19937 random(static_cast<unsigned>(f.head_dim + c.page_count));
  const int64_t packed = c.page_count * f.page_tokens, window = c.window, rows = kBatch * kHeads;
  const int64_t head_words = c.page_count * f.words();
  Tensor k(c.dtype, kHeads, packed, f.head_dim), v(c.dtype, kHeads, packed, f.value_dim);
  Tensor window_k(c.dtype, kHeads, window, f.head_dim), window_v(c.dtype, kHeads, window, f.value_dim);
  // bfloat16 multiplies pairs where both are of it; the output has the queries' dtype.
  const bool pairs = c.dtype == Dtype::kBFloat16;
  Tensor queries(pairs ? c.dtype : Dtype::kFloat32, kHeads * kGroup, kQueries, f.head_dim);
  std::vector<float> q, exact_k, exact_v;
  k.fill(random, c.raw);
  v.fill(random, c.raw);
  window_k.fill(random, false, &exact_k);
  window_v.fill(random, false, &exact_v);
  queries.fill(random, false, &q);

  // Of eight channels one has four columns and one has none.
  std::vector<int16_t> map;
  for (int channel = 0; f.key_columns != f.head_dim && channel < f.head_dim; ++channel) {
    const int columns = channel % 8 == 0 ? 4 : channel % 8 == 1 ? 0 : 1;
    for (int digit = 0; digit < columns; ++digit) map.push_back(static_cast<int16_t>(channel << 2 | digit));
  }
  std::vector<float> weights(static_cast<size_t>(rows * packed)), feedback(weights.size() * f.page_tokens);
  for (float& x : weights) x = static_cast<float>(1 + (random() >> 28));
  for (float& x : feedback) x = draw(random, Dtype::kFloat32) * 0x1p-5f;
  const KeyMap key_map{map.empty() ? nullptr : map.data()};
  const KeyWeights key_weights{weights.data(), kHeads * packed, packed};
  const ValueFeedback value_feedback{feedback.data(), kHeads * packed * f.page_tokens, packed * f.page_tokens};

  struct Results {
    std::vector<int32_t> pages, evicted_pages;
    std::vector<char> k, v, evicted_k, evicted_v;

    bool operator==(const Results&) const = default;
  } first;

  for (const cpu::Kernels* set : cpu::available_kernels()) {
    std::vector<int32_t> pages(static_cast<size_t>(rows * head_words));
    QuantizeArgs quantize;
    quantize.format = f;
    quantize.k = k.view<Tokens>();
    quantize.v = v.view<Tokens>();
    quantize.pages = {pages.data(), kHeads * head_words, head_words, f.words()};
    quantize.key_map = key_map;
    quantize.key_weights = key_weights;
    quantize.value_feedback = value_feedback;
    quantize.batch = kBatch;
    quantize.heads = kHeads;
    quantize.page_count = c.page_count;
    quantize.tokens = packed;
    set->quantize(quantize, on_threads);

    const auto dequantized = [&](Dtype dtype) {
      std::pair out{Tensor(dtype, kHeads, packed, f.head_dim), Tensor(dtype, kHeads, packed, f.value_dim)};
      DequantizeArgs dequantize;
      dequantize.format = f;
      dequantize.pages = {pages.data(), kHeads * head_words, head_words, f.words()};
      dequantize.key_map = key_map;
      dequantize.k = out.first.view<MutableTokens>();
      dequantize.v = out.second.view<MutableTokens>();
      dequantize.batch = kBatch;
      dequantize.heads = kHeads;
      dequantize.page_count = c.page_count;
      set->dequantize(dequantize, on_threads);
      return out;
    };
    auto [restored_k, restored_v] = dequantized(c.dtype);
    // The sign of a NaN that went through a rotation is nobody's business.
    if (c.raw && f.hadamard_block() > 1) restored_v.data.clear();

    // One eviction of every second token of the first two pages' worth.
    Tensor thinned_k = k, thinned_v = v;
    std::vector<int32_t> evicted_pages(pages.size());
    EvictArgs evict;
    evict.format = f;
    evict.k = thinned_k.view<MutableTokens>();
    evict.v = thinned_v.view<MutableTokens>();
    evict.pages = {evicted_pages.data(), kHeads * head_words, head_words, f.words()};
    evict.key_map = key_map;
    evict.key_weights = key_weights;
    evict.value_feedback = value_feedback;
    evict.batch = kBatch;
    evict.heads = kHeads;
    evict.tokens = packed;
    evict.start = 1;
    evict.step = 2;
    evict.count = f.page_tokens;
    set->evict(evict, on_threads);
    const int64_t row_bytes = f.head_dim * k.bytes();
    for (int64_t t = 0; t < packed - f.page_tokens; ++t) {
      const int64_t from = t < f.page_tokens ? 2 * t : t + f.page_tokens;
      check(std::memcmp(&thinned_k.data[t * row_bytes], &k.data[from * row_bytes], row_bytes) == 0,
            "wrong token after an eviction", set->name, f);
    }

    Results results{pages, evicted_pages, restored_k.data, restored_v.data, thinned_k.data, thinned_v.data};
    if (first.pages.empty()) {
      first = std::move(results);
    } else {
      check(results.pages == first.pages, "pages differ from those of the first instruction set", set->name, f);
      check(results == first, "dequantised or evicted tokens differ from those of the first instruction set", set->name,
            f);
    }
    if (c.raw) continue;

    auto [dense_k, dense_v] = dequantized(Dtype::kFloat32);
    std::vector<float> out(static_cast<size_t>(rows * kGroup * kQueries * f.value_dim));
    std::vector<float> lse(static_cast<size_t>(rows * kGroup * kQueries));
    AttendArgs attend;
    attend.format = f;
    attend.batch = kBatch;
    attend.kv_heads = kHeads;
    attend.group = kGroup;
    attend.queries = kQueries;
    attend.q = queries.view<Tokens>();
    attend.pages = {pages.data(), kHeads * head_words, head_words, f.words()};
    attend.key_map = key_map;
    attend.page_count = c.page_count;
    attend.window_k = window_k.view<Tokens>();
    attend.window_v = window_v.view<Tokens>();
    attend.window_tokens = window;
    attend.scale = 1.0f / std::sqrt(static_cast<float>(f.head_dim));
    attend.out = out.data();
    attend.lse = lse.data();
    // What the window's slots are given, beside what half of them have been given before.
    std::vector<float> before(static_cast<size_t>(rows * window), 0.5f), given(before.size());
    attend.attention = {before.data(), kHeads * window, window};
    attend.attention_slots = window / 2;
    attend.attention_out = given.data();
    set->attend(attend, on_threads);

    const auto* const packed_k = reinterpret_cast<const float*>(dense_k.data.data());
    const auto* const packed_v = reinterpret_cast<const float*>(dense_v.data.data());
    std::vector<double> expected_given(given.size());
    for (int64_t row = 0; row < rows * kGroup * kQueries; ++row) {
      const int64_t head = row / (kGroup * kQueries);
      std::vector<double> sum(static_cast<size_t>(f.value_dim));
      std::vector<double> window_weights;
      double denominator = 0, window_denominator = 0;
      for (int64_t t = 0; t < packed + window; ++t) {
        const bool in_pages = t < packed;
        const int64_t token = in_pages ? head * packed + t : head * window + t - packed;
        const float* key = (in_pages ? packed_k : exact_k.data()) + token * f.head_dim;
        const float* value = (in_pages ? packed_v : exact_v.data()) + token * f.value_dim;
        double score = 0;
        for (int i = 0; i < f.head_dim; ++i) score += static_cast<double>(q[row * f.head_dim + i]) * key[i];
        const double weight = std::exp(score * attend.scale);
        denominator += weight;
        if (!in_pages) window_denominator += window_weights.emplace_back(weight);
        for (int i = 0; i < f.value_dim; ++i) sum[i] += weight * value[i];
      }
      check(std::abs(lse[row] - std::log(denominator)) < 1e-3, "wrong log-sum-exp", set->name, f);
      for (int64_t t = 0; t < window; ++t) {
        expected_given[head * window + t] += std::pow(window_weights[t] / window_denominator, 2);
      }
      for (int i = 0; i < f.value_dim; ++i) {
        const int64_t at = row * f.value_dim + i;
        const double expected = sum[i] / denominator, rounding = pairs ? std::abs(expected) / 256 : 0;
        uint16_t half;
        std::memcpy(&half, reinterpret_cast<const char*>(out.data()) + 2 * at, sizeof(half));
        const float got = pairs ? std::bit_cast<float>(static_cast<uint32_t>(half) << 16) : out[at];
        check(std::abs(got - expected) < 1e-3 + rounding, "wrong output", set->name, f);
      }
    }
    for (size_t i = 0; i < given.size(); ++i) {
      const bool had = static_cast<int64_t>(i) % window < window / 2;
      check(std::abs(given[i] - expected_given[i] - (had ? 0.5 : 0.0)) < 1e-4, "wrong attention given", set->name, f);
    }
  }
  add_to_checksum(first.pages);
  add_to_checksum(first.evicted_pages);
  for (const auto* bytes : {&first.k, &first.v, &first.evicted_k, &first.evicted_v}) add_to_checksum(*bytes);
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

const cpu::Kernels* available(const char* name) {
  for (const cpu::Kernels* set : cpu::available_kernels()) {
    if (std::strcmp(set->name, name) == 0) return set;
  }
  return nullptr;
}

int below(std::mt19937& random, int count) { return static_cast<int>(random() % static_cast<unsigned>(count)); }

// Attention of amx and of avx512, bit for bit: over any pages that there can be, in row blocks of every size.
void compare_tiles(const cpu::Kernels& amx, const cpu::Kernels& avx512, unsigned seed) {
  std::mt19937 random(seed);
  const auto dim = [&] { return 16 * (1 + below(random, below(random, 8) == 0 ? 64 : 17)); };
  PageFormat f = format(dim(), dim(), 32 << below(random, 3), 2 << below(random, 2), 2 << below(random, 2), 16);
  if (below(random, 4) == 0) (below(random, 2) == 0 ? f.key_bits : f.value_bits) = 8;
  f.key_param_bits = 8 << below(random, 2);
  f.value_param_bits = 8 << below(random, 2);
  const int groups = f.value_dim / 16;
  do {
    f.value_group = 16 * (1 + below(random, groups));
  } while (f.value_dim % f.value_group != 0);
  if (below(random, 4) == 0 && f.value_dim % 32 == 0) {
    f.page_tokens = 64;
    f.value_bits = 2;
    f.value_group = f.value_dim;
    f.value_param_bits = 8;
    f.fine_values = f.value_dim % 64 == 0 ? 4 << below(random, 2) : 8;
  }
  std::vector<int16_t> map;
  if (below(random, 2) == 0) {
    for (int channel = 0; channel < f.head_dim; ++channel) {
      const int columns = channel < 16 ? 1 : below(random, kMaxCodeBits / f.key_bits + 1);
      for (int digit = 0; digit < columns; ++digit) map.push_back(static_cast<int16_t>(channel << 2 | digit));
    }
    map.resize(map.size() / 16 * 16);
    f.key_columns = static_cast<int>(map.size());
  }
  check(format_error(f) == nullptr, "a wrong format", "test", f);

  const int64_t page_count = 1 + below(random, 10), packed = page_count * f.page_tokens, window = below(random, 70);
  const int64_t queries = 1 + below(random, 17), head_words = page_count * f.words();
  const bool raw = below(random, 4) == 0;
  Tensor k(Dtype::kBFloat16, kHeads, packed, f.head_dim), v(Dtype::kBFloat16, kHeads, packed, f.value_dim);
  Tensor window_k(k.dtype, kHeads, window, f.head_dim), window_v(k.dtype, kHeads, window, f.value_dim);
  Tensor q(Dtype::kFloat32, kHeads, queries, f.head_dim);
  for (Tensor* x : {&k, &v}) x->fill(random, raw);
  for (Tensor* x : {&window_k, &window_v, &q}) x->fill(random, false);
  for (int i = 0; raw && i < 3; ++i) {
    const float x = std::ldexp(1.0f, 64 + 32 * below(random, 3));
    std::memcpy(q.data.data() + 4 * below(random, static_cast<int>(q.data.size() / 4)), &x, sizeof(x));
  }
  std::vector<int32_t> pages(static_cast<size_t>(kBatch * kHeads * head_words));
  QuantizeArgs quantize;
  quantize.format = f;
  quantize.k = k.view<Tokens>();
  quantize.v = v.view<Tokens>();
  quantize.pages = {pages.data(), kHeads * head_words, head_words, f.words()};
  quantize.key_map = {map.empty() ? nullptr : map.data()};
  quantize.batch = kBatch;
  quantize.heads = kHeads;
  quantize.page_count = page_count;
  quantize.tokens = packed;
  avx512.quantize(quantize, on_threads);

  AttendArgs attend;
  attend.format = f;
  attend.batch = kBatch;
  attend.kv_heads = kHeads;
  attend.queries = queries;
  attend.q = q.view<Tokens>();
  attend.pages = {pages.data(), kHeads * head_words, head_words, f.words()};
  attend.key_map = quantize.key_map;
  attend.page_count = page_count;
  attend.window_k = window_k.view<Tokens>();
  attend.window_v = window_v.view<Tokens>();
  attend.window_tokens = window;
  attend.scale = below(random, 3) == 0 ? 2.0f : 1.0f / std::sqrt(static_cast<float>(f.head_dim));
  std::vector<int32_t> query_positions(static_cast<size_t>(kBatch * queries));
  for (int32_t& x : query_positions) x = below(random, static_cast<int>(packed + window));
  if (below(random, 2) == 0) {
    attend.query_positions = query_positions.data();
    attend.query_positions_batch_stride = queries;
  }
  const int64_t rows = kBatch * kHeads * queries;
  const auto attended = [&](const cpu::Kernels& set) {
    std::vector<float> out(static_cast<size_t>(rows * (f.value_dim + 1) + kBatch * kHeads * window));
    attend.out = out.data();
    attend.lse = out.data() + rows * f.value_dim;
    attend.attention_out = attend.lse + rows;
    set.attend(attend, on_threads);
    return out;
  };
  const std::vector<float> tiled = attended(amx), expected = attended(avx512);
  for (size_t i = 0; i < tiled.size(); ++i) {
    // The sign of a NaN depends on how the compiler orders operands.
    const bool same = std::bit_cast<uint32_t>(tiled[i]) == std::bit_cast<uint32_t>(expected[i]);
    check(same || (std::isnan(tiled[i]) && std::isnan(expected[i])), "attention differs from that of avx512", amx.name,
          f);
  }
}

// Two rows, of which one has had more tokens; nothing else is touched.
void append_to_rows() {
  constexpr int kBatch = 2, kHeads = 2, kDim = 3, kSlots = 4, kKept = 2;
  std::vector<float> token(kBatch * kHeads * kDim), window(kBatch * kHeads * kSlots * kDim), values(window.size());
  std::vector<float> queries(kBatch * kHeads * kKept * kDim);
  std::iota(token.begin(), token.end(), 1.0f);
  std::vector<int32_t> positions(kBatch * kSlots, -1), lengths{5, 0, 7, 3};
  std::vector<int64_t> seen{9, 9};
  AppendArgs args;
  args.q = args.k = args.v = {token.data(), Dtype::kFloat32, kHeads * kDim, kDim, kDim};
  args.window_k = {window.data(), Dtype::kFloat32, kHeads * kSlots * kDim, kSlots * kDim, kDim};
  args.window_v = {values.data(), Dtype::kFloat32, kHeads * kSlots * kDim, kSlots * kDim, kDim};
  args.queries = {queries.data(), Dtype::kFloat32, kHeads * kKept * kDim, kKept * kDim, kDim};
  args.batch = kBatch;
  args.kv_heads = args.query_heads = kHeads;
  args.head_dim = args.value_dim = kDim;
  args.window_slots = kSlots;
  args.query_slots = kKept;
  args.positions = positions.data();
  args.positions_batch_stride = kSlots;
  args.lengths = lengths.data();
  args.seen = seen.data();
  cpu::append(args);

  std::vector<float> expected(window.size()), expected_queries(queries.size());
  for (int i = 0; i < kBatch * kHeads * kDim; ++i) {
    const int b = i / (kHeads * kDim), head = i / kDim, channel = i % kDim;
    expected[(head * kSlots + (b == 0 ? 0 : 3)) * kDim + channel] = token[i];
    expected_queries[(head * kKept + 1) * kDim + channel] = token[i];
  }
  const bool right = window == expected && values == expected && queries == expected_queries &&
                     positions == std::vector<int32_t>{9, -1, -1, -1, -1, -1, -1, 9} &&
                     lengths == std::vector<int32_t>{5, 1, 7, 4} && seen == std::vector<int64_t>{10, 10};
  check(right, "append does not write where it should", "all", PageFormat{});
}

}  // namespace

int main() {
  append_to_rows();
  // Once each: that asks the system, where it is needed.
  for (const cpu::Kernels* set : cpu::available_kernels()) cpu::use_kernels(set->name);
  constexpr auto kFloat32 = Dtype::kFloat32, kFloat16 = Dtype::kFloat16, kBFloat16 = Dtype::kBFloat16;
  run({format(128, 128, 64, 2, 2, 64), 20, 100, kFloat32});
  run({format(64, 64, 32, 2, 2, 64), 40, 1, kFloat16});
  run({format(80, 80, 64, 4, 2, 80), 10, 33, kBFloat16});
  run({format(192, 128, 128, 8, 4, 32), 10, 64, kFloat32});
  PageFormat fitted = format(64, 64, 64, 2, 2, 64), wide = format(128, 96, 32, 2, 4, 96);
  fitted.key_columns = 80;
  for (PageFormat* f : {&fitted, &wide}) f->key_param_bits = f->value_param_bits = 8;
  PageFormat fine = fitted, less_fine = fitted;
  fine.fine_values = 8;
  less_fine.fine_values = 4;
  run({fitted, 20, 100, kFloat32});
  run({fine, 20, 100, kFloat32});
  run({less_fine, 20, 100, kFloat32});
  run({wide, 20, 100, kBFloat16});
  for (const Dtype dtype : {kFloat32, kFloat16, kBFloat16}) {
    run({format(64, 64, 64, 2, 2, 64), 4, 0, dtype, true});
    run({fitted, 4, 0, dtype, true});
  }
  const cpu::Kernels *const amx = available("amx"), *const avx512 = available("avx512");
  for (unsigned seed = 0; amx != nullptr && seed < 50; ++seed) compare_tiles(*amx, *avx512, seed);
  std::printf("instruction sets:");
  for (const cpu::Kernels* set : cpu::available_kernels()) std::printf(" %s", set->name);
  std::printf("; checksum %016llx\n", static_cast<unsigned long long>(checksum));
  if (checksum != kChecksum) {
    std::fprintf(stderr, "on other processors it is %016llx\n", static_cast<unsigned long long>(kChecksum));
    return 1;
  }
  std::puts("1 passed, 0 failed");
  return 0;
}
