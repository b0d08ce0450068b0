// Chooses the instruction set, runs the kernels' tasks in parallel, and owns their memory. Compiled once, for the
// baseline of the architecture.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "kernels.h"
#include "tasks.h"

namespace logquant::cpu {

namespace {

// Memory that grows and is kept, 64-byte aligned: allocating at every call would have malloc give memory back to the
// system and fetch it again, which can take longer than the call.
class Scratch {
 public:
  void* at_least(size_t bytes) {
    if (bytes > capacity_) {
      memory_.reset(new (std::align_val_t{64}) char[bytes]);
      capacity_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<char[], Free> memory_;
  size_t capacity_ = 0;
};

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local Scratch scratch;
  return scratch.at_least(bytes);
}

AttendPlan::AttendPlan(const AttendArgs& args) {
  // Enough tasks for the largest machines, and splits long enough (512 tokens) to be worth their merge.
  constexpr int64_t kTasks = 128, kMinUnits = 8;
  rows = static_cast<int>(args.group * args.queries);
  row_blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t window_units = (args.window_tokens + kWindowBlock - 1) / kWindowBlock;
  units = args.page_count + window_units;
  units_per_split = std::max(kMinUnits, units * args.batch * args.kv_heads * row_blocks / kTasks);
  splits = std::max<int64_t>(1, (units + units_per_split - 1) / units_per_split);
  if (args.attention_out != nullptr) window_stride = window_units * kWindowBlock;
}

namespace {

template <auto task>
void quantize(const QuantizeArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.batch * args.heads * args.page_count, [&](int64_t i) { task(args, i); });
}

template <auto task>
void dequantize(const DequantizeArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.batch * args.heads * args.page_count, [&](int64_t i) { task(args, i); });
}

template <auto task>
void evict(const EvictArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.batch * args.heads, [&](int64_t i) { task(args, i); });
}

template <auto task>
void page_scores(const PageScoresArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.batch * args.kv_heads * page_score_parts(args), [&](int64_t i) { task(args, i); });
}

template <auto task>
void choose_pages(const ChoosePagesArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.batch * args.heads * args.queries, [&](int64_t i) { task(args, i); });
}

template <auto split_task, auto merge_task>
void attend(const AttendArgs& args, const ParallelFor& parallel_for) {
  AttendPlan plan(args);
  const int64_t heads = args.batch * args.kv_heads, tasks_per_head = plan.tasks_per_head();
  // Not the tasks' own scratch: this thread runs tasks, too.
  thread_local Scratch partials;
  const int64_t floats = plan.partial_count(args) + plan.window_score_count(args);
  plan.partials = static_cast<float*>(partials.at_least(sizeof(float) * floats));
  if (plan.window_stride > 0) plan.window_scores = plan.partials + plan.partial_count(args);
  // The last task of a head merges it: no second start of all threads, and the same order of additions always.
  const auto left = std::make_unique<std::atomic<int64_t>[]>(heads);
  for (int64_t h = 0; h < heads; ++h) left[h].store(tasks_per_head, std::memory_order_relaxed);
  parallel_for(heads * tasks_per_head, [&](int64_t i) {
    split_task(args, plan, i);
    const int64_t head = i / tasks_per_head;
    if (left[head].fetch_sub(1, std::memory_order_acq_rel) == 1) merge_task(args, plan, head);
  });
}

// attend_isa's attention; all else of another set.
#define LOGQUANT_KERNELS_OF(attend_isa, isa)                                                             \
  Kernels {                                                                                              \
    #attend_isa, quantize<isa::quantize_page>, dequantize<isa::dequantize_page>, evict<isa::evict_head>, \
        page_scores<isa::page_scores_task>, choose_pages<isa::choose_pages_task>,                        \
        attend<attend_isa::attend_split, attend_isa::attend_merge>                                       \
  }
#define LOGQUANT_KERNELS(isa) LOGQUANT_KERNELS_OF(isa, isa)

struct InstructionSet {
  Kernels kernels;
  bool supported;
  bool (*allow)() = nullptr;  // asks the system before the set is used
};

#if defined(__x86_64__)
// Whether avxvnni was compiled in its AVX-512 encoding, for tests (CMakeLists.txt).
#ifndef LOGQUANT_EVEX_VNNI
#define LOGQUANT_EVEX_VNNI 0
#endif
// Whether amx was compiled with emulated tiles, for tests, too.
#ifndef LOGQUANT_EMULATED_TILES
#define LOGQUANT_EMULATED_TILES 0
#endif

// Not every compiler's __builtin_cpu_supports knows it. It needs nothing of the system that AVX2 does not need.
[[maybe_unused]] bool has_avxvnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && eax >= 1 &&
         __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1) != 0;
}

constexpr int kTileData = 18;  // XFEATURE_XTILEDATA

// AMX-TILE and AMX-INT8, on a system that saves its registers.
[[maybe_unused]] bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr int kGetSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  unsigned eax, ebx, ecx, edx;
  uint64_t features = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kTile) != 0 && (edx & kInt8) != 0 &&
         syscall(SYS_arch_prctl, kGetSupported, &features) == 0 && (features >> kTileData & 1) != 0;
#else
  return false;
#endif
}

// The system's permission, for the whole process and for good: signal handlers need larger stacks from then on.
[[maybe_unused]] bool allow_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// The last one that runs is in use where none is asked for.
const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> all;
    // CMake leaves sets out (LOGQUANT_SETS) that a test need not cover.
#ifndef LOGQUANT_WITHOUT_portable
    all.push_back({LOGQUANT_KERNELS(portable), true});
#endif
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    [[maybe_unused]] const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#ifndef LOGQUANT_WITHOUT_avx2
    all.push_back({LOGQUANT_KERNELS(avx2), has_avx2});
#endif
#ifndef LOGQUANT_WITHOUT_avxvnni
    const bool evex = LOGQUANT_EVEX_VNNI;
    all.push_back({LOGQUANT_KERNELS_OF(avxvnni, avx2), evex ? has_avx512 : has_avx2 && has_avxvnni()});
#endif
#ifndef LOGQUANT_WITHOUT_amx
    // Not behind avx512, and so in use only where it is asked for: no processor with AMX has run it yet.
    const bool emulated_tiles = LOGQUANT_EMULATED_TILES;
    all.push_back({LOGQUANT_KERNELS_OF(amx, avx512), has_avx512 && (emulated_tiles || has_amx()),
                   emulated_tiles ? nullptr : allow_amx});
#endif
#ifndef LOGQUANT_WITHOUT_avx512
    all.push_back({LOGQUANT_KERNELS(avx512), has_avx512});
#endif
#ifndef LOGQUANT_WITHOUT_avx512bf16
    all.push_back({LOGQUANT_KERNELS_OF(avx512bf16, avx512), has_avx512 && __builtin_cpu_supports("avx512bf16")});
#endif
#elif defined(__aarch64__)
    all.push_back({LOGQUANT_KERNELS(neon), true});
#endif
    return all;
  }();
  return sets;
}

const Kernels* find(const std::string& name, const char* what) {
  std::string names;
  for (const InstructionSet& set : instruction_sets()) {
    if (!set.supported) continue;
    if (set.kernels.name == name) {
      if (set.allow == nullptr || set.allow()) return &set.kernels;
      throw std::runtime_error(std::string(what) + " must be one that the system allows, which " + name + " is not");
    }
    names += (names.empty() ? "" : ", ") + std::string(set.kernels.name);
  }
  throw std::runtime_error(std::string(what) + " must be one of " + names + " on this machine, got " + name);
}

std::atomic<const Kernels*> in_use = nullptr;

}  // namespace

std::vector<const Kernels*> compiled_kernels() {
  std::vector<const Kernels*> all;
  for (const InstructionSet& set : instruction_sets()) all.push_back(&set.kernels);
  return all;
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> available;
  for (const InstructionSet& set : instruction_sets()) {
    if (set.supported) available.push_back(&set.kernels);
  }
  return available;
}

const Kernels& kernels() {
  const Kernels* chosen = in_use.load(std::memory_order_acquire);
  if (chosen == nullptr) {
    const char* forced = std::getenv("LOGQUANT_CPU_ISA");
    chosen = forced && *forced ? find(forced, "LOGQUANT_CPU_ISA") : available_kernels().back();
    in_use.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

void use_kernels(const std::string& name) {
  in_use.store(find(name, "the instruction set"), std::memory_order_release);
}

}  // namespace logquant::cpu
