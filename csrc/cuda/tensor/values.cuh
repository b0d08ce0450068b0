// O[channel, row] += sum over tokens V[token, channel] * p'[row, token], of a page.
//
// Layout: the codes of 16 channels are operand A (32 channels are read at a time where a group has them), p' of eight
// rows operand B; O stays in registers (softmax.cuh), in units of the codes as operands until finish_values.
// Parallelisation: a warp, all its rows; of a pair, half of the channels of both warps' rows.
// Memory traffic: shared memory only, each word of codes once.
#pragma once

#include "pair.cuh"
#include "parameters.cuh"
#include "sums.cuh"

namespace logquant::cuda::tensor {

// Which channel accumulator row g (h = 0) or g + 8 (h = 1) of the m-tile j is.
template <class K>
LOGQUANT_DEVICE int page_channel(int g, int j, int h) {
  return j / 2 < K::kWideBlocks ? 32 * (j / 2) + 4 * g + 2 * (j % 2) + h : 16 * j + 2 * g + h;
}

// The m-tile j of O. weights(u, i): pair i of p' of the rows' tile u. word(f, h): the f-th word of this lane's channel
// in the tile's half h; fine(h): its fine digits.
template <class K, class Weights, class Word, class Fine>
LOGQUANT_DEVICE void add_value_tile(const ThreadInfo<K>& thread, OnlineSoftmax<K>& softmax, int j,
                                    const Weights& weights, const Word& word, const Fine& fine) {
  using Words = typename Layout<K>::ValueWords;
  constexpr int b = K::PageShape::kValueBits;
  constexpr int kPairs = Words::kWhole ? 16 / b : 8 / b;  // of a word that are this lane's
#pragma unroll
  for (int f = 0; f < Words::kCount; ++f) {
    uint32_t x = word(f, 0), y = word(f, 1);
    if constexpr (!Words::kWhole) x >>= 8 * (thread.t % 2), y >>= 8 * (thread.t % 2);
    const auto add = [&](const auto& codes) __attribute__((always_inline)) {
#pragma unroll
      for (int n = 0; n < kPairs; n += 2) {
        FragmentA values;
        codes.pairs(values, n);
#pragma unroll
        for (int u = 0; u < K::kTiles; ++u) {
          const FragmentB p = {weights(u, f * kPairs + n), weights(u, f * kPairs + n + 1)};
          ptx::mma<__half>(softmax.out[u * K::kOwnTiles + j], values, p);
        }
      }
    };
    if constexpr (K::PageShape::kFine) {
      static_assert(Words::kWhole == 1 &&
                    Words::kCount == 1);  // a lane has the rows of words that its fine digits are of
      add(FineCodeWords<b, K::PageShape::kFinePairs>(x, y, fine(0), fine(1)));
    } else {
      add(CodeWords<b>(x, y));
    }
  }
}

// The n-th of this warp's groups.
template <class K, class Weights>
LOGQUANT_DEVICE void add_values(const ThreadInfo<K>& thread, OnlineSoftmax<K>& softmax, const unsigned char* stage,
                                int n, const Weights& weights) {
  using L = Layout<K>;
  using Words = typename L::ValueWords;
  constexpr int kRow = 4 * K::PageShape::kValueDim;
#pragma unroll
  for (int j = n * K::kTilesOfGroup; j < (n + 1) * K::kTilesOfGroup; ++j) {
    const bool wide = j / 2 < K::kOwnWideBlocks;
    if (wide && j % 2) continue;  // done with its neighbour
    const unsigned char* const words =
        stage + L::kValues + thread.value_offset() + 64 * K::first_warps_tile(j) + (wide ? 16 : 8) * thread.g;
    if (wide) {
      uint4 fine = {};
      if constexpr (K::PageShape::kFine) {
        // Of 32 channels; so many share a word's digits.
        constexpr int kShared = K::PageShape::kFormat.fine_channels() / 2;
        const int block = K::first_warps_tile(j) / 2 + thread.rank * (K::kNextTiles / 2);
        fine = read<uint4>(stage + L::kFineDigits + 64 * (block / kShared) + 16 * (thread.g % 4));
        const int shift = 16 * (block % kShared) + 8 * (thread.g / 4) + K::PageShape::kValueBits * thread.t;
        fine = {fine.x >> shift, fine.y >> shift, fine.z >> shift, fine.w >> shift};
      }
      uint4 held[Words::kCount];
#pragma unroll
      for (int f = 0; f < Words::kCount; ++f) held[f] = read<uint4>(words + f * kRow);
      add_value_tile(
          thread, softmax, j, weights, [&](int f, int h) { return h ? held[f].y : held[f].x; },
          [&](int h) { return h ? fine.y : fine.x; });
      add_value_tile(
          thread, softmax, j + 1, weights, [&](int f, int h) { return h ? held[f].w : held[f].z; },
          [&](int h) { return h ? fine.w : fine.z; });
    } else {
      uint2 held[Words::kCount];
#pragma unroll
      for (int f = 0; f < Words::kCount; ++f) held[f] = read<uint2>(words + f * kRow);
      add_value_tile(
          thread, softmax, j, weights, [&](int f, int h) { return h ? held[f].y : held[f].x; }, [](int) { return 0u; });
    }
  }
}

// O in units of values: zeros are added to the n-th of this warp's groups, of the rows' tile u.
template <class K>
LOGQUANT_DEVICE void finish_group(OnlineSoftmax<K>& softmax, int u, int n, int r, float zeros) {
#pragma unroll
  for (int j = n * K::kTilesOfGroup; j < (n + 1) * K::kTilesOfGroup; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& x = softmax.out[u * K::kOwnTiles + j][2 * h + r];
      x = fmaf(x, kCodeUnit, zeros) * (K::PageShape::kFitted ? 1.0f / kScaleUnit : 1.0f);
    }
  }
}

// After the last page: the softmax's sums, and O in units of values.
template <class K>
LOGQUANT_DEVICE void finish_values(const ThreadInfo<K>& thread, OnlineSoftmax<K>& softmax, const WeightSums<K>& sums) {
  using Pair = PairExchange<K>;
  constexpr int kGroups = K::PageShape::kGroups;
#pragma unroll
  for (int u = 0; u < K::kScoreTiles; ++u) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const typename WeightSums<K>::Totals totals = sums.totals(thread, u, r);
      softmax.sum[u][r] = totals.weights;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if constexpr (K::kPaired) {
          Pair::send_zeros(thread, group, r, totals.zeros[group]);
        } else {
          finish_group(softmax, u, group, r, totals.zeros[group]);
        }
      }
    }
  }
  if constexpr (K::kPaired) {
    thread.sync_team();
#pragma unroll
    for (int i = 0; i < 2 * K::kOwnGroups; ++i) {
      const int u = i % 2, n = i / 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        finish_group(softmax, u, n, r, Pair::receive_zeros(thread, n + thread.rank * K::kNextGroups, r, u));
      }
    }
  }
}

}  // namespace logquant::cuda::tensor
