// Sums over tokens that are not over codes: of the weights, and of weights times the zeros of values.
//
// Layout: one small product with p for each tile of rows: rows 0.. of operand A are the zeros of the value groups, then
// a row of ones, then (fp16 models) the scales of the groups; in a product of their own where nine rows would be
// needed. A quad of words is operand A as LDS.128 left it: rows 0-7 see words 0 and 2, rows 8-15 words 1 and 3, each
// with its own B (even and odd pairs of tokens) and accumulator, of which the other half is garbage. Row n of the sums
// is even[r] + odd[2 + r] of the lanes g = n. Parallelisation: a warp, for its rows. Memory traffic: shared memory
// only, the zeros of values.
//
// fp16 models are compensated: p' is rounded, and codes have a mean, so mean * (sum p * scale - sum p' * 2^(b*i)) is
// added back. Fitted values have no zeros: sum p' * (code - mean) is sum p' * code - mean * sum p', and what rounding
// takes from p' needs no compensation.
#pragma once

#include "mask.cuh"
#include "pages.cuh"
#include "weights.cuh"

namespace logquant::cuda::tensor {

template <class K>
class WeightSums {
  using S = typename K::PageShape;
  using L = Layout<K>;
  static constexpr bool kScalesApart = K::kCompensated && !S::kFitted && 2 * S::kGroups + 1 > 8;
  static constexpr float kCodeMean = code_mask(S::kValueBits) / 2.0f;
  using Weights = uint32_t[K::kScoreTiles][K::kTokenPairs];
  using Unseen = uint32_t[K::kScoreTiles];

 public:
  using Thread = ThreadInfo<K>;

  // sum p' * 2^(b*i) is needed, too.
  static constexpr bool kSubtracted = K::kCompensated || S::kFitted;

  // Where this lane's row of operand A lies: in the constants, or in the page at hand.
  LOGQUANT_DEVICE void start(const Thread& thread) {
    lane_of_group[0] = thread.keep_in_pair(16 * (thread.g - thread.rank * K::kNextGroups));
    lane_of_group[1] = thread.keep_in_pair(16 * (thread.g - (1 - thread.rank) * K::kNextGroups));
    if constexpr (S::kFitted) return;
    const int g = thread.g, first = thread.t * 4 * K::kTokenPairs;
    row_offset = (g == S::kGroups ? 0 : L::kZeroRow) + first;
    stage_mask = 0;
    if (g < S::kGroups) {
      stage_mask = ~0u;
      row_offset = L::kValueParams + 2 * (S::kGroups + g) * S::kTokens + first;
    } else if (K::kCompensated && !kScalesApart && g > S::kGroups && g <= 2 * S::kGroups) {
      stage_mask = ~0u;
      row_offset = L::kValueParams + 2 * (g - S::kGroups - 1) * S::kTokens + first;
    }
    stage_mask = ptx::keep(stage_mask);
    row_offset = ptx::keep(row_offset);
  }

  // Adds a page's sum p and, of plain formats, sum p * zero.
  LOGQUANT_DEVICE void add(const Thread& thread, const Weights& p, const PageRing<K>& ring, const Unseen& unseen) {
    if constexpr (S::kFitted) {
#pragma unroll
      for (int u = 0; u < K::kScoreTiles; ++u)
        sum_pairs(thread, even[u], odd[u], L::kOnes + 16 * thread.g, S::kGroups, p[u]);
    } else {
      add_parameters(thread, p, ring.stage_offset(), unseen);
    }
  }

  // Minus sum p' * 2^(b*i), into the row of the group's scales (fitted: of the group): the compensation of p', or what
  // the mean of the codes, which fitted values are stored without, has added. group: of this warp's, or of the others'
  // of a pair.
  LOGQUANT_DEVICE void subtract_scaled(const Thread& thread, int u, int group, const uint32_t* scaled, bool others) {
    const int row = kScalesApart || S::kFitted ? group : S::kGroups + 1 + group;
    // Of every eight pairs the last is fine, or its second token.
    sum_pairs(thread, kScalesApart ? means_even[u] : even[u], kScalesApart ? means_odd[u] : odd[u],
              L::kNegativeValueWeights + lane_of_group[others], row, scaled,
              S::kFine ? L::kNegativeFineWeights - L::kNegativeValueWeights : 0);
  }

  LOGQUANT_DEVICE void rescale(int u, int r, float factor) {
    even[u][r] *= factor;
    odd[u][2 + r] *= factor;
    if constexpr (kScalesApart) means_even[u][r] *= factor, means_odd[u][2 + r] *= factor;
  }

  // Fitted: takes NaNs out of the scales of a page's values, which poisoned ones are, also where there are no masks: p'
  // that are NaN would poison the sums of all rows and groups.
  LOGQUANT_DEVICE void exclude_unseen_scales(const Thread& thread, unsigned char* scales, const Unseen& unseen) {
    Weights seen;
    seen_tokens<K>(unseen, seen);
    const auto each_quad = [&](const auto& f) __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < S::kGroups * K::kTokenPairs; i += 4) {
        const int group = i / K::kTokenPairs, n = i % K::kTokenPairs;
        const int token_pair = thread.t * K::kTokenPairs + n;
        uint4* const quad = reinterpret_cast<uint4*>(scales + 2 * group * S::kTokens + 4 * token_pair);
        FragmentA words, nans;
        assign(words, *quad);
        extract_nans<__half>(words, nans);
        f(quad, words, nans, group, n);
      }
    };
    each_quad([&](uint4*, const FragmentA&, FragmentA& nans, int group, int n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) nans[i] = thread.g == group ? nans[i] : 0;
      poison(nans, n, seen);
    });
    thread.sync_team();
    if (thread.g == 0 && thread.rank == 0) {
      each_quad([](uint4* quad, const FragmentA& words, const FragmentA&, int, int) {
        *quad = {words[0], words[1], words[2], words[3]};
      });
    }
    thread.sync_team();
  }

  // Of a row, over all pages: sum p, and of each group what O lacks beside the codes.
  struct Totals {
    float weights, zeros[S::kGroups];
  };
  LOGQUANT_DEVICE Totals totals(const Thread& thread, int u, int r) const {
    const int t = thread.t;
    const float total = even[u][r] + odd[u][2 + r];
    const float apart = means_even[u][r] + means_odd[u][2 + r];
    Totals result;
    result.weights = __shfl_sync(ptx::kFullMask, total, 4 * S::kGroups + t);
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      float zeros = __shfl_sync(ptx::kFullMask, total, 4 * group + t);
      if constexpr (S::kFitted) {
        zeros *= kCodeMean;
      } else if constexpr (K::kCompensated) {
        const float mean = kScalesApart ? __shfl_sync(ptx::kFullMask, apart, 4 * group + t)
                                        : __shfl_sync(ptx::kFullMask, total, 4 * (S::kGroups + 1 + group) + t);
        zeros = fmaf(kCodeMean, mean, zeros);
      }
      result.zeros[group] = zeros;
    }
    return result;
  }

 private:
  LOGQUANT_DEVICE void add_parameters(const Thread& thread, const Weights& p, uint32_t stage_offset,
                                      const Unseen& unseen) {
    const unsigned char* const row = thread.shared + (row_offset + (stage_offset & stage_mask));
    FragmentA words[K::kTokenPairs / 4];
#pragma unroll
    for (int n = 0; n < K::kTokenPairs; n += 4) assign(words[n / 4], read<uint4>(row + 4 * n));
    if (!thread.args.plain) exclude_unseen(words, unseen);
#pragma unroll
    for (int n = 0; n < K::kTokenPairs; n += 4) {
#pragma unroll
      for (int u = 0; u < K::kScoreTiles; ++u) {
        const FragmentB even_pairs = {p[u][n], p[u][n + 2]}, odd_pairs = {p[u][n + 1], p[u][n + 3]};
        ptx::mma<__half>(even[u], words[n / 4], even_pairs);
        ptx::mma<__half>(odd[u], words[n / 4], odd_pairs);
        if constexpr (kScalesApart) {
          FragmentA scale_words;
          assign(scale_words, read<uint4>((stage_mask ? row - 2 * S::kGroups * S::kTokens : row) + 4 * n));
          ptx::mma<__half>(means_even[u], scale_words, even_pairs);
          ptx::mma<__half>(means_odd[u], scale_words, odd_pairs);
        }
      }
    }
  }

  LOGQUANT_DEVICE void exclude_unseen(FragmentA (&words)[K::kTokenPairs / 4], const Unseen& unseen) {
    FragmentA nans[K::kTokenPairs / 4];
    bool any = false;
#pragma unroll
    for (int n = 0; n < K::kTokenPairs / 4; ++n) any = extract_nans<__half>(words[n], nans[n]) || any;
    if (!__any_sync(ptx::kFullMask, any)) return;
    Weights seen;
    seen_tokens<K>(unseen, seen);
#pragma unroll
    for (int n = 0; n < K::kTokenPairs / 4; ++n) poison(nans[n], 4 * n, seen);
  }
  // NaN into the sums of rows that see one of the NaNs, of four pairs of tokens from pair n on.
  LOGQUANT_DEVICE void poison(const FragmentA& nans, int n, const Weights& seen) {
#pragma unroll
    for (int u = 0; u < K::kScoreTiles; ++u) {
      float count_even[4] = {}, count_odd[4] = {};
      ptx::mma<__half>(count_even, nans, {seen[u][n], seen[u][n + 2]});
      ptx::mma<__half>(count_odd, nans, {seen[u][n + 1], seen[u][n + 3]});
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (count_even[r] + count_odd[2 + r] > 0.0f) even[u][r] = NAN;
      }
    }
  }

  // Adds the sum of constants (digit weights or ones) times pairs to row `row`: its lanes read the constants, which are
  // at `constants` for g = 0, others zeros beside them. Of every second four pairs, those at `constants` + to_second.
  LOGQUANT_DEVICE void sum_pairs(const Thread& thread, float (&to_even)[4], float (&to_odd)[4], int constants, int row,
                                 const uint32_t* pairs, int to_second = 0) const {
    FragmentA operand;
    assign(operand, read<uint4>(thread.shared + constants - 16 * row));
#pragma unroll
    for (int n = 0; n < K::kTokenPairs; n += 4) {
      if (to_second != 0 && n % 8 == 4) assign(operand, read<uint4>(thread.shared + constants + to_second - 16 * row));
      ptx::mma<__half>(to_even, operand, {pairs[n], pairs[n + 1]});
      ptx::mma<__half>(to_odd, operand, {pairs[n + 2], pairs[n + 3]});
    }
  }

  float even[K::kScoreTiles][4] = {}, odd[K::kScoreTiles][4] = {};
  float means_even[K::kScoreTiles][4] = {}, means_odd[K::kScoreTiles][4] = {};
  // Of this lane's row: from `shared` on, or (all bits of the mask set) from the page at hand on.
  uint32_t stage_mask = 0, row_offset = 0;
  int lane_of_group[2];  // 16 bytes a lane g, less what the first group of this warp, and of a pair's other, is further
};

}  // namespace logquant::cuda::tensor
