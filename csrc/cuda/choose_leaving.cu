// The choice of the tokens that leave the window (logquant/ops/reference/choose_leaving.py): of the weights of a row
// the `count` smallest, in pages.
//
// A block is a row. It finds the largest weight that leaves bit by bit, from the top: what counts is how many weights
// are smaller. Then it goes over the slots once, in their order, and each slot finds its place among those that leave
// or stay; last, a warp orders the tokens of a page by counting how many of them come before each.
//
// Grid (rows), 256 threads. Memory: the weights from DRAM once and 33 times from a cache, 4 bytes a slot to it; for the
// 256 slots of a window a thread has one weight, and a block waits 35 times for its warps. Budget: 40 registers, 4 KB
// of shared memory for pages of 64 tokens. No atomics: which thread comes first cannot matter.

#include "choose_leaving.h"
#include "ptx.cuh"

namespace logquant::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// [2][kWarps] numbers that warps tell each other, then the keys and the slots of a page for each warp.
int shared_bytes(int page_tokens) { return (2 * kWarps + 2 * kWarps * page_tokens) * static_cast<int>(sizeof(int)); }

// What the threads of a block have together. Calls take turns with two arrays: what is written in one is read by all
// before the call after the next, for between them lies another barrier.
LOGQUANT_DEVICE int block_sum(int x, int* totals) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ptx::kFullMask, x, step);
  if (threadIdx.x % 32 == 0) totals[threadIdx.x / 32] = x;
  __syncthreads();
  int sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += totals[warp];
  return sum;
}

LOGQUANT_DEVICE int below(const float* weight, const ChooseLeavingArgs& args, uint32_t bound, int* totals) {
  int count = 0;
  for (int64_t slot = args.first + threadIdx.x; slot < args.last; slot += kThreads) {
    count += sort_key(weight[slot]) < bound;
  }
  return block_sum(count, totals);
}

// How many of the threads before this one say yes to each of two questions, and of all.
struct Counts {
  int first, second;
};
LOGQUANT_DEVICE Counts counts_before(bool first, bool second, int* totals, Counts& sum) {
  const int warp = threadIdx.x / 32;
  const unsigned earlier = (1u << threadIdx.x % 32) - 1;
  const unsigned firsts = __ballot_sync(ptx::kFullMask, first), seconds = __ballot_sync(ptx::kFullMask, second);
  if (threadIdx.x % 32 == 0) totals[warp] = __popc(firsts) | __popc(seconds) << 16;
  __syncthreads();
  Counts before{__popc(firsts & earlier), __popc(seconds & earlier)};
  sum = {0, 0};
  for (int other = 0; other < kWarps; ++other) {
    const Counts has{totals[other] & 0xFFFF, totals[other] >> 16};
    if (other < warp) before = {before.first + has.first, before.second + has.second};
    sum = {sum.first + has.first, sum.second + has.second};
  }
  return before;
}

// The tokens of one page, by slot before and by falling weight afterwards, each at its place. A warp does it.
LOGQUANT_DEVICE void order_page(const ChooseLeavingArgs& args, const float* weight, int32_t* page, uint32_t* keys,
                                int32_t* slots) {
  const int lane = threadIdx.x % 32;
  for (int t = lane; t < args.page_tokens; t += 32) {
    slots[t] = page[t];
    keys[t] = sort_key(weight[slots[t]]);
  }
  __syncwarp();
  for (int t = lane; t < args.page_tokens; t += 32) {
    int rank = 0;
    for (int other = 0; other < args.page_tokens; ++other) {
      rank += keys[other] > keys[t] || (keys[other] == keys[t] && other < t);
    }
    page[args.places[rank]] = slots[t];
  }
  __syncwarp();
}

__global__ void __launch_bounds__(kThreads) choose_row(__grid_constant__ const ChooseLeavingArgs args) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  int* const totals = reinterpret_cast<int*>(shared);
  uint32_t* const keys = reinterpret_cast<uint32_t*>(totals + 2 * kWarps);
  int32_t* const slots = reinterpret_cast<int32_t*>(keys + kWarps * args.page_tokens);
  const int64_t row = blockIdx.x;
  const float* const weight = args.weight + row * args.slots;
  int32_t* const leaving = args.leaving + row * args.count;
  int32_t* const staying = args.staying + row * (args.slots - args.count);

  uint32_t largest = 0;  // of the keys that leave
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t bound = largest | 1u << bit;
    if (below(weight, args, bound, totals + bit % 2 * kWarps) < args.count) largest = bound;
  }
  // Of those with this key the first leave, as many as are still needed. Barriers since `totals + 0` was read: none,
  // so that this sum goes to the other half.
  const int64_t equal_leave = args.count - below(weight, args, largest, totals + kWarps);

  int64_t smaller = 0, equal = 0;  // among the slots before
  for (int64_t base = 0, turn = 0; base < args.slots; base += kThreads, ++turn) {
    const int64_t slot = base + threadIdx.x;
    const bool may_leave = slot >= args.first && slot < args.last;
    const uint32_t key = may_leave ? sort_key(weight[slot]) : 0;
    const bool is_smaller = may_leave && key < largest, is_equal = may_leave && key == largest;
    Counts sum;
    const Counts before = counts_before(is_smaller, is_equal, totals + turn % 2 * kWarps, sum);
    const int64_t equal_before = equal + before.second;
    const int64_t left = smaller + before.first + min(equal_before, equal_leave);
    if (is_smaller || (is_equal && equal_before < equal_leave)) {
      leaving[left] = static_cast<int32_t>(slot);
    } else if (slot < args.slots) {
      staying[slot - left] = static_cast<int32_t>(slot);
    }
    smaller += sum.first;
    equal += sum.second;
  }
  __syncthreads();  // the block's own stores to `leaving` are seen by all of its threads from here on

  const int warp = threadIdx.x / 32;
  for (int64_t page = warp * args.page_tokens; page < args.count; page += kWarps * args.page_tokens) {
    order_page(args, weight, leaving + page, keys + warp * args.page_tokens, slots + warp * args.page_tokens);
  }
}

}  // namespace

cudaError_t choose_leaving(const ChooseLeavingArgs& args, cudaStream_t stream) {
  return ptx::launch(&choose_row, dim3(static_cast<unsigned>(args.rows)), kThreads, shared_bytes(args.page_tokens),
                     stream, args);
}

}  // namespace logquant::cuda
