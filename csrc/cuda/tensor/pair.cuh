// What the two warps of a pair tell each other: each computes S of 8 rows, then O of all 16 for half of the channels.
//
// Layout: shared memory, [from which warp][group][4 pairs][lane] of p'; factors and zeros by row.
// Parallelisation: a pair is a whole block; what one warp sends, the other may read after the next barrier.
// Memory traffic: shared memory only, 2 bytes a row, token and group.
#pragma once

#include "thread.cuh"

namespace logquant::cuda::tensor {

template <class K>
class PairExchange {
  using S = typename K::PageShape;
  using L = Layout<K>;
  static constexpr int kQuads = K::kTokenPairs / 4 * 32;  // of a group

 public:
  using Thread = ThreadInfo<K>;

  LOGQUANT_DEVICE void start(const Thread& thread) {
    if constexpr (!K::kPaired) return;
    const int own = thread.rank * K::kOwnGroups * kQuads + thread.lane;
    sent_at = ptx::keep(L::kExchangedWeights + 16 * own);
    received_at = ptx::keep(L::kExchangedWeights + 16 * (K::kOwnGroups * kQuads + 2 * thread.lane - own));
  }

  // p' of this warp's rows, for the other's n-th group; and p' of the other's rows for this warp's.
  LOGQUANT_DEVICE void send_weights(const Thread& thread, int n, const uint32_t (&p)[K::kTokenPairs]) const {
#pragma unroll
    for (int i = 0; i < K::kTokenPairs; i += 4) {
      quad(thread, sent_at, n, i) = {p[i], p[i + 1], p[i + 2], p[i + 3]};
    }
  }
  LOGQUANT_DEVICE void receive_weights(const Thread& thread, uint32_t (&p)[K::kTokenPairs], int n) const {
#pragma unroll
    for (int i = 0; i < K::kTokenPairs; i += 4) {
      const uint4 four = quad(thread, received_at, n, i);
      p[i] = four.x;
      p[i + 1] = four.y;
      p[i + 2] = four.z;
      p[i + 3] = four.w;
    }
  }

  // By how much the rows' references have moved; of the other's rows, once both are here.
  static LOGQUANT_DEVICE void exchange_factors(const Thread& thread, const float (&own)[2], float (&others)[2]) {
    float* const factors = reinterpret_cast<float*>(thread.shared + L::kExchangedFactors) + 2 * thread.t;
    if (thread.g == 0) factors[8 * thread.rank] = own[0], factors[8 * thread.rank + 1] = own[1];
    thread.sync_team();
#pragma unroll
    for (int r = 0; r < 2; ++r) others[r] = factors[8 * (1 - thread.rank) + r];
  }

  // sum p * zero of a group, of row 2t + r of this warp (or, with other = 1, of the other).
  static LOGQUANT_DEVICE void send_zeros(const Thread& thread, int group, int r, float zeros) {
    if (thread.g == 0) zeros_of(thread, group, thread.rank, r) = zeros;
  }
  static LOGQUANT_DEVICE float receive_zeros(const Thread& thread, int group, int r, int other) {
    return zeros_of(thread, group, other ^ thread.rank, r);
  }

 private:
  // Pairs i to i + 3 of the n-th group.
  static LOGQUANT_DEVICE uint4& quad(const Thread& thread, uint32_t at, int n, int i) {
    return *reinterpret_cast<uint4*>(thread.shared + at + 16 * (n * kQuads + i / 4 * 32));
  }
  static LOGQUANT_DEVICE float& zeros_of(const Thread& thread, int group, int from, int r) {
    return reinterpret_cast<float*>(thread.shared + L::kExchangedZeros)[16 * group + 8 * from + 2 * thread.t + r];
  }

  uint32_t sent_at = 0, received_at = 0;  // this lane's, from `shared` on
};

}  // namespace logquant::cuda::tensor
