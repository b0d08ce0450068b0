// The weights of a page's tokens: p = 2^(score - reference), and p' = p * 2^-(b*i) * scale of the value group.
//
// Layout: fp16 pairs of tokens as operand B, in the order of the value words: movmatrix.trans of the packed
// accumulators of S. p' is kept for all groups where that is few registers, else made for one group at a time.
// Parallelisation: a warp, for its rows.
// Memory traffic: shared memory only, the scales of values.
//
// fp16 holds p and p' relative to a reference exponent. It is moved only when a p' reaches 2^15, so that the common
// path does no rescaling: one vote a page.
#pragma once

#include "softmax.cuh"

namespace logquant::cuda::tensor {

template <class K>
class PageWeights {
  using S = typename K::PageShape;
  static constexpr int kKeptGroups = K::kAllGroups ? S::kGroups : 1;

 public:
  // scale_rows: of values, fp16, [group][token], from this lane's tokens on.
  LOGQUANT_DEVICE void read_scales(const unsigned char* scale_rows) {
    if constexpr (K::kAllGroups) {
#pragma unroll
      for (int group = 0; group < S::kGroups; ++group) read_row(scales[group], scale_rows, group);
    } else {
      read_row(scales[0], scale_rows, 0);
#pragma unroll
      for (int group = 1; group < S::kGroups; ++group) {
        uint32_t others[K::kTokenPairs];
        read_row(others, scale_rows, group);
#pragma unroll
        for (int i = 0; i < K::kTokenPairs; ++i) scales[0][i] = ptx::max_nan_f16x2(scales[0][i], others[i]);
      }
    }
  }

  // exponent(u, i, k): score less reference, of element k of the m-tile i of the rows' tile u.
  template <class F>
  LOGQUANT_DEVICE void compute(const F& exponent) {
#pragma unroll
    for (int u = 0; u < K::kScoreTiles; ++u) {
#pragma unroll
      for (int i = 0; i < K::kTokenPairs; ++i) {
        p[u][i] = ptx::movmatrix_trans(
            ptx::pack_f16(ptx::exp2(exponent(u, i / 2, i % 2 * 2)), ptx::exp2(exponent(u, i / 2, i % 2 * 2 + 1))));
        const uint32_t y = without_digit_weight(u, i);
#pragma unroll
        for (int group = 0; group < kKeptGroups; ++group) scaled[u][group][i] = ptx::mul_f16x2(y, scales[group][i]);
      }
    }
  }

  // p' >= 2^15, infinite or NaN anywhere (an infinite p ends up there, too): the first page, then almost never.
  LOGQUANT_DEVICE bool out_of_range() const {
    constexpr int kScaled = sizeof scaled / 4;
    return ((max_of<kScaled>(&scaled[0][0][0]) + 0x08000800u) & 0x80008000u) != 0;
  }

  // For which exponent the largest p' of a row whose largest score is 0 becomes 2^8.
  LOGQUANT_DEVICE float margin() const {
    const uint32_t largest = max_of<sizeof scales / 4>(&scales[0][0]);
    float scale = fmaxf(Operand<__half>::low(largest), Operand<__half>::high(largest));
    scale = fmaxf(scale, __shfl_xor_sync(ptx::kFullMask, scale, 1));
    scale = fmaxf(scale, __shfl_xor_sync(ptx::kFullMask, scale, 2));
    return static_cast<float>(max(static_cast<int>(__float_as_uint(scale) >> 23) - 126, 0)) - 8.0f;
  }

  // p' of a group that is not kept.
  LOGQUANT_DEVICE void of_group(uint32_t (&to)[K::kTokenPairs], const unsigned char* scale_rows, int u,
                                int group) const {
    uint32_t group_scales[K::kTokenPairs];
    read_row(group_scales, scale_rows, group);
#pragma unroll
    for (int i = 0; i < K::kTokenPairs; ++i) to[i] = ptx::mul_f16x2(without_digit_weight(u, i), group_scales[i]);
  }

  uint32_t p[K::kScoreTiles][K::kTokenPairs];
  uint32_t scaled[K::kScoreTiles][kKeptGroups][K::kTokenPairs];  // p' of the groups kept, or p times the largest scale

 private:
  LOGQUANT_DEVICE uint32_t without_digit_weight(int u, int i) const {
    constexpr int b = S::kValueBits;
    return i % (8 / b) == 0 ? p[u][i] : ptx::mul_f16x2(p[u][i], inverse_digit_weights<b>(i));
  }
  static LOGQUANT_DEVICE void read_row(uint32_t (&to)[K::kTokenPairs], const unsigned char* scale_rows, int group) {
#pragma unroll
    for (int i = 0; i < K::kTokenPairs; i += 4) {
      assign(to + i, read<uint4>(scale_rows + group * 2 * S::kTokens + 4 * i));
    }
  }

  uint32_t scales[kKeptGroups][K::kTokenPairs];
};

}  // namespace logquant::cuda::tensor
