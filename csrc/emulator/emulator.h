// Runs CUDA kernels on the CPU, thread by thread: one fiber per CUDA thread, blocks one after the other.
//
// A .cu file is compiled by the host compiler with this header in place of nvcc's built-ins (cuda_builtins.h). What a
// GPU would leave undefined, or would only now and then get wrong, is made to fail here:
//
//   * __syncthreads and warp collectives are real meetings. Threads that meet at different places, or wait for one that
//     never comes, end the launch with an error that names both lines.
//   * Dynamic shared memory is filled with a NaN pattern before each block and has exactly the size asked for, so that
//     a word read before it was written spoils the result and ASan sees the first byte past the end.
//   * cp.async does its copy as late as it may: at the wait. Until then the destination holds the NaN pattern.
//   * Threads and blocks run forwards, backwards or in a seeded random order: a result that depends on it is a race.
//   * TSan takes fibers for threads, so that shared memory without a barrier is reported as the data race it is.
//
// Errors are thrown by launch() as emulator::Error. State is global: one launch at a time.
#pragma once

#include <cuda_runtime_api.h>  // types only (dim3, cudaStream_t, ...); nothing of libcudart is linked

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace emulator {

enum class Order { kForward, kReverse, kRandom };
enum class Copies { kLazy, kEager, kRandom };  // when a cp.async copies: at the wait, at once, or either

struct Config {
  Order order = Order::kForward;
  Copies copies = Copies::kLazy;
  uint64_t seed = 1;
  // 0: an mma sums in fp32. n > 0: products in blocks of n are aligned to the largest exponent and truncated, with
  // mma_guard_bits bits below fp32's last, as tensor cores are said to do (ptx.cuh).
  int mma_block = 0;
  int mma_guard_bits = 1;
  int multiprocessors = 2;  // of the imaginary device: launchers ask for it
  size_t shared_limit_default = 48 << 10;
  size_t shared_limit = 227 << 10;  // with the attribute set
};
Config& config();

// Of all launches since they were last reset.
struct Counters {
  uint64_t blocks = 0, barriers = 0, collectives = 0;  // collectives: of lanes, not of warps
  uint64_t mma = 0;                                    // warp instructions
  uint64_t shared_bytes = 0;                           // of the block with most
  uint64_t async_bytes = 0, load_bytes = 0;            // global memory read by cp.async and by ptx::load
};
Counters& counters();

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ------------------------------------------------------------------------------------------- the thread that runs now
struct Thread;
struct Location {
  const char* file;
  int line;
};
inline constexpr unsigned kFullMask = 0xFFFFFFFFu;
inline constexpr int kWarp = 32;

// What threadIdx and its like stand for.
struct Place {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
  int lane;
  unsigned char* shared;
  size_t shared_bytes;
};
const Place& place();

[[noreturn]] void fail(const char* what, Location where);

int barrier(int predicate, Location where);  // __syncthreads_or

// A meeting of the lanes in `mask`. The last to come calls finish once; then every lane reads the slot and leaves.
enum class Collective { kSyncWarp, kShuffle, kBallot, kMma, kLdMatrix, kMovMatrix };
struct Slot {
  Collective kind;
  uint32_t mask, arrived, left;
  Location where;
  bool done;
  alignas(64) unsigned char in[kWarp][64];
  alignas(64) float out[kWarp][4];
};
Slot& meet(Collective kind, uint32_t mask, const void* in, size_t bytes, Location where,
           void (*finish)(Slot&) = nullptr);
void leave(Slot& slot);

void async_copy(void* shared, const void* global, int bytes, int source_bytes, Location where);  // the rest is zeros
void async_commit();
void async_wait(int groups_left);

// TSan does not look at what happens while one of these lives (the emulator's own bookkeeping).
class Unwatched {
 public:
  Unwatched();
  ~Unwatched();
  Unwatched(const Unwatched&) = delete;
};

template <class T>
T shuffle(uint32_t mask, T value, int source, Location where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 64);
  Unwatched unwatched;
  Slot& slot = meet(Collective::kShuffle, mask, &value, sizeof value, where);
  if (!(slot.arrived >> source & 1)) fail("a shuffle reads a lane outside its mask", where);
  std::memcpy(&value, slot.in[source], sizeof value);
  leave(slot);
  return value;
}

// --------------------------------------------------------------------------------------------------------- launches
void set_shared_limit(const void* kernel, size_t bytes);
void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);

template <class Body>
void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body body) {
  launch(kernel, grid, block, shared_bytes, [](void* b) { (*static_cast<Body*>(b))(); }, &body);
}

}  // namespace emulator
