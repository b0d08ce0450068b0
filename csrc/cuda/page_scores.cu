// A score of each page for each query (reference/page_scores.py): of its mean key, or a bound of its keys.
//
// A block is kPagesPerBlock pages of one KV head and up to kRows of its query rows, which it keeps in shared memory; a
// warp works on one page after the other, its lanes are channels. The bound takes of each channel the better end of its
// range: sum of q_c * zero_c + max(q_c, 0) * (largest code) * scale_c.
//
// Grid (blocks of pages, batch * KV heads, blocks of rows), 128 threads. Memory: of a page its key parameters alone (2
// bytes a channel), or its mean key (1 byte a channel), once for kRows rows; 4 bytes a page and row to it. Budget: 64
// registers, 36 bytes of shared memory a channel.

#include "params.cuh"

namespace logquant::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kPagesPerBlock = 16, kRows = 4;
constexpr float kLargest = 3.4028234663852886e38f;

int shared_bytes(const PageFormat& f) { return (2 * kRows + 1) * f.head_dim * static_cast<int>(sizeof(float)); }

// How many columns each channel has, into counts [D].
LOGQUANT_DEVICE void count_columns(const PageFormat& f, const int16_t* map, int* counts) {
  for (int c = threadIdx.x; c < f.head_dim; c += kThreads) counts[c] = map == nullptr;
  __syncthreads();
  // A thread has whole channels: no two write to the same count, whatever the map holds.
  for (int c = threadIdx.x; map != nullptr && c < f.head_dim; c += kThreads) {
    for (int j = 0; j < f.key_columns; ++j) counts[c] += channel_of(map[j], f.head_dim) == c;
  }
  __syncthreads();
}

LOGQUANT_DEVICE float number(float x) { return x <= kLargest ? fmaxf(x, -kLargest) : kLargest; }

template <class T>
__global__ void __launch_bounds__(kThreads, 8) score_pages(__grid_constant__ const PageScoresArgs a) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  const PageFormat& f = a.format;
  const int dim = f.head_dim, heads = static_cast<int>(a.kv_heads), rows = static_cast<int>(a.group * a.queries);
  const int batch = blockIdx.y / heads, kv_head = blockIdx.y % heads, first_row = blockIdx.z * kRows;
  const int own_rows = min(kRows, rows - first_row), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* const q = reinterpret_cast<float*>(shared);  // [row][D], times the scale
  float* const up = q + kRows * dim;  // of what is positive, times the channel's largest code in stored scales
  int* const counts = reinterpret_cast<int*>(up + kRows * dim);
  count_columns(f, a.key_map.of(batch, kv_head), counts);
  for (int i = threadIdx.x; i < kRows * dim; i += kThreads) {
    const int row = first_row + i / dim, c = i % dim, count = min(counts[c], kMaxCodeBits / f.key_bits);
    float x = 0.0f;
    if (i / dim < own_rows) {
      const T* const from = static_cast<const T*>(a.q.data) + batch * a.q.batch_stride +
                            (kv_head * a.group + row / a.queries) * a.q.head_stride +
                            row % a.queries * a.q.token_stride;
      x = a.scale * Element<T>::wide(from[c]);
    }
    q[i] = x;
    up[i] = fmaxf(x, 0.0f) * digit_weight(f, 0, count) * static_cast<float>((1 << f.key_bits * count) - 1);
  }
  __syncthreads();

  float* const scores = a.scores + (int64_t{blockIdx.y} * rows + first_row) * a.page_count;
  const int64_t end = min(a.page_count, (int64_t{blockIdx.x} + 1) * kPagesPerBlock);
  for (int64_t p = int64_t{blockIdx.x} * kPagesPerBlock + warp; p < end; p += kWarps) {
    float sums[kRows] = {}, factor = 1.0f;
    if (a.means != nullptr) {
      const int8_t* const mean =
          a.means + batch * a.means_batch_stride + kv_head * a.means_head_stride + p * a.means_page_stride;
      factor = a.mean_scales.of(batch, kv_head)[p];
      for (int c = lane; c < dim; c += 32) {
        const float x = static_cast<float>(mean[c]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] += q[r * dim + c] * x;
      }
    } else {
      const uint32_t* const page = reinterpret_cast<const uint32_t*>(a.pages.data) + batch * a.pages.batch_stride +
                                   kv_head * a.pages.head_stride + p * a.pages.page_stride;
      for (int c = lane; c < dim; c += 32) {
        const Params params = key_params_at(f, page, c);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          sums[r] += q[r * dim + c] * params.zero + up[r * dim + c] * params.scale;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      for (int step = 16; step > 0; step /= 2) sums[r] += __shfl_xor_sync(ptx::kFullMask, sums[r], step);
      if (lane == 0 && r < own_rows) scores[r * a.page_count + p] = number(sums[r] * factor);
    }
  }
}

}  // namespace

cudaError_t page_scores(const PageScoresArgs& args, cudaStream_t stream) {
  const int64_t rows = args.group * args.queries;
  const dim3 grid((args.page_count + kPagesPerBlock - 1) / kPagesPerBlock, args.batch * args.kv_heads,
                  (rows + kRows - 1) / kRows);
  return with_element(args.q.dtype, [&](auto element) {
    return ptx::launch(&score_pages<decltype(element)>, grid, kThreads, shared_bytes(args.format), stream, args);
  });
}

}  // namespace logquant::cuda
