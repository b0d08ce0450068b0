// Decode attention over packed pages and the exact window: one softmax, flash-decoding style.
//
// A task is one split of the slots of one KV head, for a block of up to 8 query rows (row = query head of the group x
// query token). It walks over units: pages, then blocks of 64 window tokens. Per page and row the key scales are folded
// into q, which becomes int16 with one scale, so that scores are integer dot products straight on the codes (lanes are
// tokens); softmax weights times value scales become int16 likewise (lanes are channels). The zeros add one number per
// row to the scores, and one per value group to the output. Both roundings are of about 1e-5 relative error. With AMX,
// blocks of several rows have matrix tiles do the dot products, with the same sums.
//
// How the slots and rows are cut into tasks is AttendPlan (tasks.h). The parts of a task, in csrc/cpu/attend/:
//   rows.h        which query rows it has, and sizes
//   queries.h     the rows loaded, and folded with a page's key scales
//   keys.h        scores of a page            values.h  sums of a page        dot_codes.h  the dot products of both
//   pages.h       the walk over pages         window.h  the exact tokens      prefetcher.h the next page
//   masks.h       what hides slots            softmax.h online softmax        partials.h   what splits leave, merged
//   attention.h   how much of it the window's slots get
//   tiled_dot.h, tiled_pages.h                dot_codes.h and pages.h on matrix tiles
//
// Memory traffic: each page and window token is read once per row block, nothing is written but the split's partial
// result (value_dim + 2 floats a row) and, where it is asked what window slots are given, their scores (a float a row).

#include "attend/attention.h"
#include "attend/pages.h"
#include "attend/partials.h"
#include "attend/queries.h"
#include "attend/rows.h"
#include "attend/softmax.h"
#include "attend/tiled_pages.h"
#include "attend/values.h"
#include "attend/window.h"

namespace logquant::cpu::LOGQUANT_ISA {
namespace {

// Sanitizers look at blocks of two sizes, for these take minutes to compile.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kFewBlocks = true;
#else
constexpr bool kFewBlocks = false;
#endif

// Everything a task holds, in scratch memory.
template <int NR>
struct TaskMemory {
  Queries queries;
  Scores scores;
  FoldedWeights folded;
  Accumulator acc;
  int32_t* key_words;
  PageTiles<NR> tiles;  // after the codes, past whose end it reads

  TaskMemory(const PageFormat& f, Arena& arena)
      : queries(f, NR, arena),
        scores(NR, arena),
        folded(f, NR, arena),
        acc(f, NR, arena),
        key_words(arena.take<int32_t>(f.key_code_words() * f.page_tokens)),
        tiles(f, arena) {}
};

template <int NR, bool specialized>
LOGQUANT_INLINE void add_pages_of(const AttendArgs& args, const TaskRows& rows, int64_t first, int64_t end,
                                  int64_t page_count, const TaskMemory<NR>& memory) {
  const auto& [queries, scores, folded, acc, key_words, tiles] = memory;
  if constexpr (kTiled<NR>) {
    add_tiled_pages<NR, specialized>(args, rows, first, end, page_count, queries, key_words, scores, folded, acc,
                                     tiles);
  } else {
    add_pages<NR, specialized>(args, rows, first, end, page_count, queries, key_words, scores, folded, acc);
  }
}

template <int NR>
void attend_rows(const AttendArgs& args, const AttendPlan& plan, const TaskRows& rows, int64_t head, int64_t split) {
  const PageFormat& f = args.format;
  Arena measure(nullptr);
  [[maybe_unused]] const TaskMemory<NR> sizes(f, measure);
  Arena arena(thread_scratch(measure.used()));
  const TaskMemory<NR> memory(f, arena);
  load_queries(args, rows, NR, args.key_map.of(rows.batch, rows.kv_head), memory.queries);
  memory.scores.clear(NR);
  memory.acc.clear(f, NR);

  const int64_t pages = used_pages(args, rows.batch), window_tokens = used_window_tokens(args, rows.batch);
  const int64_t first = split * plan.units_per_split, last = smaller(plan.units, first + plan.units_per_split);
  const int64_t page_end = smaller(last, pages);
  if (SpecializedSizes::are_of(f)) {
    add_pages_of<NR, true>(args, rows, first, page_end, pages, memory);
  } else {
    add_pages_of<NR, false>(args, rows, first, page_end, pages, memory);
  }
  if (f.hadamard_block() > 1 && first < page_end) rotate_back(f, NR, memory.acc);

  const int64_t window_first = larger(first - args.page_count, 0) * AttendPlan::kWindowBlock;
  const int64_t window_end = smaller((last - args.page_count) * AttendPlan::kWindowBlock, window_tokens);
  with_dtype(args.window_k.dtype, [&](auto dtype) {
    add_window<NR, dtype>(args, rows, window_first, window_end, memory.queries, memory.scores, memory.acc,
                          WindowScores(plan, head, rows.first_row));
  });
  store_partials(args, plan, rows, head, split, memory.acc);
}

}  // namespace

void attend_split(const AttendArgs& args, const AttendPlan& plan, int64_t task) {
  const int64_t head = task / plan.tasks_per_head(), within = task % plan.tasks_per_head();
  const int64_t split = within / plan.row_blocks, block = within % plan.row_blocks;
  TaskRows rows;
  rows.batch = head / args.kv_heads;
  rows.kv_head = head % args.kv_heads;
  rows.first_row = static_cast<int>(block * plan.rows / plan.row_blocks);
  rows.rows = static_cast<int>((block + 1) * plan.rows / plan.row_blocks) - rows.first_row;
  if (rows.rows == 1) {
    attend_rows<1>(args, plan, rows, head, split);
  } else if (rows.rows == 2) {
    attend_rows<kFewBlocks ? 8 : 2>(args, plan, rows, head, split);
  } else if (rows.rows == 3) {
    attend_rows<kFewBlocks ? 8 : kTiled<3> ? 4 : 3>(args, plan, rows, head, split);  // tiles have rows to spare
  } else if (rows.rows <= 4) {
    attend_rows<kFewBlocks ? 8 : 4>(args, plan, rows, head, split);
  } else {
    attend_rows<8>(args, plan, rows, head, split);
  }
}

void attend_merge(const AttendArgs& args, const AttendPlan& plan, int64_t head) {
  merge_partials(args, plan, head);
  if (plan.window_scores != nullptr) {
    add_attention(args, plan, head, used_window_tokens(args, head / args.kv_heads));
  }
}

}  // namespace logquant::cpu::LOGQUANT_ISA
