// Attention over pages of any format and an exact window of any dtype, in fp32 on CUDA cores.
//
// The path for formats without a tensor-core kernel (tensor/) and for float32 models. A block takes a part of
// the slots of one KV head for kRows query rows, one tile at a time: a page, or 128 tokens of the window.
//   1. threads are tokens: scores; the page's scales are folded into q, its zeros into one constant a row
//   2. the tile's maximum moves the reference exponent
//   3. threads are channels: out += weight * value, kept in shared memory between tiles
// Pages may hold rotated values, the window does not: a part of the pages ends with its sums rotated back.
// Grid (splits, batch * KV heads, row tiles), 128 threads. Memory: each page once, 16 bytes of partial sums a channel.
// Budget: 128 registers; 4 * kRows * (2 D + Dv + 128 + 9) + 4 D bytes of shared memory.

#include "attend.cuh"
#include "params.cuh"

namespace logquant::cuda {
namespace {

constexpr int kThreads = 128;  // at least page_tokens
constexpr int kWarps = kThreads / 32;

template <int rows>
int shared_bytes(const PageFormat& f) {
  return 4 * rows * (2 * f.head_dim + f.value_dim + kThreads + 2 * kWarps + 1) + 4 * f.head_dim;
}

template <class T, int rows>
class GeneralAttention {
 public:
  LOGQUANT_DEVICE GeneralAttention(const AttendArgs& args, unsigned char* shared)
      : a(args),
        block(args, rows),
        q(reinterpret_cast<float*>(shared)),
        scaled_q(q + rows * args.format.head_dim),
        out(scaled_q + rows * args.format.head_dim),
        weights(out + rows * args.format.value_dim),
        warp_max(weights + rows * kThreads),
        constants(warp_max + rows * kWarps),
        rescale(constants + rows * kWarps),
        code_weights(rescale + rows),
        map(args.key_map.data == nullptr ? nullptr : block.key_map(args)) {}

  LOGQUANT_DEVICE void run() {
    const int dim = a.format.head_dim;
    for (int i = threadIdx.x; i < rows * dim; i += kThreads) {
      const int c = i / rows, row = block.first_row + i % rows;
      float x = 0.0f;
      if (row < block.row_total) {
        x = Element<T>::wide(static_cast<const T*>(a.q.data)[query_offset(a, block.row(a, row)) + c]);
      }
      q[i] = x * a.scale * kLog2e;
    }
    for (int i = threadIdx.x; i < rows * a.format.value_dim; i += kThreads) out[i] = 0.0f;
    for (int c = threadIdx.x; c < dim; c += kThreads) {
      int columns = map == nullptr ? 1 : 0;
      for (int j = 0; map != nullptr && j < a.format.key_columns; ++j) columns += channel_of(map[j], dim) == c;
      code_weights[c] = digit_weight(a.format, 0, columns);
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      reference[r] = -INFINITY;
      sum[r] = 0.0f;
    }
    __syncthreads();

    const int split = blockIdx.x;
    if (split < a.page_splits) {
      const int pages = used_pages(a, block.batch);
      for (int p = split; p < pages; p += a.page_splits) page_tile(p);
      rotate_back();
    } else {
      const int tokens = used_window_tokens(a, block.batch);
      for (int t = (split - a.page_splits) * kThreads; t < tokens; t += a.window_splits * kThreads) {
        window_tile(t, min(kThreads, tokens - t));
      }
    }
    store(split);
  }

 private:
  LOGQUANT_DEVICE void page_tile(int p) {
    const PageFormat& f = a.format;
    const int dim = f.head_dim, self = threadIdx.x, bits = f.key_bits;
    const uint32_t* const page = block.page(a, p);
    float zeros[rows] = {};
    for (int c = self; c < dim; c += kThreads) {
      const Params p = key_params_at(f, page, c);
      const float scale = p.scale * code_weights[c];
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        scaled_q[c * rows + r] = q[c * rows + r] * scale;
        zeros[r] = fmaf(q[c * rows + r], p.zero, zeros[r]);
      }
    }
    sum_warps(zeros, constants);
    __syncthreads();

    float score[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) score[r] = total(constants, r);
    if (self < f.page_tokens) {
      const int elements = elements_per_word(bits);
      for (int w = 0; w < f.key_code_words(); ++w) {
        const uint32_t word = page[f.key_codes() + self * f.key_code_words() + w];
        for (int e = 0; e < elements; ++e) {
          int c = w * elements + e;
          uint32_t code = extract(word, bits, e);
          if (map != nullptr) {
            const int entry = map[c];
            c = channel_of(entry, dim);
            code <<= bits * column_digit(entry);
          }
          const float x = static_cast<float>(code);
#pragma unroll
          for (int r = 0; r < rows; ++r) score[r] = fmaf(scaled_q[c * rows + r], x, score[r]);
        }
      }
    }
    softmax(score, p * f.page_tokens, f.page_tokens, nullptr);

    const int value_elements = elements_per_word(f.value_bits);
    for (int c = self; c < f.value_dim; c += kThreads) {
      const int group = c / f.value_group * f.page_tokens;
      float acc[rows];
      begin(acc, c);
      for (int row = 0; row < f.value_code_rows(); ++row) {
        const uint32_t word = page[f.value_codes() + row * f.value_dim + c];
        for (int e = 0; e < value_elements; ++e) {
          const int t = row * value_elements + e;
          const float code = static_cast<float>(value_code(f, page, word, c, t));
          const Params p = value_params_at(f, page, group + t);
          add(acc, t, fmaf(p.scale, code, p.zero));
        }
      }
      end(acc, c);
    }
    __syncthreads();
  }

  LOGQUANT_DEVICE void window_tile(int first, int count) {
    const PageFormat& f = a.format;
    const int self = threadIdx.x;
    const T* const keys = head_of<T>(block, a.window_k) + first * a.window_k.token_stride;
    const T* const values = head_of<T>(block, a.window_v) + first * a.window_v.token_stride;
    float score[rows] = {};
    if (self < count) {
      const T* const key = keys + self * a.window_k.token_stride;
      for (int c = 0; c < f.head_dim; ++c) {
        const float x = Element<T>::wide(key[c]);
#pragma unroll
        for (int r = 0; r < rows; ++r) score[r] = fmaf(q[c * rows + r], x, score[r]);
      }
    }
    float* kept = nullptr;
    if (a.window_scores != nullptr) kept = block.window_scores(a, block.first_row) + first + self;
    softmax(score, static_cast<int>(a.page_count) * f.page_tokens + first, count, kept);
    for (int c = self; c < f.value_dim; c += kThreads) {
      float acc[rows];
      begin(acc, c);
      for (int t = 0; t < count; ++t) add(acc, t, Element<T>::wide(values[t * a.window_v.token_stride + c]));
      end(acc, c);
    }
    __syncthreads();
  }

  // Scores of this thread's token into weights for all; `count` of the threads have a token. kept: where its first
  // score is wanted, or nullptr.
  LOGQUANT_DEVICE void softmax(float (&score)[rows], int first_slot, int count, float* kept) {
    const int self = threadIdx.x;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int row = block.first_row + r;
      if (self >= count || row >= block.row_total) {
        score[r] = -INFINITY;
      } else {
        if (!a.plain) score[r] = seen_score(a, block.row(a, row), first_slot + self, score[r]);
        if (kept != nullptr) kept[r * a.window_tokens] = score[r];
      }
      float most = score[r];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(ptx::kFullMask, most, step));
      if (self % 32 == 0) warp_max[r * kWarps + self / 32] = most;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      float most = reference[r];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) most = fmaxf(most, warp_max[r * kWarps + w]);
      const float finite = most == -INFINITY ? 0.0f : most;
      const float factor = ptx::exp2(reference[r] - finite);
      const bool seen = score[r] != -INFINITY;
      const float weight = seen ? ptx::exp2(score[r] - finite) : -0.0f;  // the sign says: not seen
      reference[r] = most;
      sum[r] = sum[r] * factor + weight;
      weights[self * rows + r] = weight;
      if (self == 0) rescale[r] = factor;
    }
    __syncthreads();
  }

  LOGQUANT_DEVICE void begin(float (&acc)[rows], int c) {
#pragma unroll
    for (int r = 0; r < rows; ++r) acc[r] = out[c * rows + r] * rescale[r];
  }
  LOGQUANT_DEVICE void add(float (&acc)[rows], int t, float value) {
    const float* const weight = weights + t * rows;
    if (is_finite(value)) {
#pragma unroll
      for (int r = 0; r < rows; ++r) acc[r] = fmaf(weight[r], value, acc[r]);
    } else {  // a token that is not seen has no influence, even if it holds a NaN
#pragma unroll
      for (int r = 0; r < rows; ++r) acc[r] = __float_as_uint(weight[r]) >> 31 ? acc[r] : NAN;
    }
  }
  LOGQUANT_DEVICE void end(const float (&acc)[rows], int c) {
#pragma unroll
    for (int r = 0; r < rows; ++r) out[c * rows + r] = acc[r];
  }

  // Each warp's sums of x over its threads, and their total.
  LOGQUANT_DEVICE void sum_warps(const float (&x)[rows], float* sums) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      float sum_of_warp = x[r];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum_of_warp += __shfl_xor_sync(ptx::kFullMask, sum_of_warp, step);
      if (threadIdx.x % 32 == 0) sums[r * kWarps + threadIdx.x / 32] = sum_of_warp;
    }
  }
  LOGQUANT_DEVICE float total(const float* sums, int r) const {
    float x = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x += sums[r * kWarps + w];
    return x;
  }

  LOGQUANT_DEVICE void rotate_back() {
    const int block = a.format.hadamard_block();
    const float factor = hadamard_factor(block);
    for (int step = 1; step < block; step *= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < rows * a.format.value_dim / 2; i += kThreads) {
        const int pair = i / rows, first = pair / step * 2 * step + pair % step;
        float& low = out[first * rows + i % rows];
        float& high = out[(first + step) * rows + i % rows];
        const float sum_of_both = low + high;
        high = low - high;
        low = sum_of_both;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; block > 1 && i < rows * a.format.value_dim; i += kThreads) out[i] *= factor;
  }

  LOGQUANT_DEVICE void store(int split) {
    const int self = threadIdx.x, dim = a.format.value_dim;
    sum_warps(sum, warp_max);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int row = block.first_row + r;
      if (row >= block.row_total) continue;
      const int64_t at = block.partial_index(a, split, row);
      for (int c = self; c < dim; c += kThreads) a.partial_out[at * dim + c] = out[c * rows + r];
      if (self != 0) continue;
      write_partial_sums(a, at, reference[r], total(warp_max, r));
    }
  }

  const AttendArgs& a;
  const BlockRows block;
  // Shared memory. q is times scale * log2(e); [channel or token][row] so that a thread reads all rows at once.
  // code_weights: of a channel, 1 of its code in units of its stored scale.
  float *q, *scaled_q, *out, *weights, *warp_max, *constants, *rescale, *code_weights;
  const int16_t* const map;
  float reference[rows];  // the largest score so far: the reference exponent, the same in all threads
  float sum[rows];        // of the weights of this thread's tokens
};

template <class T, int rows>
__global__ void __launch_bounds__(kThreads, 4) attend_general_kernel(__grid_constant__ const AttendArgs args) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  GeneralAttention<T, rows>(args, shared).run();
}

template <class T, int rows>
cudaError_t launch(const AttendArgs& args, cudaStream_t stream) {
  const dim3 grid(args.page_splits + args.window_splits, args.batch * args.kv_heads,
                  (row_count(args) + rows - 1) / rows);
  return ptx::launch(&attend_general_kernel<T, rows>, grid, kThreads, shared_bytes<rows>(args.format), stream, args);
}

}  // namespace

cudaError_t attend_general(const AttendArgs& args, cudaStream_t stream) {
  const bool wide = args.format.head_dim > 512 || args.format.value_dim > 512;
  return with_element(args.q.dtype, [&](auto element) {
    using T = decltype(element);
    if (row_count(args) == 1) return launch<T, 1>(args, stream);
    return row_count(args) <= 4 || wide ? launch<T, 4>(args, stream) : launch<T, 8>(args, stream);
  });
}

}  // namespace logquant::cuda
