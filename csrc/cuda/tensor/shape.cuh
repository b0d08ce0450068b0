// What a kernel of decoding on tensor cores is compiled for, and how its block shares the work.
//
// Layout: Shape is a page format (format.h) with all numbers known; Config adds the model's dtype and the query rows.
// Parallelisation: a block takes 8 or 16 rows of a KV head, in tiles of 8, and one split of its slots. Its warps form
// teams that work on one page at a time: a warp, or, where the output of 16 rows would not fit in a warp's registers,
// the two warps of the block. Each of such a pair takes 8 rows of S and half of the channels of O.
// Memory traffic: none of its own.
#pragma once

#include "../attend.cuh"

namespace logquant::cuda::tensor {

template <int D, int DV, int C, int KeyBits, int ValueBits, int G, int GV, int ParamBits, int FineValues>
struct Shape {
  static constexpr int kDim = D, kValueDim = DV, kColumns = C, kKeyBits = KeyBits, kValueBits = ValueBits, kTokens = G;
  static constexpr int kGroup = GV, kGroups = DV / GV;
  static constexpr PageFormat kFormat{D, DV, G, KeyBits, ValueBits, C, GV, ParamBits, ParamBits, FineValues};
  static constexpr int kFineValues = FineValues;
  static constexpr bool kFine = FineValues > 0, kFinePairs = FineValues == 8;
  // 8-bit parameters and a column map: one does not come without the other here.
  static constexpr bool kFitted = ParamBits == 8;
  static_assert(format_error(kFormat) == nullptr && kGroups <= 4 && (kFitted || C == D));
};

// T: of the model; S: the Shape; tiles: of 8 query rows, 1 or 2.
template <class T, class S, int tiles>
struct Config {
  using Scalar = T;
  using PageShape = S;
  static constexpr int kTiles = tiles, kRows = 8 * tiles;
  // fp16 models: what rounding takes from q' and p' is added back (scores.cuh, sums.cuh).
  static constexpr bool kCompensated = std::is_same_v<T, __half>;

  static constexpr bool kPaired = tiles == 2 && S::kValueDim > (kCompensated || S::kFitted ? 128 : 192);
  static constexpr int kWarps = kPaired ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kTeams = kPaired ? 1 : kWarps, kTeamThreads = kThreads / kTeams;
  static constexpr int kScoreTiles = kPaired ? 1 : tiles;  // of S, of a warp

  static constexpr int kTokenPairs = S::kTokens / 8, kTokenTiles = S::kTokens / 16;
  static_assert(4 * kTokenTiles <= 32);  // bits of a mask (mask.cuh)

  // Channels of O are m-tiles of 16; 32 at a time where a group has them.
  static constexpr bool kWide = S::kGroup % 32 == 0 || S::kGroups == 1;
  static constexpr int kChannelTiles = S::kValueDim / 16, kWideBlocks = kWide ? S::kValueDim / 32 : 0;
  // Of a pair, each warp takes half of the groups, or else every other 32 channels of every group.
  static constexpr bool kWholeGroups = S::kGroups % 2 == 0;
  static constexpr int kOwnGroups = kPaired && kWholeGroups ? S::kGroups / 2 : S::kGroups;
  static constexpr int kOwnTiles = kPaired ? kChannelTiles / 2 : kChannelTiles;
  static constexpr int kOwnWideBlocks = kPaired ? kWideBlocks / 2 : kWideBlocks;
  static constexpr int kTilesOfGroup = kOwnTiles / kOwnGroups;
  // What the second warp adds to the numbers of groups and tiles of the first.
  static constexpr int kNextGroups = kPaired && kWholeGroups ? S::kGroups / 2 : 0;
  static constexpr int kNextTiles = !kPaired ? 0 : kWholeGroups ? kChannelTiles / 2 : 2;
  static LOGQUANT_DEVICE constexpr int first_warps_tile(int j) {
    return kPaired && !kWholeGroups ? j / 2 * 4 + j % 2 : j;
  }
  static_assert(!kPaired || (kWide && kTilesOfGroup % 2 == 0));

  // The scaled weights p' of all groups are kept, not those of one at a time.
  static constexpr bool kAllGroups = S::kGroups * tiles <= 2;
};

}  // namespace logquant::cuda::tensor
