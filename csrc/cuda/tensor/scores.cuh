// S[token, row] = sum over columns K[token, column] * q'[row, column], of a page.
//
// Layout: the codes of 16 tokens are operand A, eight query rows operand B, so that few rows cost no padding and every
// code is turned into an operand once. Rows of the m-tile i are the tokens G/4 * (r % 8 / 2) + 4i + 2 (r / 8) + r % 2:
// then movmatrix.trans of the packed weights is operand B of the product with values, in the order of their words.
// Parallelisation: a warp, all tokens of a page for its rows.
// Memory traffic: shared memory only, each word of codes once.
//
// Zeros: sum q * zero is an mma whose rows of A are all the zero vector: the sum arrives where S is. fp16 models are
// compensated: q' is rounded, and codes have a mean, so half of the rounding noise is common to all tokens of a page.
// mean * (sum q * scale - sum q' * 2^(b*i)) is added back, by mma. Of fitted keys, where q' multiplies the zeros, too
// (sum q' * zero rounds no worse than q' does), it is (zero + mean) times what each q' lost; q' is operand A here, for
// the two halves of its rows have a use.
#pragma once

#include "query.cuh"

namespace logquant::cuda::tensor {

template <class K>
struct Scores {
  using S = typename K::PageShape;
  using L = Layout<K>;
  using KeyWords = typename L::KeyWords;
  using Columns = typename L::Columns;
  using Channels = typename L::Channels;
  using Thread = ThreadInfo<K>;
  static constexpr float kCodeMean = code_mask(S::kKeyBits) / 2.0f;

  // s: S in units of Query::code_factor; bias: of each row of q the part of the score that all tokens share, in units
  // of Query::bias_factor. unpacked: fitted parameters.
  static LOGQUANT_DEVICE void compute(const Thread& thread, const Query<K>& query, const unsigned char* stage,
                                      const unsigned char* unpacked, float (&s)[K::kScoreTiles][K::kTokenTiles][4],
                                      float (&bias)[K::kScoreTiles][2]) {
    constexpr bool kCompensatedHere = K::kCompensated && !S::kFitted;
    const unsigned char* const scale_row = S::kFitted ? unpacked + L::kColumnScales : stage + L::kKeyParams;
    float of_channels[K::kScoreTiles][4] = {};
    if constexpr (S::kFitted) add_channels(thread, query, unpacked, of_channels);
    FragmentA negative_weights = {};
    if constexpr (kCompensatedHere) assign(negative_weights, read<uint4>(thread.shared + L::kNegativeKeyWeights));
    uint32_t q[K::kScoreTiles][4 * Columns::kQuads];  // q' = q * scale * 2^-(b*i)
    float zero_even[K::kScoreTiles][4], zero_odd[K::kScoreTiles][4];
    float mean_even[K::kScoreTiles][4], mean_odd[K::kScoreTiles][4];
#pragma unroll
    for (int u = 0; u < K::kScoreTiles; ++u) {
#pragma unroll
      for (int i = 0; i < 4; ++i) zero_even[u][i] = zero_odd[u][i] = mean_even[u][i] = mean_odd[u][i] = 0.0f;
#pragma unroll
      for (int i = 0; i < K::kTokenTiles; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) s[u][i][k] = 0.0f;
      }
    }
    const unsigned char* const rows = stage + thread.key_offset();
#pragma unroll
    for (int quad = 0; quad < Columns::kQuads; ++quad) {
      FragmentA scale, zero;
      read_columns(thread, scale, scale_row, quad);
      if constexpr (!S::kFitted) read_columns(thread, zero, stage + L::kKeyParams + L::kKeyZeros, quad);
#pragma unroll
      for (int u = 0; u < K::kScoreTiles; ++u) {
        FragmentB even = {}, odd = {};
        if constexpr (!S::kFitted) query.even_and_odd(thread, even, odd, u, quad);
        uint32_t scaled[4];
        query.scaled_quad(thread, scaled, u, quad);
#pragma unroll
        for (int i = 0; i < 4; ++i) q[u][4 * quad + i] = ptx::mul_f16x2(scaled[i], scale[i]);
        if constexpr (!S::kFitted) {
          ptx::mma<__half>(zero_even[u], zero, even);
          ptx::mma<__half>(zero_odd[u], zero, odd);
        }
        if constexpr (kCompensatedHere) {
          ptx::mma<__half>(mean_even[u], scale, even);
          ptx::mma<__half>(mean_odd[u], scale, odd);
          const FragmentB first = {q[u][4 * quad], q[u][4 * quad + 1]};
          const FragmentB second = {q[u][4 * quad + 2], q[u][4 * quad + 3]};
          ptx::mma<__half>(mean_even[u], negative_weights, first);
          if (4 * quad + 2 < Columns::kCount) ptx::mma<__half>(mean_odd[u], negative_weights, second);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < K::kTokenTiles; ++i) add_codes(thread, rows + 16 * i * L::kKeyWords, i, q, s);
#pragma unroll
    for (int u = 0; u < K::kScoreTiles; ++u) {
      const float total = of_channels[u][0] + of_channels[u][3];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (S::kFitted) {
          bias[u][r] = __shfl_sync(ptx::kFullMask, total, 8 * thread.t + 4 * r);
        } else {
          bias[u][r] = zero_even[u][r] + zero_odd[u][2 + r];
          if constexpr (K::kCompensated) bias[u][r] = fmaf(kCodeMean, mean_even[u][r] + mean_odd[u][2 + r], bias[u][r]);
        }
      }
    }
  }

  // The bias of fitted formats: with q' = q * scale rounded, as codes see it, sum q' * zero, and what rounding took
  // from sum q * scale * (zero + mean of the codes). It is sums[0] + sums[3] of the lanes g = row, the others are
  // garbage: operand A is q' and below what it lost, even columns of B are zeros, odd ones zeros with the mean. Where
  // nothing is compensated, each half has half of the channels.
  static LOGQUANT_DEVICE void add_channels(const Thread& thread, const Query<K>& query, const unsigned char* unpacked,
                                           float (&sums)[K::kScoreTiles][4]) {
    const unsigned char* const zeros =
        unpacked + (K::kCompensated && thread.g % 2 ? L::kUnpackedMeans : L::kUnpackedZeros);
#pragma unroll
    for (int quad = 0; quad < Channels::kQuads; ++quad) {
      FragmentA scale, zero;
      read_channels(thread, scale, unpacked, quad);
      if constexpr (K::kCompensated) {
        read_channels(thread, zero, zeros, quad);
      } else {
        const int first = Channels::channel(thread.t, quad, Channels::whole(quad) ? thread.g % 2 * 2 : 0);
        const uint2 two = read<uint2>(zeros + 2 * first);
        zero[0] = two.x, zero[1] = two.y;
      }
#pragma unroll
      for (int u = 0; u < K::kScoreTiles; ++u) {
        FragmentA q, rounded, lost;
        query.channel_quad(thread, q, u, quad);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          rounded[i] = ptx::mul_f16x2(q[i], scale[i]);
          if constexpr (K::kCompensated) lost[i] = ptx::mul_sub_f16x2(q[i], scale[i], rounded[i]);
        }
        if constexpr (K::kCompensated) {
          ptx::mma<__half>(sums[u], {rounded[0], lost[0], rounded[1], lost[1]}, {zero[0], zero[1]});
          if (Channels::whole(quad)) {
            ptx::mma<__half>(sums[u], {rounded[2], lost[2], rounded[3], lost[3]}, {zero[2], zero[3]});
          }
        } else {
          ptx::mma<__half>(sums[u], {rounded[0], rounded[2], rounded[1], rounded[3]}, {zero[0], zero[1]});
        }
      }
    }
  }

  // The m-tile i of S.
  static LOGQUANT_DEVICE void add_codes(const Thread& thread, const unsigned char* tile, int i,
                                        const uint32_t (&q)[K::kScoreTiles][4 * Columns::kQuads],
                                        float (&s)[K::kScoreTiles][K::kTokenTiles][4]) {
    uint32_t words[2][KeyWords::kCount];
#pragma unroll
    for (int h = 0; h < 2; ++h) read_words(thread, words[h], tile + 8 * h * L::kKeyWords);
#pragma unroll
    for (int w = 0; w < KeyWords::kCount; ++w) {
      const CodeWords<S::kKeyBits> codes(words[0][w], words[1][w]);
      const int first = KeyWords::pairs_before(w), end = KeyWords::pairs_before(w + 1);
#pragma unroll
      for (int n = 0; n < end - first; n += 2) {
        FragmentA keys;
        codes.pairs(keys, n);
#pragma unroll
        for (int u = 0; u < K::kScoreTiles; ++u) {
          const FragmentB rows_of_q = {q[u][first + n], q[u][first + n + 1]};
          ptx::mma<__half>(s[u][i], keys, rows_of_q);
        }
      }
    }
  }

  // This lane's words of a token's columns.
  static LOGQUANT_DEVICE void read_words(const Thread& thread, uint32_t (&to)[KeyWords::kCount],
                                         const unsigned char* row) {
    constexpr int whole = KeyWords::kWhole;
    const unsigned char* const own = row + thread.t * 4 * whole;
    if constexpr (whole % 4 == 0 && L::kKeyWords % 4 == 0) {
#pragma unroll
      for (int w = 0; w < whole; w += 4) assign(to + w, read<uint4>(own + 4 * w));
    } else if constexpr (whole % 2 == 0 && L::kKeyWords % 2 == 0) {
#pragma unroll
      for (int w = 0; w < whole; w += 2) {
        const uint2 two = read<uint2>(own + 4 * w);
        to[w] = two.x;
        to[w + 1] = two.y;
      }
    } else {
#pragma unroll
      for (int w = 0; w < whole; ++w) to[w] = read<uint32_t>(own + 4 * w);
    }
    if constexpr (KeyWords::kHalf) {
      to[whole] = read<uint32_t>(row + 4 * (4 * whole + thread.t / 2)) >> 8 * (thread.t % 2);
    }
    if constexpr (KeyWords::kQuarter) {
      to[KeyWords::kCount - 1] = read<uint32_t>(row + 4 * (L::kKeyWords - 1)) >> 4 * thread.t;
    }
  }

  // Four pairs of a row of 16-bit elements, by column or by channel; zeros past the last.
  static LOGQUANT_DEVICE void read_columns(const Thread& thread, uint32_t (&to)[4], const unsigned char* row,
                                           int quad) {
    const unsigned char* const p = row + Columns::skewed(Columns::offset(thread.t, 4 * quad));
    if (4 * quad + 4 <= Columns::kCount) {
      assign(to, read<uint4>(p));
    } else {
      assign(to, read<uint2>(p));
    }
  }
  static LOGQUANT_DEVICE void read_channels(const Thread& thread, uint32_t (&to)[4], const unsigned char* row,
                                            int quad) {
    const unsigned char* const p = row + 2 * Channels::channel(thread.t, quad, 0);
    if (Channels::whole(quad)) {
      assign(to, read<uint4>(p));
    } else {
      assign(to, read<uint2>(p));
    }
  }
};

}  // namespace logquant::cuda::tensor
