// Does the emulator catch what it is for? One small correct kernel, and a list of bugs to put into it.
//
//   emulated_bugs            runs the kernel without a bug in every order, then each bug that an error or a wrong
//   result
//                            must betray in at least one order; exits with 1 if one goes unnoticed
//   emulated_bugs NAME       runs one bug: for those that only ASan (out of bounds) or TSan (a race) sees
#include <cstdio>
#include <string>
#include <vector>

#include "../cuda/ptx.cuh"

namespace ptx = logquant::cuda::ptx;

enum class Bug {
  kNone,
  kNoWait,            // reads what cp.async has not brought yet
  kNoBarrierAfter,    // reads shared memory that other threads are yet to write
  kNoBarrierBefore,   // overwrites shared memory that other threads are yet to read
  kDivergentBarrier,  // half of the block waits at another barrier
  kMissingBarrier,    // half of the block skips one
  kDivergentShuffle,  // half of the warp skips a shuffle of the whole warp
  kWrongMask,         // reads a lane outside the mask
  kMixedCollectives,  // lanes meet in different collectives
  kUninitialised,     // sums one word of shared memory that nobody wrote
  kMisaligned,        // a cp.async to an odd address
  kOutsideShared,     // a cp.async past the end of shared memory
  kTooMuchShared,     // more shared memory than the kernel may have
  kReadPastShared,    // ASan
  kReadPastGlobal,    // ASan
  kRace,              // TSan: a barrier is missing, though this order gives the right result
};
const char* const kNames[] = {"none",
                              "no_wait",
                              "no_barrier_after",
                              "no_barrier_before",
                              "divergent_barrier",
                              "missing_barrier",
                              "divergent_shuffle",
                              "wrong_mask",
                              "mixed_collectives",
                              "uninitialised",
                              "misaligned",
                              "outside_shared",
                              "too_much_shared",
                              "read_past_shared",
                              "read_past_global",
                              "race"};
constexpr int kThreads = 64, kTiles = 4, kShared = 2 * kThreads * 16;

// Sums the rows of `in` [kTiles][64][4]: tile by tile through a double-buffered ring; out[i] is the sum over all tiles
// of row (i + 17) % 64, plus, by a shuffle, that of its neighbour.
__global__ void sum_rows(const float* in, float* out, Bug bug) {
  LOGQUANT_DYNAMIC_SHARED(shared);
  float4* const ring = reinterpret_cast<float4*>(shared);
  const int i = threadIdx.x;
  const auto fetch = [&](int tile) {
    unsigned char* to = reinterpret_cast<unsigned char*>(ring + tile % 2 * kThreads + i);
    if (bug == Bug::kMisaligned && i == 5) to += 4;
    if (bug == Bug::kOutsideShared && i == 63) to += kShared;
    if (bug == Bug::kUninitialised && tile == 2 && i == 9) return;
    ptx::cp_async16(to, in + (tile * kThreads + i) * 4);
  };
  fetch(0);
  ptx::cp_async_commit();
  float sum = 0.0f;
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile + 1 < kTiles) fetch(tile + 1);
    ptx::cp_async_commit();
    if (bug == Bug::kNoWait) {
      ptx::cp_async_wait<2>();
    } else {
      ptx::cp_async_wait<1>();
    }
    if (bug == Bug::kDivergentBarrier && i >= 32) {
      __syncthreads();
    } else if (bug == Bug::kMissingBarrier && i >= 32) {
    } else if (bug != Bug::kNoBarrierAfter) {
      __syncthreads();
    }
    int row = (i + 17) % kThreads;
    if (bug == Bug::kReadPastShared && i == 3) row += 2 * kThreads;
    const float4 x = ring[tile % 2 * kThreads + row];
    sum += x.x + x.y + x.z + x.w;
    const bool last = tile == kTiles - 1;
    if (bug != Bug::kNoBarrierBefore && !(bug == Bug::kRace && last)) __syncthreads();
  }
  if (bug == Bug::kReadPastGlobal && i == 3) sum += in[kTiles * kThreads * 4];
  float other = 0.0f;
  if (bug == Bug::kMixedCollectives && i % 2) {
    __syncwarp();
  } else if (!(bug == Bug::kDivergentShuffle && i % 32 >= 16)) {
    const unsigned mask = bug == Bug::kWrongMask ? (i % 2 ? 0xAAAAAAAAu : 0x55555555u) : ptx::kFullMask;
    other = __shfl_xor_sync(mask, sum, 1);
  }
  // The neighbour has read this row, or it would not have come to the shuffle; but a shuffle does not order memory.
  if (bug == Bug::kRace) ring[kThreads + ((i ^ 1) + 17) % kThreads].x = 0.0f;
  out[i] = sum + other;
}

bool right(Bug bug) {
  std::vector<float> in(kTiles * kThreads * 4), out(kThreads, -1.0f), rows(kThreads);
  for (size_t j = 0; j < in.size(); ++j) {
    in[j] = static_cast<float>(j * 7 % 31);
    rows[j / 4 % kThreads] += in[j];
  }
  const int shared = bug == Bug::kTooMuchShared ? 300 << 10 : kShared;
  if (ptx::launch(sum_rows, 1, kThreads, shared, nullptr, in.data(), out.data(), bug) != cudaSuccess) return false;
  for (int i = 0; i < kThreads; ++i) {
    if (out[i] != rows[(i + 17) % kThreads] + rows[((i ^ 1) + 17) % kThreads]) return false;
  }
  return true;
}

// How many of the runs, one in each order and timing of copies, go wrong.
int failures(Bug bug, std::string& message) {
  using emulator::Copies, emulator::Order;
  int count = 0;
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    for (const Copies copies : {Copies::kLazy, Copies::kEager, Copies::kRandom}) {
      emulator::config().order = order;
      emulator::config().copies = copies;
      try {
        if (!right(bug)) {
          ++count;
          if (message.empty()) message = "wrong result";
        }
      } catch (const emulator::Error& error) {
        ++count;
        message = error.what();
      }
    }
  }
  return count;
}

int main(int argc, char** argv) {
  if (argc > 1) {
    for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i) {
      if (argv[1] == std::string(kNames[i])) return right(static_cast<Bug>(i)) ? 0 : 1;
    }
    return 2;
  }
  bool good = true;
  for (int i = 0; i <= static_cast<int>(Bug::kTooMuchShared); ++i) {
    std::string message;
    const int failed = failures(static_cast<Bug>(i), message);
    const bool ok = (failed > 0) == (i != 0);
    std::printf("%-18s %s in %d of 9 runs%s%s\n", kNames[i], ok ? "ok: fails" : "WRONG: fails", failed,
                message.empty() ? "" : ": ", message.c_str());
    good = good && ok;
  }
  return good ? 0 : 1;
}
