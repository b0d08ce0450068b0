// The choice of the tokens that leave the window (reference/choose_leaving.py). Compiled once, for the baseline of the
// architecture: weights are few. A task is one row; it reads the weights once, and works on 8 bytes a slot that may
// leave: its weight, and below that its number, so that no two are equal.

#include "choose_leaving.h"

#include <algorithm>

#include "tasks.h"

namespace logquant::cpu {
namespace {

int32_t slot_of(uint64_t entry) { return static_cast<int32_t>(entry & 0xFFFFFFFFu); }

// The tokens of one page, by slot before and by falling weight afterwards, each at its place.
void order_page(const ChooseLeavingArgs& args, const float* weight, int32_t* page) {
  uint64_t entries[kMostPageTokens];
  for (int t = 0; t < args.page_tokens; ++t) {
    entries[t] = uint64_t{~sort_key(weight[page[t]])} << 32 | static_cast<uint32_t>(page[t]);
  }
  std::sort(entries, entries + args.page_tokens);
  for (int rank = 0; rank < args.page_tokens; ++rank) page[args.places[rank]] = slot_of(entries[rank]);
}

void choose(const ChooseLeavingArgs& args, int64_t row) {
  const float* const weight = args.weight + row * args.slots;
  const int64_t candidates = args.last - args.first;
  Arena arena(thread_scratch(64 + sizeof(uint64_t) * candidates));
  uint64_t* const entries = arena.take<uint64_t>(candidates);
  for (int64_t i = 0; i < candidates; ++i) {
    const auto slot = static_cast<uint32_t>(args.first + i);
    entries[i] = uint64_t{sort_key(weight[slot])} << 32 | slot;
  }
  if (args.count < candidates) std::nth_element(entries, entries + args.count, entries + candidates);

  int32_t* const leaving = args.leaving + row * args.count;
  std::transform(entries, entries + args.count, leaving, slot_of);
  std::sort(leaving, leaving + args.count);
  int32_t* staying = args.staying + row * (args.slots - args.count);
  const int32_t *next = leaving, *const end = leaving + args.count;
  for (int64_t slot = 0; slot < args.slots; ++slot) {
    const bool leaves = next != end && *next == slot;
    if (leaves) {
      ++next;
    } else {
      *staying++ = static_cast<int32_t>(slot);
    }
  }
  for (int64_t page = 0; page < args.count; page += args.page_tokens) order_page(args, weight, leaving + page);
}

}  // namespace

void choose_leaving(const ChooseLeavingArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.rows, [&](int64_t row) { choose(args, row); });
}

}  // namespace logquant::cpu
