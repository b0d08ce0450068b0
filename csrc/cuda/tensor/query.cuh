// The query rows as operand B: q for the products with parameters, and q * 2^-(b*i) for those with codes.
//
// Layout: fp16, scaled by a power of two a row into [1, 2); in registers where they fit, else in tables in shared
// memory, [tile][quad][lane]: four pairs of a row, in the order of Columns. Fitted formats keep q by channel (operand
// A, in the order of Channels) and q' by column, weighed by its digit. Parallelisation: a warp makes the operands of
// its rows; where tables are shared, the first team. Memory traffic: q once a block, or once a warp where it is kept in
// registers; the column map once.
#pragma once

#include "parameters.cuh"

namespace logquant::cuda::tensor {

template <class K>
class Query {
  using S = typename K::PageShape;
  using T = typename K::Scalar;
  using L = Layout<K>;
  using Columns = typename L::Columns;
  using Channels = typename L::Channels;

 public:
  using Thread = ThreadInfo<K>;

  // Fitted: digits must be marked.
  LOGQUANT_DEVICE void load(const Thread& thread) {
    using Parameters = FittedParameters<K>;
    const AttendArgs& a = thread.args;
    const int g = thread.g, t = thread.t, lane = thread.lane, row_total = thread.block.row_total;
    if constexpr (K::kPaired) {
      kept_query = ptx::keep(L::kQuery + thread.rank * L::kQueryTable + lane * 16);
      kept_scaled_query = ptx::keep(L::kScaledQuery + thread.rank * L::kScaledTable + lane * 16);
    }
    const float sign = a.scale > 0.0f ? 1.0f : a.scale < 0.0f ? -1.0f : 0.0f;
    const float size = a.scale != 0.0f ? fabsf(a.scale) * kLog2e : 1.0f;
#pragma unroll
    for (int u = 0; u < K::kScoreTiles; ++u) {
      const int row = thread.first_score_row() + 8 * u + g;
      const T* const q = thread.query(min(row, row_total - 1));
      const float use = row < row_total ? 1.0f : 0.0f;
      float most = 0.0f;
      for (int c = 2 * t; c < S::kDim; c += 8) {
        most = fmaxf(most, fmaxf(fabsf(Element<T>::wide(q[c])), fabsf(Element<T>::wide(q[c + 1]))) * use);
      }
      most = fmaxf(most, __shfl_xor_sync(ptx::kFullMask, most, 1));
      most = fmaxf(most, __shfl_xor_sync(ptx::kFullMask, most, 2));
      int exponent = most > 0.0f ? static_cast<int>(__float_as_uint(most) >> 23) - 127 : 0;
      exponent = min(max(exponent, -120), 120);
      const float down = power_of_two(-exponent) * sign;
      const float up = power_of_two(exponent) * size * (S::kFitted ? 1.0f / kScaleUnit : 1.0f);
      const auto pair = [&](int c, int d, float x, float y) {
        return row < row_total ? ptx::pack_f16(Element<T>::wide(q[c]) * (down * x), Element<T>::wide(q[d]) * (down * y))
                               : 0u;
      };
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        code_factor[u][r] = __shfl_sync(ptx::kFullMask, up, (2 * t + r) * 4);
        bias_factor[u][r] = code_factor[u][r] * (S::kFitted ? kZeroUnit : 1.0f);
        code_factor[u][r] *= kCodeUnit;
      }
      uint32_t* const table = reinterpret_cast<uint32_t*>(table_of(thread, L::kQuery, L::kQueryTable, u));
      uint32_t* const scaled_table = reinterpret_cast<uint32_t*>(table_of(thread, L::kScaledQuery, L::kScaledTable, u));
      if constexpr (L::kQueryInRegisters) {
#pragma unroll
        for (int n = 0; n < 4 * Columns::kQuads; ++n) {
          const int c = Columns::element(t, n);
          held[n] = n < Columns::kCount ? pair(c, c + 1, 1.0f, 1.0f) : 0u;
          scaled_held[n] = ptx::mul_f16x2(held[n], inverse_digit_weights<S::kKeyBits>(n));
        }
      } else if (thread.team == 0) {
        for (int n = 0; n < 4 * Columns::kQuads; ++n) {
          uint32_t x = 0;
          if (n < Columns::kCount) {
            const int j = Columns::element(t, n);
            if constexpr (S::kFitted) {
              const int16_t* const key_map = thread.block.key_map(a);
              const int first = key_map[j], second = key_map[j + 1];
              const int c = channel_of(first, S::kDim), d = channel_of(second, S::kDim);
              x = pair(c, d, Parameters::digit_weight(column_digit(first), Parameters::columns_of(thread, c)),
                       Parameters::digit_weight(column_digit(second), Parameters::columns_of(thread, d)));
            } else {
              x = pair(j, j + 1, 1.0f, 1.0f);
            }
          }
          if constexpr (!S::kFitted) table[(n / 4 * 32 + lane) * 4 + even_then_odd(n)] = x;
          scaled_table[(n / 4 * 32 + lane) * 4 + n % 4] = ptx::mul_f16x2(x, inverse_digit_weights<S::kKeyBits>(n));
        }
        if constexpr (S::kFitted) {
          for (int n = 0; n < 4 * Channels::kQuads; ++n) {
            const bool used = Channels::whole(n / 4) || n % 4 < 2;
            const int c = Channels::channel(t, n / 4, n % 4);
            table[(n / 4 * 32 + lane) * 4 + n % 4] = used ? pair(c, c + 1, 1.0f, 1.0f) : 0u;
          }
        }
      }
    }
  }

  // Of tile u, four pairs of columns times 2^-(b*i).
  LOGQUANT_DEVICE void scaled_quad(const Thread& thread, uint32_t (&to)[4], int u, int quad) const {
    if constexpr (L::kQueryInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = scaled_held[4 * quad + i];
    } else {
      read_scaled_query(thread, to, u, quad);
    }
  }
  // Plain formats: the even ones and the odd ones of four pairs of columns.
  LOGQUANT_DEVICE void even_and_odd(const Thread& thread, FragmentB& even, FragmentB& odd, int u, int quad) const {
    if constexpr (L::kQueryInRegisters) {
      even[0] = held[4 * quad], even[1] = held[4 * quad + 2];
      odd[0] = held[4 * quad + 1], odd[1] = held[4 * quad + 3];
    } else {
      uint32_t four[4];
      read_query(thread, four, u, quad);
      even[0] = four[0], even[1] = four[1];
      odd[0] = four[2], odd[1] = four[3];
    }
  }
  // Fitted formats: four pairs of channels.
  LOGQUANT_DEVICE void channel_quad(const Thread& thread, uint32_t (&to)[4], int u, int quad) const {
    read_query(thread, to, u, quad);
  }

  // A score is code_factor * (sum over codes) + bias_factor * bias (scores.cuh), of rows 8u + 2t and 8u + 2t + 1.
  float code_factor[K::kScoreTiles][2], bias_factor[K::kScoreTiles][2];

 private:
  // Where pair n stands in its quad in shared memory, so that the even ones and the odd ones are operands as read.
  static LOGQUANT_DEVICE constexpr int even_then_odd(int n) { return n % 4 / 2 + n % 2 * 2; }

  // A tile's table of those that start at `first`; this lane's quads are 512 bytes apart.
  static LOGQUANT_DEVICE unsigned char* table_of(const Thread& thread, int first, int bytes, int u) {
    return thread.shared + first + (u + thread.rank) * bytes;
  }
  LOGQUANT_DEVICE void read_query(const Thread& thread, uint32_t (&to)[4], int u, int quad) const {
    const unsigned char* const own =
        K::kPaired ? thread.shared + kept_query : table_of(thread, L::kQuery, L::kQueryTable, u) + thread.lane * 16;
    assign(to, read<uint4>(own + quad * 512));
  }
  LOGQUANT_DEVICE void read_scaled_query(const Thread& thread, uint32_t (&to)[4], int u, int quad) const {
    const unsigned char* const own = K::kPaired
                                         ? thread.shared + kept_scaled_query
                                         : table_of(thread, L::kScaledQuery, L::kScaledTable, u) + thread.lane * 16;
    assign(to, read<uint4>(own + quad * 512));
  }

  uint32_t held[L::kQueryInRegisters ? 4 * Columns::kQuads : 1];
  uint32_t scaled_held[L::kQueryInRegisters ? 4 * Columns::kQuads : 1];
  int kept_query, kept_scaled_query;  // of a pair: where this lane's quads are, from `shared` on
};

}  // namespace logquant::cuda::tensor
