// The pages of a team, one at hand while the next is on its way.
//
// Layout: a ring of kStages pages in shared memory, as Layout has them.
// Parallelisation: the teams of all splits take pages in turns; the threads of a team copy 16 bytes each.
// Memory traffic: each page once for the rows of a block, by cp.async, past L1. With a page table, 4 bytes a page.
#pragma once

#include "thread.cuh"

namespace logquant::cuda::tensor {

template <class K>
class PageRing {
  using S = typename K::PageShape;
  using L = Layout<K>;

 public:
  using Thread = ThreadInfo<K>;

  // Starts to copy the first page.
  LOGQUANT_DEVICE void start(const Thread& thread, int split) {
    stage_at = L::kRings + thread.team * kStages * L::kStage;
    both_stages = ptx::keep(2 * stage_at + L::kStage);
    pages = used_pages(thread.args, thread.block.batch);
    step = thread.args.page_splits * K::kTeams;
    next = split * K::kTeams + thread.team;
    source_step = ptx::keep(step * thread.args.pages.page_stride * 4);
    if (next < pages) {
      source = threads_part(thread, next);
      copy_page(thread, thread.shared + stage_at);
    }
    ptx::cp_async_commit();
  }

  LOGQUANT_DEVICE bool has_page() const { return next < pages; }

  // Waits for the page at hand and starts to copy the one after it.
  LOGQUANT_DEVICE void acquire(const Thread& thread) {
    next = ptx::keep(next + step);
    ptx::cp_async_wait<0>();
    thread.sync_team();  // the page is there for all, and all are done with the other stage
    if (next < pages) {
      if (thread.args.page_table != nullptr) {
        source = threads_part(thread, next);
      } else {
        source += source_step;
      }
      copy_page(thread, thread.shared + (both_stages - stage_at));
    }
    ptx::cp_async_commit();
  }
  LOGQUANT_DEVICE const unsigned char* stage(const Thread& thread) const { return thread.shared + stage_at; }
  LOGQUANT_DEVICE uint32_t stage_offset() const { return stage_at; }  // from `shared` on
  LOGQUANT_DEVICE int page() const { return next - step; }
  LOGQUANT_DEVICE void release() { stage_at = both_stages - stage_at; }

 private:
  // Immediate offsets of cp.async are below this either way: `source` is so far into a page that most use no register.
  static constexpr int kReach = 2048;

  static LOGQUANT_DEVICE const unsigned char* threads_part(const Thread& thread, int page) {
    const uint32_t* const from = thread.block.page(thread.args, page);
    return reinterpret_cast<const unsigned char*>(from) + (16 * thread.team_thread() + kReach);
  }

  // `bytes` of the page from `first` on, in blocks that get `to_pitch` each in shared memory.
  template <int bytes, int block, int to_pitch>
  LOGQUANT_DEVICE void copy(const Thread& thread, unsigned char* to, int first) const {
    constexpr int kStep = 16 * K::kTeamThreads,
                  kAtOnce = kStep % block == 0 ? kStep : block;  // whole blocks: constants
    const int first_byte = 16 * thread.team_thread();
    const int own = first_byte / block * (to_pitch - block) + first_byte;  // of `to`; `source` has it already
#pragma unroll
    for (int start = 0; start < bytes; start += kAtOnce) {
      const int end = start + kAtOnce < bytes ? start + kAtOnce : bytes, target = start / block * to_pitch;
#pragma unroll
      for (int i = start; i < end; i += kStep) {
        if (i + kStep <= end || i + first_byte < end) {
          ptx::cp_async16(to + target + i - start + own, source + (first + i - kReach));
        }
      }
    }
  }

  LOGQUANT_DEVICE void copy_page(const Thread& thread, unsigned char* to) const {
    constexpr PageFormat f = S::kFormat;
    constexpr int kAny = 16 * K::kTeamThreads;
    copy<4 * L::kKeyBlock, L::kKeyBlock, L::kKeyPitch>(thread, to, 0);
    copy<L::kValueBlocks * L::kValueBlock, L::kValueBlock, L::kValuePitch>(thread, to + L::kValues,
                                                                           4 * f.value_codes());
    if constexpr (S::kFitted) {
      copy<S::kDim, kAny, kAny>(thread, to + L::kKeyParams, 4 * f.key_params());
      copy<S::kGroups * S::kTokens, kAny, kAny>(thread, to + L::kKeyParams + S::kDim, 4 * f.value_params());
      copy<S::kDim, kAny, kAny>(thread, to + L::kKeyParams + L::kKeyZeros, 4 * f.key_params() + f.key_zeros());
      copy<L::kStage - L::kFineDigits, kAny, kAny>(thread, to + L::kFineDigits, 4 * f.fine_digits());
    } else {
      constexpr int kSkew = L::Columns::kSkew ? L::Columns::kSkew : 4 * S::kDim;
      copy<4 * S::kDim, kSkew, kSkew + 16>(thread, to + L::kKeyParams, 4 * f.key_params());
      copy<4 * S::kGroups * S::kTokens, kAny, kAny>(thread, to + L::kValueParams, 4 * f.value_params());
    }
  }

  const unsigned char* source = nullptr;  // of the page on its way, this thread's 16 bytes, kReach further
  int64_t source_step = 0;
  uint32_t stage_at = 0;  // of the page at hand, from `shared` on
  uint32_t both_stages = 0;
  int pages = 0, step = 0, next = 0;  // next: the page on its way
};

}  // namespace logquant::cuda::tensor
