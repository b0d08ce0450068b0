// Masks: which row sees which token, and how NaNs of tokens that no row should see stay out of the products.
//
// Layout: accumulators of S (scores.cuh). A tile's unseen elements are bits: 4i + k is element k of the m-tile i.
// Parallelisation: each lane masks its own elements.
// Memory traffic: masks and positions, only where a call has them.
//
// A NaN times a weight of 0 would be a NaN for rows that do not see the token. So NaNs are taken out of the operands,
// and the outputs of rows that do see one become NaN: those where 1 for each NaN, times 1 for each token seen, sums to
// more than 0.
#pragma once

#include "fragments.cuh"
#include "thread.cuh"

namespace logquant::cuda::tensor {

// -inf where a row does not see a slot, even if the key holds a NaN; `unseen` says so, too.
template <class K>
LOGQUANT_DEVICE void mask_scores(const ThreadInfo<K>& thread, float (&score)[K::kScoreTiles][K::kTokenTiles][4],
                                 int first_slot, uint32_t (&unseen)[K::kScoreTiles]) {
#pragma unroll
  for (int u = 0; u < K::kScoreTiles; ++u) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = thread.first_score_row() + 8 * u + 2 * thread.t + r;
      if (row >= thread.block.row_total) continue;
      const Row where = thread.block.row(thread.args, row);
#pragma unroll
      for (int i = 0; i < K::kTokenTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int token = K::PageShape::kTokens / 4 * (thread.g / 2) + 4 * i + 2 * h + thread.g % 2;
          float& x = score[u][i][2 * h + r];
          x = seen_score(thread.args, where, first_slot + token, x);
          if (x == -INFINITY) unseen[u] |= 1u << (4 * i + 2 * h + r);
        }
      }
    }
  }
}

// Operand B, in the order of weights: 1 where a row sees a token, else 0.
template <class K>
LOGQUANT_DEVICE void seen_tokens(const uint32_t (&unseen)[K::kScoreTiles],
                                 uint32_t (&seen)[K::kScoreTiles][K::kTokenPairs]) {
#pragma unroll
  for (int u = 0; u < K::kScoreTiles; ++u) {
#pragma unroll
    for (int i = 0; i < K::kTokenPairs; ++i) {
      const uint32_t pair = unseen[u] >> 2 * i;
      seen[u][i] = ptx::movmatrix_trans(ptx::pack_f16(pair & 1 ? 0.0f : 1.0f, pair & 2 ? 0.0f : 1.0f));
    }
  }
}

// Zeros in place of infinities and NaNs; `nans` is 1 where one was. Whether there was any.
template <class T>
LOGQUANT_DEVICE bool extract_nans(FragmentA& words, FragmentA& nans) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t mask = not_finite<T>(words[i]);
    nans[i] = mask & Operand<T>::kOnes;
    words[i] &= ~mask;
    any = any || mask != 0;
  }
  return any;
}

}  // namespace logquant::cuda::tensor
