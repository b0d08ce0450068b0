// Attention of many query rows (chunked prefill, the next turn of a conversation) over packed pages and the exact
// window, on tensor cores. Pages of any format are dequantised tile by tile into shared memory, never into global
// memory.
//
// A block is 16 query rows a warp (8 warps; 4 for dims over 128) of one KV head, and one split of its slots: pages
// first, then the window, in tiles of 64 tokens (32 for dims over 128). A tile's keys and values are brought to shared
// memory in the model's dtype, and used by all warps:
//   S = Q K^T    A: 16 rows of q, B: 8 keys, by ldmatrix
//   O += P V     A: the accumulators of S, packed in place; B: 8 channels of 16 values, by ldmatrix.trans
// with the online softmax between. The next page is copied by cp.async while a tile is worked on, where shared memory
// has room for it. Tiles that all rows of the block precede (causality) are skipped.
//
// Grid (splits, batch * KV heads, row tiles). Memory: each page once for every 128 rows (64 for dims over 128).
// Budget for dim 128: 96 KB of shared memory, so that a block also fits where an SM has only 100; no spills.

#include "attend.cuh"
#include "dequantizer.cuh"

namespace logquant::cuda {
namespace {

constexpr int kMostShared = 99 << 10;  // of a block on sm_86, sm_89 and sm_120

template <int dim>
struct Tiles {
  static constexpr int kWarps = dim <= 128 ? 8 : 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kTokens = dim <= 128 ? 64 : 32;
  static constexpr int kPitch = dim + 8;  // elements; 16 bytes more than a row, against bank conflicts
  static constexpr int kQueries = 0, kKeys = 2 * kRows * kPitch, kValues = kKeys + 2 * kTokens * kPitch;
  static constexpr int kFree = kValues + 2 * kTokens * kPitch;  // the column table, then the staged page
};

constexpr int round_up16(int x) { return (x + 15) / 16 * 16; }

template <int dim>
int table_bytes(const AttendArgs& a) {
  return a.key_map.data == nullptr ? 0 : round_up16(column_table_bytes(a.format));
}
// Pages are staged where they fit beside the tiles and may be copied 16 bytes at a time.
template <int dim>
bool is_staged(const AttendArgs& a) {
  const int64_t strides = a.pages.batch_stride | a.pages.head_stride | a.pages.page_stride | a.format.words();
  return reinterpret_cast<uintptr_t>(a.pages.data) % 16 == 0 && strides % 4 == 0 &&
         Tiles<dim>::kFree + table_bytes<dim>(a) + 4 * a.format.words() <= kMostShared;
}

struct Aligned {
  bool q, k, v;  // rows may be read four elements at a time
};

template <class T, int dim>
class Prefill {
  using L = Tiles<dim>;
  static constexpr int kKeyTiles = L::kTokens / 8, kChannelTiles = dim / 8;

 public:
  LOGQUANT_DEVICE Prefill(const AttendArgs& args, const Aligned& rows_aligned, bool stage_pages, int table,
                          unsigned char* shared)
      : a(args),
        aligned(rows_aligned),
        staged(stage_pages),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4),
        block(args, L::kRows),
        queries(reinterpret_cast<T*>(shared + L::kQueries)),
        keys(reinterpret_cast<T*>(shared + L::kKeys)),
        values(reinterpret_cast<T*>(shared + L::kValues)),
        column_of(table ? reinterpret_cast<uint16_t*>(shared + L::kFree) : nullptr),
        stage(reinterpret_cast<uint32_t*>(shared + L::kFree + table)) {}

  LOGQUANT_DEVICE void run() {
    const PageFormat& f = a.format;
    const int pages = used_pages(a, block.batch), tokens = used_window_tokens(a, block.batch);
    const int page_tiles = f.page_tokens > L::kTokens ? f.page_tokens / L::kTokens : 1;
    const int tile_tokens = f.page_tokens < L::kTokens ? f.page_tokens : L::kTokens;
    const int tiles = pages * page_tiles + (tokens + L::kTokens - 1) / L::kTokens;
    const int split = blockIdx.x, splits = gridDim.x;
    const int begin = static_cast<int>(int64_t{tiles} * split / splits);
    const int end = static_cast<int>(int64_t{tiles} * (split + 1) / splits);

    if (begin < end && begin < pages * page_tiles) fetch(begin / page_tiles);
    load_queries();
    if (column_of != nullptr) {
      fill_column_table(f, block.key_map(a), column_of, L::kThreads);
    }
    for (int i = threadIdx.x; i < 2 * L::kTokens * L::kPitch / 2; i += L::kThreads) {  // padding of channels and tokens
      reinterpret_cast<uint32_t*>(keys)[i] = 0;
    }
    find_last_position();
#pragma unroll
    for (int r = 0; r < 2; ++r) reference[r] = kLowest, sum[r] = 0.0f;
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[j][i] = 0.0f;
    }

    for (int tile = begin; tile < end; ++tile) {
      const bool packed = tile < pages * page_tiles;
      const int page = tile / page_tiles;
      const int from = packed ? tile % page_tiles * tile_tokens : (tile - pages * page_tiles) * L::kTokens;
      const int count = packed ? tile_tokens : min(L::kTokens, tokens - from);
      const int slot = static_cast<int>(packed ? page : a.page_count) * f.page_tokens + from;
      if (packed) ptx::cp_async_wait<0>();
      // All threads see the staged page, and all warps are done with the last tile.
      const bool seen = __syncthreads_or(precedes_last(slot, count)) != 0;
      if (seen && packed) {
        const uint32_t* const words = staged ? stage : block.page(a, page);
        dequantize_keys(f, words, column_of, from, count, keys, L::kPitch, true, L::kThreads);
        dequantize_values(f, words, from, count, 1, rotated_unit(), values, L::kPitch, true, L::kThreads);
      } else if (seen) {
        copy_rows(a.window_k, f.head_dim, from, count, aligned.k, keys);
        copy_rows(a.window_v, f.value_dim, from, count, aligned.v, values);
      }
      if (seen && count < L::kTokens) clear_rows(count);
      __syncthreads();
      const bool holds_nans = seen && __syncthreads_or(holds_not_finite()) != 0;
      if (packed && tile + 1 < end && (tile + 1) % page_tiles == 0 && page + 1 < pages) fetch(page + 1);
      if (seen) attend_tile(slot, count, holds_nans);
      // Pages hold rotated values and the window does not: once the split's pages are summed, the sums are rotated
      // back.
      if (packed && (tile + 1 == end || tile + 1 == pages * page_tiles)) rotate_back();
    }
    ptx::cp_async_wait<0>();
    if (gridDim.x == 1) {
      write_result();
    } else {
      write_part(split);
    }
  }

 private:
  LOGQUANT_DEVICE void fetch(int page) const {
    if (staged) {
      const uint32_t* const from = block.page(a, page);
      for (int i = threadIdx.x; i < a.format.words() / 4; i += L::kThreads)
        ptx::cp_async16(stage + 4 * i, from + 4 * i);
    }
    ptx::cp_async_commit();
  }

  LOGQUANT_DEVICE void load_queries() const {
    const T* const q = static_cast<const T*>(a.q.data);
    for (int i = threadIdx.x; i < L::kRows * dim / 4; i += L::kThreads) {
      const int row = block.first_row + i / (dim / 4), c = i % (dim / 4) * 4;
      Float4 x = {};
      if (row < block.row_total && c < a.format.head_dim) {
        x = load4(q + query_offset(a, block.row(a, row)) + c, aligned.q);
      }
      store4(queries + i / (dim / 4) * L::kPitch + c, x, true);
    }
  }

  // Of the block's rows: with causality, later tokens need not be looked at.
  LOGQUANT_DEVICE void find_last_position() {
    last_position = 0x7FFFFFFF;
    if (a.query_positions == nullptr) return;
    last_position = -1;
    const int group = static_cast<int>(a.group), rows = min(L::kRows, block.row_total - block.first_row);
    const int32_t* const positions = a.query_positions + block.batch * a.query_positions_batch_stride;
    for (int query = block.first_row / group; query <= (block.first_row + rows - 1) / group; ++query) {
      last_position = max(last_position, positions[query]);
    }
  }
  LOGQUANT_DEVICE bool precedes_last(int slot, int count) const {
    if (a.query_positions == nullptr) return true;
    bool any = false;
    for (int i = threadIdx.x; i < count; i += L::kThreads) {
      const int position =
          a.positions != nullptr ? a.positions[block.batch * a.positions_batch_stride + slot + i] : slot + i;
      any = any || (position >= 0 && position <= last_position);
    }
    return any;
  }

  LOGQUANT_DEVICE void copy_rows(const Tokens& x, int channels, int from, int count, bool rows_aligned, T* to) const {
    const T* const rows = head_of<T>(block, x) + from * x.token_stride;
    for (int i = threadIdx.x; i < count * (channels / 4); i += L::kThreads) {
      const int token = i / (channels / 4), c = i % (channels / 4) * 4;
      store4(to + token * L::kPitch + c, load4(rows + token * x.token_stride + c, rows_aligned), true);
    }
  }
  // What the last tile left in rows that this one does not have must not become 0 * NaN.
  LOGQUANT_DEVICE void clear_rows(int from) const {
    for (int i = threadIdx.x; i < (L::kTokens - from) * (L::kPitch / 4); i += L::kThreads) {
      store4(values + from * L::kPitch + 4 * i, Float4{}, true);
    }
  }
  LOGQUANT_DEVICE bool holds_not_finite() const {
    bool any = false;
    for (int i = threadIdx.x; i < L::kTokens * (L::kPitch / 8); i += L::kThreads) {
      const uint4 words = reinterpret_cast<const uint4*>(values)[i];
      any = any || (not_finite<T>(words.x) | not_finite<T>(words.y) | not_finite<T>(words.z) | not_finite<T>(words.w));
    }
    return any;
  }

  LOGQUANT_DEVICE void attend_tile(int slot, int count, bool holds_nans) {
    const int warp = threadIdx.x / 32;
    float s[kKeyTiles][4];
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
    }
    const T* const own = queries + (warp * 16 + lane % 16) * L::kPitch + lane / 16 * 8;
    const T* const key = keys + (lane / 16 * 8 + lane % 8) * L::kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      uint32_t q[4];
      ptx::ldmatrix(q, own + 16 * k);
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t two[4];
        ptx::ldmatrix(two, key + n * 8 * L::kPitch + 16 * k);
        ptx::mma<T>(s[n], q, {two[0], two[1]});
        ptx::mma<T>(s[n + 1], q, {two[2], two[3]});
      }
    }
    // Lane 4g + t has of rows g and g + 8 the tokens 8n + 2t and 8n + 2t + 1.
    const float factor = a.scale * kLog2e;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = block.first_row + warp * 16 + g + 8 * (i / 2);
      const Row where = block.row(a, min(row, block.row_total - 1));
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const int token = 8 * n + 2 * t + i % 2;
        s[n][i] *= factor;
        if (token >= count || row >= block.row_total) {
          s[n][i] = -INFINITY;
        } else if (!a.plain) {
          s[n][i] = seen_score(a, where, slot + token, s[n][i]);
        }
      }
    }
    if (holds_nans) poison_rows(s);
    uint32_t p[kKeyTiles][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = reference[r];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) most = fmaxf(most, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      most = fmaxf(most, __shfl_xor_sync(ptx::kFullMask, most, 1));
      most = fmaxf(most, __shfl_xor_sync(ptx::kFullMask, most, 2));
      const float less = ptx::exp2(reference[r] - most);
      reference[r] = most;
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const float x = ptx::exp2(s[n][2 * r] - most), y = ptx::exp2(s[n][2 * r + 1] - most);
        total += x + y;
        p[n][r] = Operand<T>::pack(x, y);
      }
      sum[r] = fmaf(sum[r], less, total);
#pragma unroll
      for (int j = 0; j < kChannelTiles; ++j) out[j][2 * r] *= less, out[j][2 * r + 1] *= less;
    }
    const T* const value = values + (lane % 16) * L::kPitch + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < L::kTokens / 16; ++k) {
      const uint32_t weights[4] = {p[2 * k][0], p[2 * k][1], p[2 * k + 1][0], p[2 * k + 1][1]};
#pragma unroll
      for (int j = 0; j < kChannelTiles; j += 2) {
        uint32_t two[4];
        ptx::ldmatrix_trans(two, value + k * 16 * L::kPitch + 8 * j);
        if (holds_nans) {
#pragma unroll
          for (int i = 0; i < 4; ++i) two[i] &= ~not_finite<T>(two[i]);
        }
        ptx::mma<T>(out[j], weights, {two[0], two[1]});
        ptx::mma<T>(out[j + 1], weights, {two[2], two[3]});
      }
    }
  }

  // Rotated values are up to eight times as large as values, and then too large for fp16: they are kept divided by 8.
  LOGQUANT_DEVICE float rotated_unit() const { return a.format.hadamard_block() > 1 ? 0.125f : 1.0f; }

  // Channel 8 j + 2 t + i % 2 is out[j][i]: blocks of `rotated` in this layout.
  LOGQUANT_DEVICE void rotate_back() {
    const int block = a.format.hadamard_block();
    if (block == 1) return;
    const float factor = hadamard_factor(block) / rotated_unit();
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float low = out[j][i], high = out[j][i + 1];
        out[j][i] = (low + high) * factor;
        out[j][i + 1] = (low - high) * factor;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          const float other = __shfl_xor_sync(ptx::kFullMask, out[j][i], step);
          out[j][i] = (t & step) != 0 ? other - out[j][i] : out[j][i] + other;
        }
      }
    }
#pragma unroll
    for (int step = 1; step <= 4; step *= 2) {
      if (8 * step >= block) continue;
#pragma unroll
      for (int j = 0; j < kChannelTiles; ++j) {
        if ((j & step) != 0 || j + step >= kChannelTiles) continue;  // past the value's last block, all is 0
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float low = out[j][i], high = out[j + step][i];
          out[j][i] = low + high;
          out[j + step][i] = low - high;
        }
      }
    }
  }

  // A weight of 0 times a NaN would be a NaN for rows that do not see the token: NaNs are left out of the products, and
  // this puts one into each output that does see one.
  LOGQUANT_DEVICE void poison_rows(const float (&s)[kKeyTiles][4]) {
    const T* const value = values + (lane % 16) * L::kPitch + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < L::kTokens / 16; ++k) {
      uint32_t seen[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const x = s[2 * k + i / 2] + 2 * (i % 2);
        seen[i] = seen_operand<T>(x[0], x[1]);
      }
      for (int j = 0; j < kChannelTiles; j += 2) {
        uint32_t nans[4];
        ptx::ldmatrix_trans(nans, value + k * 16 * L::kPitch + 8 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i) nans[i] = not_finite<T>(nans[i]) & Operand<T>::kOnes;
        float nans_seen[2][4] = {};
        ptx::mma<T>(nans_seen[0], seen, {nans[0], nans[1]});
        ptx::mma<T>(nans_seen[1], seen, {nans[2], nans[3]});
#pragma unroll
        for (int all = 0; all < kChannelTiles; all += 2) {  // so that j indexes no registers
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (all == j && nans_seen[i / 4][i % 4] > 0.0f) out[all + i / 4][i % 4] = NAN;
          }
        }
      }
    }
  }

  LOGQUANT_DEVICE void write_part(int split) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = row_sum(r);
      const int row = block.first_row + threadIdx.x / 32 * 16 + g + 8 * r;
      if (row >= block.row_total) continue;
      const int64_t at = block.partial_index(a, split, row);
      float* const to = a.partial_out + at * a.format.value_dim;
#pragma unroll
      for (int j = 0; j < kChannelTiles; ++j) {
        const int c = 8 * j + 2 * t;
        if (c < a.format.value_dim) to[c] = out[j][2 * r], to[c + 1] = out[j][2 * r + 1];
      }
      if (t == 0) write_partial_sums(a, at, reference[r], total);
    }
  }

  LOGQUANT_DEVICE void write_result() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = row_sum(r);
      const int index = block.first_row + threadIdx.x / 32 * 16 + g + 8 * r;
      if (index >= block.row_total) continue;
      const Row row = block.row(a, index);
      float most = reference[r];
      if (a.sinks != nullptr) {
        const float sink = a.sinks[row.head] * kLog2e;
        most = fmaxf(most, sink);
        total = total * ptx::exp2(reference[r] - most) + ptx::exp2(sink - most);
      }
      const float factor = total == 0.0f ? 0.0f : ptx::exp2(reference[r] - most) / total;
      const int64_t out_row = (int64_t{block.batch} * a.kv_heads * a.group + row.head) * a.queries + row.query;
      T* const to = static_cast<T*>(a.out) + out_row * a.format.value_dim;
#pragma unroll
      for (int j = 0; j < kChannelTiles; ++j) {
        const int c = 8 * j + 2 * t;
        if (c < a.format.value_dim) {
          *reinterpret_cast<uint32_t*>(to + c) = Operand<T>::pack(out[j][2 * r] * factor, out[j][2 * r + 1] * factor);
        }
      }
      if (t == 0) a.lse[out_row] = total == 0.0f ? -INFINITY : (most + log2f(total)) / kLog2e;
    }
  }

  LOGQUANT_DEVICE float row_sum(int r) const {
    const float x = sum[r] + __shfl_xor_sync(ptx::kFullMask, sum[r], 1);
    return x + __shfl_xor_sync(ptx::kFullMask, x, 2);
  }

  const AttendArgs& a;
  const Aligned aligned;
  const bool staged;
  const int lane, g, t;
  const BlockRows block;
  T *const queries, *const keys, *const values;  // shared, [row or token][kPitch]
  uint16_t* const column_of;                     // shared, or nullptr without a column map
  uint32_t* const stage;                         // shared: the next page
  int last_position = 0;
  float reference[2], sum[2];  // of rows g and g + 8; sums of this lane's tokens
  float out[kChannelTiles][4];
};

template <class T, int dim>
__global__ void __launch_bounds__(Tiles<dim>::kThreads, 1)
    attend_prefill_kernel(__grid_constant__ const AttendArgs args, Aligned aligned, bool staged, int table) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  Prefill<T, dim>(args, aligned, staged, table, shared).run();
}

template <class T, int dim>
cudaError_t launch(const AttendArgs& args, cudaStream_t stream) {
  using L = Tiles<dim>;
  const dim3 grid(args.page_splits, args.batch * args.kv_heads, (row_count(args) + L::kRows - 1) / L::kRows);
  const Aligned aligned{rows_aligned(args.q, 2), rows_aligned(args.window_k, 2), rows_aligned(args.window_v, 2)};
  const bool staged = is_staged<dim>(args);
  const int table = table_bytes<dim>(args);
  return ptx::launch(&attend_prefill_kernel<T, dim>, grid, L::kThreads,
                     L::kFree + table + (staged ? 4 * args.format.words() : 0), stream, args, aligned, staged, table);
}

// Calls f with the smallest compiled dimension that holds keys and values.
template <class F>
auto with_dim(const PageFormat& format, F f) {
  const int dim = format.head_dim > format.value_dim ? format.head_dim : format.value_dim;
  if (dim <= 64) return f(std::integral_constant<int, 64>{});
  if (dim <= 96) return f(std::integral_constant<int, 96>{});
  if (dim <= 128) return f(std::integral_constant<int, 128>{});
  if (dim <= 192) return f(std::integral_constant<int, 192>{});
  return f(std::integral_constant<int, 256>{});
}

}  // namespace

bool prefill_handles(const AttendArgs& args) {
  const PageFormat& f = args.format;
  return args.q.dtype != Dtype::kFloat32 && f.head_dim <= 256 && f.value_dim <= 256;
}

int prefill_rows(const AttendArgs& args) {
  return with_dim(args.format, [](auto dim) { return Tiles<decltype(dim)::value>::kRows; });
}

int64_t prefill_tiles(const AttendArgs& args) {
  return with_dim(args.format, [&](auto dim) {
    constexpr int kTokens = Tiles<decltype(dim)::value>::kTokens;
    const int of_page = args.format.page_tokens > kTokens ? args.format.page_tokens / kTokens : 1;
    return args.page_count * of_page + (args.window_tokens + kTokens - 1) / kTokens;
  });
}

cudaError_t attend_prefill(const AttendArgs& args, cudaStream_t stream) {
  return with_dim(args.format, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    return args.q.dtype == Dtype::kFloat16 ? launch<__half, kDim>(args, stream)
                                           : launch<__nv_bfloat16, kDim>(args, stream);
  });
}

}  // namespace logquant::cuda
