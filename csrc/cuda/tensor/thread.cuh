// Which part of the work a thread has: its split and rows come from the grid, its page from its team, its elements from
// its lane. Every role of the kernel looks here.
//
// Layout: grid (splits, batch * KV heads, tiles of rows), see BlockRows; registers only.
// Parallelisation: warps, teams and pairs as Config says.
// Memory traffic: none of its own.
#pragma once

#include "layout.cuh"

namespace logquant::cuda::tensor {

template <class K>
struct ThreadInfo {
  using L = Layout<K>;

  LOGQUANT_DEVICE ThreadInfo(const AttendArgs& arguments, unsigned char* shared_memory)
      : args(arguments),
        shared(kKeepShared ? ptx::keep_shared(shared_memory) : shared_memory),
        // Kernels of one tile have three or four blocks an SM, and no register for this.
        warp(K::kTiles == 1 ? static_cast<int>(threadIdx.x / 32) : ptx::keep(static_cast<int>(threadIdx.x / 32))),
        rank(K::kPaired ? warp : 0),
        team(K::kPaired ? 0 : warp),
        lane(ptx::keep(static_cast<int>(threadIdx.x % 32))),
        g(lane / 4),
        t(lane % 4),
        block(arguments, K::kRows),
        kept_key_offset(K::kPaired ? ptx::keep(computed_key_offset()) : 0),
        kept_value_offset(K::kPaired ? ptx::keep(computed_value_offset()) : 0) {}

  // The first of the rows whose scores this warp computes.
  LOGQUANT_DEVICE int first_score_row() const { return block.first_row + 8 * rank; }
  LOGQUANT_DEVICE const typename K::Scalar* query(int row) const {
    return static_cast<const typename K::Scalar*>(args.q.data) + query_offset(args, block.row(args, row));
  }

  LOGQUANT_DEVICE int team_thread() const { return K::kPaired ? static_cast<int>(threadIdx.x) : lane; }
  LOGQUANT_DEVICE static void sync_team() {
    if constexpr (K::kPaired) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  LOGQUANT_DEVICE static bool any_in_team(bool x) {
    return K::kPaired ? __syncthreads_or(x) != 0 : __any_sync(ptx::kFullMask, x) != 0;
  }

  // From where a page's codes of keys or values begin to this lane's.
  LOGQUANT_DEVICE int key_offset() const { return K::kPaired ? kept_key_offset : computed_key_offset(); }
  LOGQUANT_DEVICE int value_offset() const { return K::kPaired ? kept_value_offset : computed_value_offset(); }

  // Computed once: pairs have registers for it, for others the compiler weighs them against computing it again.
  static LOGQUANT_DEVICE int keep_in_pair(int x) { return K::kPaired ? ptx::keep(x) : x; }

  // The address of shared memory in a register saves instructions, but some formats have no room for it.
  static constexpr bool kKeepShared = K::kPaired || (!K::PageShape::kFitted && K::PageShape::kDim != 112);

  const AttendArgs& args;
  unsigned char* const shared;
  const int warp, rank, team;  // rank: of the warp in its pair
  const int lane, g, t;
  const BlockRows block;

 private:
  LOGQUANT_DEVICE int computed_key_offset() const { return (g / 2) * L::kKeyPitch + g % 2 * 4 * L::kKeyWords; }
  LOGQUANT_DEVICE int computed_value_offset() const {
    return (L::kValueBlocks == 4 ? t : t / 2) * L::kValuePitch + 64 * rank * K::kNextTiles;
  }

  const int kept_key_offset, kept_value_offset;
};

}  // namespace logquant::cuda::tensor
