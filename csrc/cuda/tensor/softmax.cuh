// The online softmax of a warp's rows: reference exponents, sums of weights and outputs relative to them.
//
// Layout: registers, as accumulators of mma: of each tile u, rows 8u + 2t and 8u + 2t + 1. O[channel, row] is by tile
// of rows (of a pair: the warp's own first), then by m-tile of channels. Parallelisation: all lanes with the same t
// have the same references. Memory traffic: none.
//
// Scores are in units of log2; a weight is 2^(score - reference), where the reference need not be the largest score.
#pragma once

#include "fragments.cuh"
#include "thread.cuh"

namespace logquant::cuda::tensor {

template <class K>
struct OnlineSoftmax {
  LOGQUANT_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int u = 0; u < K::kScoreTiles; ++u) {
#pragma unroll
      for (int r = 0; r < 2; ++r) reference[u][r] = -INFINITY, sum[u][r] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < K::kTiles * K::kOwnTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[j][i] = 0.0f;
    }
  }

  // Raises a row's reference to `exponent`, if it is lower. Returns what everything relative to it is to be multiplied
  // by.
  LOGQUANT_DEVICE float raise(int u, int r, float exponent) {
    const float raised = fmaxf(fmaxf(reference[u][r], exponent), kLowest);
    const float factor = ptx::exp2(reference[u][r] - raised);
    reference[u][r] = raised;
    return factor;
  }
  // u: also the tile of a pair's other warp.
  LOGQUANT_DEVICE void rescale_output(int u, int r, float factor) {
#pragma unroll
    for (int j = u * K::kOwnTiles; j < (u + 1) * K::kOwnTiles; ++j) out[j][r] *= factor, out[j][2 + r] *= factor;
  }

  float reference[K::kScoreTiles][2], sum[K::kScoreTiles][2];
  float out[K::kTiles * K::kOwnTiles][4];
};

}  // namespace logquant::cuda::tensor
