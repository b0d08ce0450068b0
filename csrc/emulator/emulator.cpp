// Fibers, their meetings, and the order they run in; see emulator.h.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <unordered_map>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_ASM_SWITCH 1
// Saves the callee-saved registers and the stack pointer of one fiber, restores those of another.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.pushsection .text
.type emulator_switch,@function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulator_switch,.-emulator_switch
.popsection
)");
#else
#include <ucontext.h>
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4096;
constexpr unsigned char kPoison = 0xFF;  // a NaN in every floating-point format

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, zeros;
};

void perform(const Copy& copy) {  // plain loops, so that the sanitizers see the accesses
  for (int i = 0; i < copy.bytes; ++i) copy.to[i] = copy.from[i];
  for (int i = copy.bytes; i < copy.bytes + copy.zeros; ++i) copy.to[i] = 0;
}

}  // namespace

struct Thread {
  Place place;
  int index = 0;
  bool finished = false;
  const char* waits_for = "";
  Location waits_at{"", 0};
  std::vector<Copy> open;                 // cp.async since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  void *asan_stack = nullptr, *tsan_fiber = nullptr;
#if !defined(EMULATOR_ASM_SWITCH)
  ucontext_t context;
#endif
};

namespace {

struct Block {
  std::vector<Thread> threads;
  std::vector<int> ready;  // threads that can run, from `next` on
  size_t next = 0;
  std::vector<std::vector<Slot*>> meetings;  // of each warp
  std::vector<std::unique_ptr<Slot>> slots;
  std::vector<Slot*> free_slots;
  std::vector<char*> stacks;
  std::vector<int> at_barrier;
  Location barrier_at{"", 0};
  int alive = 0, barrier_votes = 0, barrier_result = 0;
  Thread scheduler;  // the caller of launch(), where fibers return to
  Thread* current = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  std::string error;
  uint64_t random = 1;
  std::unordered_map<const void*, size_t> shared_limits;
  const void* caller_stack = nullptr;
  size_t caller_stack_bytes = 0;
  // Addresses for TSan's happens-before. Barriers take turns: a thread that is late to wake from one must not seem to
  // be ordered after those that have reached the next.
  char barrier_sync[2] = {}, end_sync = 0;
  int barriers_opened = 0;

  ~Block() {
    for (char* stack : stacks) {
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(stack, kStackBytes);
#endif
      munmap(stack - kGuardBytes, kStackBytes + kGuardBytes);
    }
  }
};

Block& block() {
  static Block b;
  return b;
}

// What TSan must know: who runs, and which accesses are ours.
void tsan_release([[maybe_unused]] void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(at);
#endif
}
void tsan_acquire([[maybe_unused]] void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(at);
#endif
}

uint64_t random_number() {  // xorshift64
  uint64_t& x = block().random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

void switch_to(Thread& to, bool for_ever = false) {
  Block& b = block();
  Thread& from = *b.current;
  b.current = &to;
#if defined(__SANITIZE_ADDRESS__)
  const bool out = &to == &b.scheduler;
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.asan_stack, out ? b.caller_stack : to.stack,
                                 out ? b.caller_stack_bytes : kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan_fiber, 1);  // 1: a switch orders nothing
#endif
#if defined(EMULATOR_ASM_SWITCH)
  emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(from.asan_stack, &bottom, &size);
#endif
  (void)for_ever;
}

std::string text(Location at) {
  const char* slash = std::strrchr(at.file, '/');
  return std::string(slash ? slash + 1 : at.file) + ":" + std::to_string(at.line);
}

// Gives up the whole launch: back to launch(), which throws what was reported. Nothing on this stack is destroyed.
[[noreturn]] void give_up() {
  switch_to(block().scheduler, true);
  std::abort();
}

void report(const std::string& message) {
  Block& b = block();
  const Place& p = b.current->place;
  char where[120];
  std::snprintf(where, sizeof where, " [block (%u,%u,%u) thread (%u,%u,%u)]", p.block_index.x, p.block_index.y,
                p.block_index.z, p.thread_index.x, p.thread_index.y, p.thread_index.z);
  b.error = message + where;
}

void report_deadlock() {
  Block& b = block();
  std::string message = "deadlock (a barrier or collective that not all threads reach):", last;
  int waiting = 0, shown = 0;
  for (const Thread& thread : b.threads) {
    if (thread.finished) continue;
    ++waiting;
    const std::string what = std::string(thread.waits_for) + " at " + text(thread.waits_at);
    if (what == last || ++shown > 6) continue;
    message += " thread " + std::to_string(thread.index) + " waits in " + what + ";";
    last = what;
  }
  report(message + " " + std::to_string(waiting) + " wait, " +
         std::to_string(static_cast<int>(b.threads.size()) - waiting) + " have ended");
}

[[noreturn]] void deadlock() {
  report_deadlock();
  give_up();
}

Thread* next_ready() {
  Block& b = block();
  if (b.next == b.ready.size()) return nullptr;
  if (config().order == Order::kRandom) {
    std::swap(b.ready[b.next], b.ready[b.next + random_number() % (b.ready.size() - b.next)]);
  }
  Thread* const thread = &b.threads[b.ready[b.next++]];
  if (b.next == b.ready.size()) {
    b.ready.clear();
    b.next = 0;
  }
  return thread;
}

void wake(const std::vector<int>& threads) {
  std::vector<int>& ready = block().ready;
  if (config().order == Order::kReverse) {
    ready.insert(ready.end(), threads.rbegin(), threads.rend());
  } else {
    ready.insert(ready.end(), threads.begin(), threads.end());
  }
}

void wake_lanes(int warp, uint32_t mask) {
  std::vector<int> lanes;
  lanes.reserve(kWarp);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) lanes.push_back(warp * kWarp + lane);
  }
  wake(lanes);
}

void wait_for(const char* what, Location at) {
  Thread& self = *block().current;
  self.waits_for = what;
  self.waits_at = at;
  Thread* const next = next_ready();
  if (!next) deadlock();
  if (next != &self) switch_to(*next);
}

void open_barrier() {
  Block& b = block();
  b.barrier_result = b.barrier_votes;
  b.barrier_votes = 0;
  ++b.barriers_opened;
  wake(b.at_barrier);
  b.at_barrier.clear();
}

bool same(Location a, Location b) { return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file)); }

const char* name(Collective kind) {
  static const char* const names[] = {"__syncwarp", "a shuffle", "a vote", "mma", "ldmatrix", "movmatrix"};
  return names[static_cast<int>(kind)];
}

}  // namespace

Config& config() {
  static Config c;
  return c;
}

Counters& counters() {
  static Counters c;
  return c;
}

const Place& place() { return block().current->place; }

void fail(const char* what, Location where) {
  report(std::string(what) + " at " + text(where));
  give_up();
}

#if defined(__SANITIZE_THREAD__)
Unwatched::Unwatched() {
  AnnotateIgnoreReadsBegin("", 0);
  AnnotateIgnoreWritesBegin("", 0);
}
Unwatched::~Unwatched() {
  AnnotateIgnoreWritesEnd("", 0);
  AnnotateIgnoreReadsEnd("", 0);
}
#else
Unwatched::Unwatched() = default;
Unwatched::~Unwatched() = default;
#endif

// ---------------------------------------------------------------------------------------------------------- meetings
int barrier(int predicate, Location where) {
  Block& b = block();
  int result;
  void* const sync = &b.barrier_sync[b.barriers_opened % 2];
  tsan_release(sync);
  {
    Unwatched unwatched;
    ++counters().barriers;
    if (!b.at_barrier.empty() && !same(b.barrier_at, where)) {
      report("__syncthreads at " + text(where) + " met a different one at " + text(b.barrier_at));
      give_up();
    }
    b.barrier_at = where;
    b.barrier_votes |= predicate;
    b.at_barrier.push_back(b.current->index);
    if (static_cast<int>(b.at_barrier.size()) == b.alive) open_barrier();
    wait_for("__syncthreads", where);
    result = b.barrier_result;
  }
  tsan_acquire(sync);
  return result;
}

Slot& meet(Collective kind, uint32_t mask, const void* in, size_t bytes, Location where, void (*finish)(Slot&)) {
  Block& b = block();
  Thread& self = *b.current;
  const int lane = self.place.lane, warp = self.index / kWarp;
  ++counters().collectives;
  const int lanes = static_cast<int>(b.threads.size()) - warp * kWarp;
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  if (!(mask >> lane & 1)) fail("a collective whose mask leaves out the calling lane", where);

  std::vector<Slot*>& open = b.meetings[warp];
  Slot* slot = nullptr;
  for (Slot* candidate : open) {
    if (candidate->done || !(candidate->mask & mask)) continue;
    if (candidate->mask != mask || candidate->kind != kind || !same(candidate->where, where)) {
      report(std::string(name(kind)) + " at " + text(where) + " met " + name(candidate->kind) + " at " +
             text(candidate->where));
      give_up();
    }
    slot = candidate;
  }
  if (!slot) {
    if (b.free_slots.empty()) {
      b.slots.push_back(std::make_unique<Slot>());
      b.free_slots.push_back(b.slots.back().get());
    }
    slot = b.free_slots.back();
    b.free_slots.pop_back();
    slot->kind = kind;
    slot->mask = mask;
    slot->arrived = slot->left = 0;
    slot->where = where;
    slot->done = false;
    open.push_back(slot);
  }
  if (bytes) std::memcpy(slot->in[lane], in, bytes);
  slot->arrived |= 1u << lane;
  // Only __syncwarp orders memory.
  if (kind == Collective::kSyncWarp) tsan_release(slot);
  if (slot->arrived == mask) {
    if (finish) finish(*slot);
    slot->done = true;
    // Going forwards, the last lane simply goes on: the other half of all orders, and half of the switches.
    const bool go_on = config().order == Order::kForward;
    wake_lanes(warp, go_on ? mask & ~(1u << lane) : mask);
    if (!go_on) wait_for(name(kind), where);
  } else {
    wait_for(name(kind), where);
  }
  if (kind == Collective::kSyncWarp) tsan_acquire(slot);
  return *slot;
}

void leave(Slot& slot) {
  Block& b = block();
  slot.left |= 1u << b.current->place.lane;
  if (slot.left != slot.mask) return;
  std::vector<Slot*>& open = b.meetings[b.current->index / kWarp];
  open.erase(std::find(open.begin(), open.end(), &slot));
  b.free_slots.push_back(&slot);
}

// ---------------------------------------------------------------------------------------------------------- cp.async
void async_copy(void* shared, const void* global, int bytes, int source_bytes, Location where) {
  Thread& self = *block().current;
  const Place& p = self.place;
  const Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), source_bytes,
                  bytes - source_bytes};
  bool now;
  {
    Unwatched unwatched;
    if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes) {
      fail("cp.async: misaligned address", where);
    }
    if (copy.to < p.shared || copy.to + bytes > p.shared + p.shared_bytes) {
      fail("cp.async: destination outside shared memory", where);
    }
    counters().async_bytes += source_bytes;
    const Copies when = config().copies;
    now = when == Copies::kEager || (when == Copies::kRandom && random_number() & 1);
    if (!now) self.open.push_back(copy);
  }
  if (now) {
    perform(copy);
  } else {
    for (int i = 0; i < bytes; ++i) copy.to[i] = kPoison;
  }
}

void async_commit() {
  Unwatched unwatched;
  Thread& self = *block().current;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void async_wait(int groups_left) {
  for (;;) {
    std::vector<Copy> group;
    {
      Unwatched unwatched;
      Thread& self = *block().current;
      if (static_cast<int>(self.groups.size()) <= groups_left) return;
      group = std::move(self.groups.front());
      self.groups.erase(self.groups.begin());
    }
    for (const Copy& copy : group) perform(copy);
  }
}

// ---------------------------------------------------------------------------------------------------------- launches
namespace {

void thread_main() {
  Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!b.caller_stack) {
    b.caller_stack = bottom;
    b.caller_stack_bytes = size;
  }
#endif
  b.body(b.argument);
  async_wait(0);
  tsan_release(&b.end_sync);
  static unsigned char never_destroyed;
  new (&never_destroyed) Unwatched;  // to the end of this fiber; run_block ends it
  Thread& self = *b.current;
  self.finished = true;
  --b.alive;
  if (!b.at_barrier.empty() && static_cast<int>(b.at_barrier.size()) == b.alive) open_barrier();
  Thread* const next = next_ready();
  if (!next && b.alive) deadlock();
  switch_to(next ? *next : b.scheduler, true);
  std::abort();
}

char* new_stack() {
  void* const p = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  mprotect(p, kGuardBytes, PROT_NONE);  // a stack that overflows faults
  return static_cast<char*>(p) + kGuardBytes;
}

void prepare(Thread& thread) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(thread.stack, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  // Mapped anew, so that TSan forgets what the last block did on this stack.
  mmap(thread.stack, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
       0);
  thread.tsan_fiber = __tsan_create_fiber(0);
#endif
#if defined(EMULATOR_ASM_SWITCH)
  void** top = reinterpret_cast<void**>(thread.stack + kStackBytes) - 1;
  *top-- = nullptr;  // the stack is 8 off a multiple of 16 on entry, as after a call
  *top = reinterpret_cast<void*>(&thread_main);
  top -= 6;  // the registers that emulator_switch restores
  std::memset(top, 0, 6 * sizeof(void*));
  thread.stack_pointer = top;
#else
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, &thread_main, 0);
#endif
}

void run_block(Place place, int threads) {
  Block& b = block();
  b.threads.resize(threads);
  b.meetings.assign((threads + kWarp - 1) / kWarp, {});
  b.free_slots.clear();
  for (auto& slot : b.slots) b.free_slots.push_back(slot.get());
  b.ready.clear();
  b.next = 0;
  b.alive = threads;
  b.at_barrier.clear();
  b.barrier_votes = 0;
  b.error.clear();
  b.current = &b.scheduler;
#if defined(__SANITIZE_THREAD__)
  b.scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
  while (static_cast<int>(b.stacks.size()) < threads) b.stacks.push_back(new_stack());
  std::vector<int> all(threads);
  for (int i = 0; i < threads; ++i) {
    Thread& thread = b.threads[i];
    const unsigned x = place.block_size.x, y = place.block_size.y, u = i;
    place.thread_index = {u % x, u / x % y, u / (x * y)};
    place.lane = i % kWarp;
    thread.place = place;
    thread.index = all[i] = i;
    thread.finished = false;
    thread.open.clear();
    thread.groups.clear();
    thread.stack = b.stacks[i];
    prepare(thread);
  }
  wake(all);
  ++counters().blocks;
  switch_to(*next_ready());
#if defined(__SANITIZE_THREAD__)
  for (Thread& thread : b.threads) {
    if (!b.error.empty()) break;  // fibers that were abandoned stay as they are
    __tsan_switch_to_fiber(thread.tsan_fiber, 1);
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
    __tsan_switch_to_fiber(b.scheduler.tsan_fiber, 1);
    __tsan_destroy_fiber(thread.tsan_fiber);
  }
#endif
  if (!b.error.empty()) throw Error("emulator: " + b.error);
}

}  // namespace

void set_shared_limit(const void* kernel, size_t bytes) { block().shared_limits[kernel] = bytes; }

void launch(const void* kernel, dim3 grid, dim3 block_size, size_t shared_bytes, void (*body)(void*), void* argument) {
  Block& b = block();
  const size_t threads = size_t{block_size.x} * block_size.y * block_size.z;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.y > 65535 || grid.z > 65535) {
    throw Error("emulator: invalid launch configuration");
  }
  const auto limit = b.shared_limits.find(kernel);
  if (shared_bytes > (limit == b.shared_limits.end() ? config().shared_limit_default : limit->second)) {
    throw Error("emulator: " + std::to_string(shared_bytes) + " bytes of shared memory are over the kernel's limit");
  }
  counters().shared_bytes = std::max<uint64_t>(counters().shared_bytes, shared_bytes);
  b.body = body;
  b.argument = argument;
  b.random = config().seed * 0x9E3779B97F4A7C15ull | 1;
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = config().order == Order::kReverse ? blocks - 1 - i : i;
  if (config().order == Order::kRandom) {
    for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  }
  Unwatched unwatched;
  for (const size_t i : order) {
    // Of the exact size and new for every block: ASan's red zone starts at its end, and TSan sees no race of blocks.
    void* memory = nullptr;
    if (shared_bytes && posix_memalign(&memory, 128, shared_bytes) != 0) throw std::bad_alloc();
    const std::unique_ptr<void, decltype(&std::free)> shared(memory, &std::free);
    Place place{};
    place.shared = static_cast<unsigned char*>(shared.get());
    place.shared_bytes = shared_bytes;
    place.block_size = block_size;
    place.grid_size = grid;
    const unsigned u = static_cast<unsigned>(i % (size_t{grid.x} * grid.y));
    place.block_index = {u % grid.x, u / grid.x, static_cast<unsigned>(i / (size_t{grid.x} * grid.y))};
    if (shared_bytes) std::memset(place.shared, kPoison, shared_bytes);
    run_block(place, static_cast<int>(threads));
  }
  tsan_acquire(&b.end_sync);
}

}  // namespace emulator
