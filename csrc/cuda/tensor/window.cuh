// Attention of a block's rows over its split of the exact window.
//
// Layout: tokens are operand A of S, as in pages; straight from global memory, a lane takes 8 of every 32 channels,
// then 4 of the last 16, the same order of k for q and keys. For O, movmatrix.trans turns values into operand A.
// Parallelisation: a team 16 tokens at a time. Of a pair, each warp does its eight rows alone.
// Memory traffic: the window once; where somebody asks what its slots are given, 4 bytes a token and row. q once a warp
// where it is kept in registers; where it would take too many, it is read again (from L1) for each 16 tokens, and keys
// and values come in parts.
#pragma once

#include "mask.cuh"
#include "softmax.cuh"

namespace logquant::cuda::tensor {

// Which channel accumulator row g (h = 0) or g + 8 (h = 1) of the m-tile j is.
template <class K>
LOGQUANT_DEVICE int window_channel(int g, int j, int h) {
  return j / 2 < K::PageShape::kValueDim / 32 ? 32 * (j / 2) + 8 * (g / 2) + 4 * (j % 2) + 2 * h + g % 2
                                              : 16 * j + 4 * (g / 2) + 2 * h + g % 2;
}

template <class K>
struct WindowAttention {
  using S = typename K::PageShape;
  using T = typename K::Scalar;
  using Thread = ThreadInfo<K>;
  using Softmax = OnlineSoftmax<K>;

  static LOGQUANT_DEVICE void attend(const Thread& thread, Softmax& softmax, int split) {
    const AttendArgs& a = thread.args;
    RowPart<kKeepQuery ? S::kDim : 16> q[K::kScoreTiles];
    float totals[K::kScoreTiles][4];
#pragma unroll
    for (int u = 0; u < K::kScoreTiles; ++u) {
      if constexpr (kKeepQuery) {
        const int row = score_row(thread, u);
        q[u].load(thread.query(min(row, thread.block.row_total - 1)), thread.t, row < thread.block.row_total);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) totals[u][i] = 0.0f;
    }
    const int tokens = used_window_tokens(a, thread.block.batch);
    const T* const keys = head_of<T>(thread.block, a.window_k);
    const T* const values = head_of<T>(thread.block, a.window_v);
    for (int base = (split * K::kTeams + thread.team) * 16; base < tokens; base += a.window_splits * K::kTeams * 16) {
      float scores[K::kScoreTiles][4] = {};
      add_scores(thread, scores, q, keys, base, tokens);
      FragmentB p[K::kScoreTiles];
      FragmentB seen[K::kScoreTiles];
#pragma unroll
      for (int u = 0; u < K::kScoreTiles; ++u) {
        mask(thread, scores[u], u, base, tokens);
        if (a.window_scores != nullptr) keep(thread, scores[u], u, base, tokens);
#pragma unroll
        for (int h = 0; h < 2; ++h) seen[u][h] = seen_operand<T>(scores[u][2 * h], scores[u][2 * h + 1]);
        weigh(softmax, p[u], scores[u], u, totals[u]);
        const FragmentA ones = {Operand<T>::kOnes, Operand<T>::kOnes, Operand<T>::kOnes, Operand<T>::kOnes};
        ptx::mma<T>(totals[u], ones, p[u]);
      }
      add_values(thread, softmax, p, seen, values, base, tokens);
    }
#pragma unroll
    for (int u = 0; u < K::kScoreTiles; ++u) {
#pragma unroll
      for (int r = 0; r < 2; ++r) softmax.sum[u][r] = totals[u][r];
    }
  }

  // `dim` channels of a token or of q that a lane reads.
  template <int dim>
  struct RowPart {
    static constexpr int kWords = dim / 8;
    uint32_t words[kWords];
    LOGQUANT_DEVICE void load(const T* row, int t, bool ok) {
#pragma unroll
      for (int n = 0; n < kWords; ++n) words[n] = 0;
      if (!ok) return;
#pragma unroll
      for (int c = 0; c + 32 <= dim; c += 32) assign(words + c / 8, ptx::load<uint4>(row + c + 8 * t));
      if constexpr (dim % 32 != 0) {
        const uint2 two = ptx::load<uint2>(row + dim - 16 + 4 * t);
        words[kWords - 2] = two.x;
        words[kWords - 1] = two.y;
      }
    }
  };

  static constexpr bool kKeepQuery = S::kDim * K::kScoreTiles <= 128;
  // Channels that are read at once.
  template <int dim>
  static constexpr int kChunk = kKeepQuery ? dim : 64;

  // Calls f<first, count>() for each part of the channels.
  template <int dim, int first = 0, class F>
  static LOGQUANT_DEVICE void for_chunks(const F& f) {
    constexpr int count = dim - first < kChunk<dim> ? dim - first : kChunk<dim>;
    f.template operator()<first, count>();
    if constexpr (first + count < dim) for_chunks<dim, first + count>(f);
  }

  // The row of q that this lane reads.
  static LOGQUANT_DEVICE int score_row(const Thread& thread, int u) {
    return thread.first_score_row() + 8 * u + thread.g;
  }

  static LOGQUANT_DEVICE void add_scores(const Thread& thread, float (&scores)[K::kScoreTiles][4],
                                         const RowPart<kKeepQuery ? S::kDim : 16> (&q)[K::kScoreTiles], const T* keys,
                                         int base, int tokens) {
    for_chunks<S::kDim>([&]<int first, int count>() __attribute__((always_inline)) {
      RowPart<count> k[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = base + thread.g + 8 * h;
        k[h].load(keys + token * thread.args.window_k.token_stride + first, thread.t, token < tokens);
      }
#pragma unroll
      for (int u = 0; u < K::kScoreTiles; ++u) {
        RowPart<kKeepQuery ? 16 : count> part;
        if constexpr (!kKeepQuery) {
          const int row = score_row(thread, u), row_total = thread.block.row_total;
          part.load(thread.query(min(row, row_total - 1)) + first, thread.t, row < row_total);
        }
        const uint32_t* const own = kKeepQuery ? q[u].words : part.words;
#pragma unroll
        for (int n = 0; n < count / 8; n += 2) {
          const FragmentA operand = {k[0].words[n], k[1].words[n], k[0].words[n + 1], k[1].words[n + 1]};
          const FragmentB rows = {own[n], own[n + 1]};
          ptx::mma<T>(scores[u], operand, rows);
        }
      }
    });
  }

  // Scores in units of log2; -inf past the last token and where a row does not see one.
  static LOGQUANT_DEVICE void mask(const Thread& thread, float (&s)[4], int u, int base, int tokens) {
    const AttendArgs& a = thread.args;
    const int first_slot = static_cast<int>(a.page_count) * S::kTokens;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = base + thread.g + 8 * (i / 2);
      const int row = thread.first_score_row() + 8 * u + 2 * thread.t + i % 2;
      s[i] *= a.scale * kLog2e;
      if (!a.plain && token < tokens && row < thread.block.row_total) {
        s[i] = seen_score(a, thread.block.row(a, row), first_slot + token, s[i]);
      }
      if (token >= tokens) s[i] = -INFINITY;
    }
  }

  // For what the window's slots are given (attend.cu).
  static LOGQUANT_DEVICE void keep(const Thread& thread, const float (&s)[4], int u, int base, int tokens) {
    const int token = base + thread.g, row = thread.first_score_row() + 8 * u + 2 * thread.t;
    float* const kept = thread.block.window_scores(thread.args, row) + token;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i % 2, more = 8 * (i / 2);
      if (row + r < thread.block.row_total && token + more < tokens)
        kept[r * static_cast<int>(thread.args.window_tokens) + more] = s[i];
    }
  }

  // Weights of the scores as operand B, relative to references that their maxima may raise.
  static LOGQUANT_DEVICE void weigh(Softmax& softmax, FragmentB& p, float (&s)[4], int u, float (&totals)[4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = softmax.raise(u, r, max_over_tokens(fmaxf(s[r], s[2 + r])));
      totals[r] *= factor;
#pragma unroll
      for (int j = u * K::kChannelTiles; j < (u + 1) * K::kChannelTiles; ++j) {
        softmax.out[j][r] *= factor, softmax.out[j][2 + r] *= factor;
      }
      s[r] = ptx::exp2(s[r] - softmax.reference[u][r]);
      s[2 + r] = ptx::exp2(s[2 + r] - softmax.reference[u][r]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) p[h] = ptx::movmatrix_trans(Operand<T>::pack(s[2 * h], s[2 * h + 1]));
  }

  static LOGQUANT_DEVICE void add_values(const Thread& thread, Softmax& softmax, const FragmentB (&p)[K::kScoreTiles],
                                         const FragmentB (&seen)[K::kScoreTiles], const T* values, int base,
                                         int tokens) {
    for_chunks<S::kValueDim>([&]<int first, int count>() __attribute__((always_inline)) {
      RowPart<count> v[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = base + thread.g + 8 * h;
        v[h].load(values + token * thread.args.window_v.token_stride + first, thread.t, token < tokens);
      }
      if (!thread.args.plain) exclude_unseen<first / 16>(softmax, v, seen);
#pragma unroll
      for (int j = 0; j < count / 16; ++j) {  // words 2j (rows 0-7) and 2j + 1 (rows 8-15) of lanes' values
        const FragmentA operand = {ptx::movmatrix_trans(v[0].words[2 * j]), ptx::movmatrix_trans(v[0].words[2 * j + 1]),
                                   ptx::movmatrix_trans(v[1].words[2 * j]),
                                   ptx::movmatrix_trans(v[1].words[2 * j + 1])};
#pragma unroll
        for (int u = 0; u < K::kScoreTiles; ++u) {
          ptx::mma<T>(softmax.out[u * K::kChannelTiles + first / 16 + j], operand, p[u]);
        }
      }
    });
  }

  // Takes values that are not finite out of the operands (mask.cuh).
  template <int first_tile, int count>
  static LOGQUANT_DEVICE void exclude_unseen(Softmax& softmax, RowPart<count> (&v)[2],
                                             const FragmentB (&seen_by_token)[K::kScoreTiles]) {
    bool any = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int n = 0; n < count / 8; ++n) any = any || not_finite<T>(v[h].words[n]) != 0;
    }
    if (!__any_sync(ptx::kFullMask, any)) return;
    FragmentB seen[K::kScoreTiles];
#pragma unroll
    for (int u = 0; u < K::kScoreTiles; ++u) {
#pragma unroll
      for (int h = 0; h < 2; ++h) seen[u][h] = ptx::movmatrix_trans(seen_by_token[u][h]);
    }
#pragma unroll
    for (int j = 0; j < count / 16; ++j) {
      FragmentA nans;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t& word = v[i / 2].words[2 * j + i % 2];
        const uint32_t mask = not_finite<T>(word);
        word &= ~mask;
        nans[i] = ptx::movmatrix_trans(mask & Operand<T>::kOnes);
      }
#pragma unroll
      for (int u = 0; u < K::kScoreTiles; ++u) {
        float nans_seen[4] = {};
        ptx::mma<T>(nans_seen, nans, seen[u]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (nans_seen[i] > 0.0f) softmax.out[u * K::kChannelTiles + first_tile + j][i] = NAN;
        }
      }
    }
  }
};

}  // namespace logquant::cuda::tensor
