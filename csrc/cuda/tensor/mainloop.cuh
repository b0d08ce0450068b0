// Attention of a block's rows over its split of the pages.
//
// Layout: a page at hand in the ring; everything about its tokens in registers (scores.cuh, weights.cuh).
// Parallelisation: a team a page at a time; splits and teams take pages in turns.
// Memory traffic: each page once (pages.cuh).
#pragma once

#include "merge.cuh"
#include "scores.cuh"
#include "values.cuh"
#include "window.cuh"

namespace logquant::cuda::tensor {

// Constants of all teams (Layout).
template <class K>
LOGQUANT_DEVICE void fill_constants(unsigned char* shared) {
  using S = typename K::PageShape;
  using L = Layout<K>;
  uint32_t* const constants = reinterpret_cast<uint32_t*>(shared);
  for (int i = threadIdx.x; i < L::kConstants / 4; i += K::kThreads) {
    const int n = i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4;
    constants[i] = i < L::kZeroRow / 4 || i / 4 == L::kOnes / 16 ? Operand<__half>::kOnes
                   : i / 4 == L::kNegativeKeyWeights / 16        ? negative_digit_weights<S::kKeyBits>(n)
                   : i / 4 == L::kNegativeValueWeights / 16      ? negative_digit_weights<S::kValueBits>(n)
                   : i / 4 == L::kNegativeFineWeights / 16       ? negative_fine_weights<S::kFinePairs>(n)
                                                                 : 0u;
  }
}

// All that a thread has of its work. One object that parts get by reference but keep no references to: its arrays
// become registers only when loops have been unrolled, and what an array's neighbour pointed to would then stay in
// memory.
template <class K>
class Attention {
  using S = typename K::PageShape;
  using L = Layout<K>;
  using PageScores = float[K::kScoreTiles][K::kTokenTiles][4];

 public:
  LOGQUANT_DEVICE Attention(const AttendArgs& args, unsigned char* shared) : thread(args, shared) {}

  LOGQUANT_DEVICE void run() {
    const int split = ptx::block_x();
    if (split < thread.args.page_splits) {
      attend_pages(split);
    } else {
      WindowAttention<K>::attend(thread, softmax, split - thread.args.page_splits);
    }
    merge(thread, softmax);
  }

 private:
  LOGQUANT_DEVICE void attend_pages(int split) {
    fill_constants<K>(thread.shared);
    sums.start(thread);
    pair.start(thread);
    parameters.start(thread);
    ring.start(thread, split);
    if constexpr (S::kFitted) parameters.mark_digits(thread);
    query.load(thread);
    if constexpr (S::kFitted) parameters.prepare(thread);
    __syncthreads();  // constants and tables

    while (ring.has_page()) {
      ring.acquire(thread);
      attend_page();
      ring.release();
    }
    ptx::cp_async_wait<0>();
    finish_values(thread, softmax, sums);
  }

  LOGQUANT_DEVICE void attend_page() {
    const unsigned char* const stage = ring.stage(thread);
    float bias[K::kScoreTiles][2];
    PageScores s;
    bool poison = false;
    if constexpr (S::kFitted) poison = parameters.unpack(thread, stage);
    Scores<K>::compute(thread, query, stage, parameters.unpacked(thread), s, bias);

    PageWeights<K> weights;
    const unsigned char* const scale_rows =
        (S::kFitted ? parameters.value_scales(thread) : stage + L::kValueParams) + thread.t * 4 * K::kTokenPairs;
    uint32_t unseen[K::kScoreTiles];  // by mask_scores; else not used below
    float factors[K::kScoreTiles][2];
#pragma unroll
    for (int u = 0; u < K::kScoreTiles; ++u) factors[u][0] = factors[u][1] = 1.0f;
    // Of fitted formats only where they are used, for exclude_unseen_scales may write some.
    if constexpr (!S::kFitted) weights.read_scales(scale_rows);
    bool moves = !thread.args.plain || poison;  // the reference exponent
    // Weights that masks will replace are not computed; but with this branch plain formats of dim 128 spill registers.
    if ((S::kDim == 128 && !S::kFitted) || !moves) {
      if constexpr (S::kFitted) weights.read_scales(scale_rows);
      float common[K::kScoreTiles][2];
#pragma unroll
      for (int u = 0; u < K::kScoreTiles; ++u) {
#pragma unroll
        for (int r = 0; r < 2; ++r) common[u][r] = fmaf(bias[u][r], query.bias_factor[u][r], -softmax.reference[u][r]);
      }
      weights.compute(
          [&](int u, int i, int k) { return fmaf(s[u][i][k], query.code_factor[u][k % 2], common[u][k % 2]); });
      moves = __any_sync(ptx::kFullMask, weights.out_of_range()) != 0 || moves;
    }
    if (moves) {
      // Not in place: if s could change here, the accumulators would be copied in the plain loop, too.
      PageScores score;
#pragma unroll
      for (int u = 0; u < K::kScoreTiles; ++u) {
        unseen[u] = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float common = bias[u][k % 2] * query.bias_factor[u][k % 2];
#pragma unroll
          for (int i = 0; i < K::kTokenTiles; ++i) {
            score[u][i][k] = fmaf(s[u][i][k], query.code_factor[u][k % 2], common);
          }
        }
      }
      if (!thread.args.plain) mask_scores(thread, score, ring.page() * S::kTokens, unseen);
      if constexpr (S::kFitted) {
        if (poison) sums.exclude_unseen_scales(thread, parameters.value_scales(thread), unseen);
        weights.read_scales(scale_rows);
      }
      move_references(score, weights.margin(), factors);
      weights.compute([&](int u, int i, int k) { return score[u][i][k] - softmax.reference[u][k % 2]; });
    }
    sums.add(thread, weights.p, ring, unseen);
    add_page_values(stage, weights, scale_rows, moves, factors);
  }

  // To where this page's largest weight, with its scale, is 2^8.
  LOGQUANT_DEVICE void move_references(const PageScores& score, float margin, float (&factors)[K::kScoreTiles][2]) {
#pragma unroll
    for (int u = 0; u < K::kScoreTiles; ++u) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float most = score[u][0][r];
#pragma unroll
        for (int i = 0; i < K::kTokenTiles; ++i) most = fmaxf(most, fmaxf(score[u][i][r], score[u][i][2 + r]));
        factors[u][r] = softmax.raise(u, r, max_over_tokens(most) + margin);
        sums.rescale(u, r, factors[u][r]);
        softmax.rescale_output(u, r, factors[u][r]);
      }
    }
  }

  LOGQUANT_DEVICE void add_page_values(const unsigned char* stage, const PageWeights<K>& weights,
                                       const unsigned char* scale_rows, bool moves,
                                       const float (&factors)[K::kScoreTiles][2]) {
    if constexpr (WeightSums<K>::kSubtracted && K::kAllGroups) {
#pragma unroll
      for (int u = 0; u < K::kScoreTiles; ++u) {
#pragma unroll
        for (int group = 0; group < S::kGroups; ++group)
          sums.subtract_scaled(thread, u, group, weights.scaled[u][group], false);
      }
    }
    // The n-th of this warp's groups, or of the others' of a pair.
    const auto weights_of_group = [&](uint32_t (&to)[K::kTokenPairs], int u, int n,
                                      bool others) __attribute__((always_inline)) {
      weights.of_group(to, scale_rows, u, n + (others ? 1 - thread.rank : thread.rank) * K::kNextGroups);
      if constexpr (WeightSums<K>::kSubtracted) sums.subtract_scaled(thread, u, n, to, others);
    };
    // p' of a pair: each warp keeps what it needs of its rows, and sends the other what that needs.
    uint32_t kept[K::kPaired ? K::kOwnGroups : 1][K::kTokenPairs];
    if constexpr (K::kPaired) {
#pragma unroll
      for (int n = 0; n < K::kOwnGroups; ++n) {
        weights_of_group(kept[n], 0, n, false);
        uint32_t sent[K::kTokenPairs];
        if constexpr (K::kWholeGroups) weights_of_group(sent, 0, n, true);
        pair.send_weights(thread, n, K::kWholeGroups ? sent : kept[n]);
      }
      if (thread.any_in_team(moves)) {
        float others[2];
        pair.exchange_factors(thread, factors[0], others);
#pragma unroll
        for (int r = 0; r < 2; ++r) softmax.rescale_output(1, r, others[r]);
      }
    }
    // Groups follow each other, so p' of one at a time is enough.
#pragma unroll
    for (int n = 0; n < K::kOwnGroups; ++n) {
      uint32_t own[K::kTiles][K::kTokenPairs] = {};
      if constexpr (K::kPaired) {
        pair.receive_weights(thread, own[1], n);
      } else if constexpr (!K::kAllGroups) {
#pragma unroll
        for (int u = 0; u < K::kTiles; ++u) weights_of_group(own[u], u, n, false);
      }
      add_values(thread, softmax, stage, n, [&](int u, int i) {
        return K::kAllGroups          ? weights.scaled[K::kPaired ? 0 : u][K::kAllGroups ? n : 0][i]
               : K::kPaired && u == 0 ? kept[K::kPaired ? n : 0][i]
                                      : own[u][i];
      });
    }
  }

  const ThreadInfo<K> thread;
  OnlineSoftmax<K> softmax;
  PageRing<K> ring;
  FittedParameters<K> parameters;
  Query<K> query;
  WeightSums<K> sums;
  PairExchange<K> pair;
};

}  // namespace logquant::cuda::tensor
