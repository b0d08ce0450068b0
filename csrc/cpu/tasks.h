// What dispatch.cpp asks of an instruction set: one task of each kernel at a time. Private to csrc/cpu.
//
// The tasks are plain functions on plain structs, so that everything shared (threads, memory, std::function) is
// compiled once, without special instructions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace logquant::cpu {

// Scratch memory of the calling thread, 64-byte aligned, kept for its next task.
void* thread_scratch(size_t bytes);

// Cuts 64-byte aligned arrays from scratch memory; measures them when that is null.
class Arena {
 public:
  explicit Arena(void* memory) : base_(static_cast<char*>(memory)) {}

  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) {
    char* p = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  __attribute__((always_inline)) size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// How attention over one KV head is cut into tasks: query rows in blocks, slots in splits (flash decoding).
// It depends on shapes only. Task i of a head: split i / row_blocks, row block i % row_blocks.
struct AttendPlan {
  static constexpr int kRowsPerBlock = 8;
  static constexpr int kWindowBlock = 64;  // window tokens of a unit; a page is a unit, too

  int rows = 0;        // group * queries; row r is query r % queries of query head r / queries of the group
  int row_blocks = 0;  // of nearly equal size
  int64_t units = 0, units_per_split = 0, splits = 0;
  float* partials = nullptr;       // [batch * KV head][split][row][value_dim + 2]: sums, maximum, denominator
  int64_t window_stride = 0;       // window tokens, to a multiple of kWindowBlock; 0 if nobody asks what they are given
  float* window_scores = nullptr;  // [batch * KV head][row][window_stride]: in base 2

  explicit AttendPlan(const AttendArgs& args);

  int64_t tasks_per_head() const { return splits * row_blocks; }
  int64_t partial_size(const AttendArgs& args) const { return args.format.value_dim + 2; }
  int64_t partial_count(const AttendArgs& args) const {
    return args.batch * args.kv_heads * splits * rows * partial_size(args);
  }
  int64_t window_score_count(const AttendArgs& args) const { return args.batch * args.kv_heads * rows * window_stride; }
};

// Pages of a KV head in one task of page_scores, and how many tasks that makes.
inline constexpr int64_t kPagesPerTask = 64;
inline int64_t page_score_parts(const PageScoresArgs& args) {
  return (args.page_count + kPagesPerTask - 1) / kPagesPerTask;
}

#define LOGQUANT_DECLARE_ATTEND(isa)                                               \
  namespace isa {                                                                  \
  void attend_split(const AttendArgs& args, const AttendPlan& plan, int64_t task); \
  void attend_merge(const AttendArgs& args, const AttendPlan& plan, int64_t head); \
  }
#define LOGQUANT_DECLARE_TASKS(isa)                                                     \
  LOGQUANT_DECLARE_ATTEND(isa)                                                          \
  namespace isa {                                                                       \
  void quantize_page(const QuantizeArgs& args, int64_t task); /* batch * head * page */ \
  void dequantize_page(const DequantizeArgs& args, int64_t task);                       \
  void evict_head(const EvictArgs& args, int64_t task); /* batch * head */              \
  void page_scores_task(const PageScoresArgs& args, int64_t task);                      \
  void choose_pages_task(const ChoosePagesArgs& args, int64_t task);                    \
  }

LOGQUANT_DECLARE_TASKS(portable)
#if defined(__x86_64__)
LOGQUANT_DECLARE_TASKS(avx2)
LOGQUANT_DECLARE_TASKS(avx512)
// Everything else of these is avx2's or avx512's.
LOGQUANT_DECLARE_ATTEND(avxvnni)
LOGQUANT_DECLARE_ATTEND(amx)
LOGQUANT_DECLARE_ATTEND(avx512bf16)
#elif defined(__aarch64__)
LOGQUANT_DECLARE_TASKS(neon)
#endif

}  // namespace logquant::cpu
