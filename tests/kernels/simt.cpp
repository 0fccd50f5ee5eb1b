// Runs the blocks of a kernel one after another, every thread a coroutine, in an order that is asked for; and checks each
// access to memory that the kernel makes, if it was compiled with -fsanitize=thread: that compiler flag calls the functions
// __tsan_read4 and the like before each access, which are ours (simt_checks.h).
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

struct dim1 { unsigned x; };

namespace simt {
// How a block's threads take turns; the same numbers as in emulation.py.
enum Order { IN_TURN, REVERSED, SHUFFLED, WARPS_BY_RANK, THREADS_BY_RANK };
struct Schedule { uint32_t order, seed, copies_at_once, checks; };
struct Region { const char *begin, *end; };
struct Copy { void* to; const void* from; };

typedef std::vector<uint32_t> Clock;
struct Barrier {
  unsigned arrived = 0, generation = 0, kind = 0;
  Clock gathered, passed;  // what those who have arrived had seen: of this generation, and of the one before
};
struct Thread {
  ucontext_t context;
  bool done;
  const Barrier* waits_for;
  unsigned generation, exchanges;
  std::vector<Copy> copies;
  Clock seen;  // for each thread, and for the copies of each, up to which of its moments this one has come after
};

struct Array { std::unique_ptr<char[]> memory; char* begin; size_t bytes; };
static std::map<unsigned, Array> arrays;  // of shared memory, by number
static std::unique_ptr<char[]> dynamic_memory;
static size_t dynamic_bytes;
static std::vector<char> stacks;
static std::vector<Thread> threads;
static std::vector<Barrier> warp_barriers;
static Barrier block_barrier, named_barriers[16];
static std::vector<uint32_t> exchanged;  // [2][threads][8]
static ucontext_t scheduler;
static unsigned current, block, count;
static void (*entry)(const void*);
static const void* arguments;
static Schedule schedule;
static std::vector<std::string> faults;
static bool given_up;  // after an access that would do harm
constexpr size_t STACK = 1 << 18, MOST_FAULTS = 6;
constexpr uint32_t POISON = 0x7fa57fa5;  // NaN as a float and as two 16-bit ones, and no index of anything

// Each is told once, whichever thread meets it.
static void fault(const std::string& what, const std::string& who = "") {
  const auto known = [&](const std::string& text) { return text.compare(0, what.size(), what) == 0; };
  if (faults.size() < MOST_FAULTS && std::none_of(faults.begin(), faults.end(), known)) faults.push_back(what + who);
}
// A place in the code, as emulation.py knows it.
static std::string place(const void* address) {
  Dl_info info;
  char text[32] = "?";
  if (dladdr(address, &info)) snprintf(text, sizeof text, "<+%zx>", (size_t)((const char*)address - (const char*)info.dli_fbase) - 1);
  return text;
}
static std::string who(unsigned actor) {
  const unsigned thread = actor % count;
  char text[64];
  snprintf(text, sizeof text, " (%s%u of block %u)", actor < count ? "thread " : "a copy of thread ", thread, block);
  return text;
}
static void yield() { swapcontext(&threads[current].context, &scheduler); }
static void give_up() { given_up = true, yield(); }
}  // namespace simt

#include "simt_checks.h"

namespace simt {
// Whether the barrier opened. What a thread did before it arrives comes before what those do who wait for it.
static bool arrive(Barrier& barrier, unsigned expected, bool orders = true) {
  if (schedule.checks && orders) release(barrier);
  if (++barrier.arrived < expected) return false;
  barrier.arrived = 0;
  barrier.generation++;
  std::swap(barrier.gathered, barrier.passed);
  barrier.gathered.clear();
  return true;
}
static void wait(Barrier& barrier, unsigned expected, bool orders = true) {
  Thread& me = threads[current];
  me.generation = barrier.generation;
  if (!arrive(barrier, expected, orders)) {
    me.waits_for = &barrier;
    yield();
    threads[current].waits_for = nullptr;
  }
  if (schedule.checks && orders) acquire(barrier);
}
// The lanes of a warp meet: all of them, at operations of one kind.
static void meet(unsigned kind) {
  Barrier& barrier = warp_barriers[current / 32];
  if (barrier.arrived == 0) barrier.kind = kind;
  else if (barrier.kind != kind) fault("lanes of a warp meet at a shuffle and at a barrier", who(current));
  wait(barrier, 32, kind != 0);  // a shuffle orders nothing in memory
}

static void poison(void* memory, size_t bytes) {
  for (size_t i = 0; i + 4 <= bytes; i += 4) memcpy((char*)memory + i, &POISON, 4);
}
// An array begins where its type allows and four floats at a time would not, and ends with its memory.
void* shared_array(unsigned number, unsigned bytes, unsigned alignment) {
  Array& array = arrays[number];
  if (array.memory == nullptr) {
    array.memory.reset(new char[alignment % 16 + bytes]);
    array.begin = array.memory.get() + alignment % 16, array.bytes = bytes;
    poison(array.begin, bytes);
    if (schedule.checks) add_space(array.begin, bytes);
  }
  return array.begin;
}
void* dynamic_shared() { return dynamic_memory.get(); }
dim1 thread_index() { return {current}; }
dim1 block_index() { return {block}; }
dim1 block_size() { return {count}; }

const uint32_t (*exchange(const uint32_t* words, unsigned number))[8] {
  uint32_t* table = exchanged.data() + (threads[current].exchanges++ & 1) * count * 8;
  memcpy(table + current * 8, words, number * 4);
  meet(0);
  return (const uint32_t(*)[8])(table + (current & ~31u) * 8);
}

static void run_thread() {
  entry(arguments);
  Thread& me = threads[current];
  if (!me.copies.empty()) fault("copies that are never waited for", who(current));
  me.done = true;
  yield();
}

static bool can_run(const Thread& t) { return !t.done && (t.waits_for == nullptr || t.waits_for->generation != t.generation); }
static void resume(unsigned i) {
  current = i;
  swapcontext(&scheduler, &threads[i].context);
}

static uint32_t random_number(uint32_t& state) {
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}
static void shuffle(std::vector<unsigned>& order, uint32_t& random) {
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_number(random) % i]);
}
// The threads in the order of the first round, or by rank, the highest first.
static std::vector<unsigned> first_order(uint32_t& random) {
  std::vector<unsigned> order(count), warps((count + 31) / 32);
  for (unsigned i = 0; i < count; i++) order[i] = schedule.order == REVERSED ? count - 1 - i : i;
  for (unsigned i = 0; i < warps.size(); i++) warps[i] = i;
  if (schedule.order == THREADS_BY_RANK) shuffle(order, random);
  if (schedule.order == WARPS_BY_RANK) {
    shuffle(warps, random);
    for (unsigned i = 0; i < count; i++) order[i] = warps[i / 32] * 32 + i % 32;
  }
  return order;
}
// Runs the block's threads to their ends; whether they came there. By rank: always the highest that can run, so that the
// lowest is left behind as far as barriers allow.
static bool run_block(uint32_t& random) {
  std::vector<unsigned> order = first_order(random);
  const bool by_rank = schedule.order >= WARPS_BY_RANK;
  for (;;) {
    bool ran = false, left = false;
    if (schedule.order == SHUFFLED) shuffle(order, random);
    for (unsigned i : order) {
      left = left || !threads[i].done;
      if (!can_run(threads[i])) continue;
      ran = true;
      resume(i);
      if (given_up) return true;
      if (by_rank) break;
    }
    if (!left) return true;
    if (!ran) return false;
  }
}

static void start_block() {
  warp_barriers.assign((count + 31) / 32, Barrier());
  block_barrier = Barrier();
  for (auto& b : named_barriers) b = Barrier();
  exchanged.assign(2 * count * 8, POISON);
  poison(dynamic_memory.get(), dynamic_bytes);
  for (auto& numbered : arrays) poison(numbered.second.begin, numbered.second.bytes);
  for (unsigned i = 0; i < count; i++) {
    Thread& t = threads[i];
    t.done = false, t.exchanges = 0, t.waits_for = nullptr;
    t.copies.clear();
    start_clock(i);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks.data() + i * STACK, t.context.uc_stack.ss_size = STACK, t.context.uc_link = nullptr;
    makecontext(&t.context, run_thread, 0);
  }
}
}  // namespace simt

void __syncwarp() { simt::meet(1); }
void __syncthreads() { simt::wait(simt::block_barrier, simt::count); }
void pair_arrive(int id) { simt::arrive(simt::named_barriers[id], 64); }
void pair_wait(int id) { simt::wait(simt::named_barriers[id], 64); }

// Copies are made when they are waited for and not a moment earlier, or at once: hardware may do either.
void copy_16(void* to, const void* from) {
  if (simt::schedule.checks) simt::check_copy(to, from, __builtin_return_address(0));
  simt::threads[simt::current].copies.push_back({to, from});
  if (simt::schedule.copies_at_once) memcpy(to, from, 16);
}
void wait_for_copies() {
  auto& copies = simt::threads[simt::current].copies;
  if (!simt::schedule.copies_at_once)
    for (auto& c : copies) memcpy(c.to, c.from, 16);
  copies.clear();
  if (simt::schedule.checks) simt::join_copies();
}

// Runs `blocks` in this order. `regions` is the memory that the kernel may touch beside its block's. Returns what is wrong,
// a line each; else nothing.
EXPORTED const char* simt_run(void (*kernel)(const void*), const void* arguments, unsigned argument_bytes, const unsigned* blocks,
                                unsigned number, unsigned block_threads, unsigned shared_bytes, const simt::Schedule* schedule,
                                const simt::Region* regions, unsigned region_count) {
  using namespace simt;
  static std::string text;
  simt::entry = kernel, simt::arguments = arguments, simt::schedule = *schedule, count = block_threads;
  threads.resize(count);
  stacks.resize(count * STACK);
  if (dynamic_bytes != shared_bytes) dynamic_memory.reset(new char[dynamic_bytes = shared_bytes]);
  arrays.clear();
  faults.clear();
  given_up = false;
  start_checks((const char*)arguments, argument_bytes, shared_bytes, regions, region_count);
  uint32_t random = schedule->seed * 2654435761u + 1;
  for (unsigned i = 0; i < number && !given_up; i++) {
    block = blocks[i];
    start_block();
    if (!run_block(random)) {
      for (unsigned t = 0; t < count; t++)
        if (!threads[t].done) { fault("threads wait for others that never come", who(t)); break; }
      break;
    }
  }
  text.clear();
  for (const auto& one : faults) text += one + "\n";
  return text.c_str();
}
// Of the last kernel that ran.
EXPORTED unsigned simt_static_bytes() {
  unsigned bytes = 0;
  for (const auto& numbered : simt::arrays) bytes += numbered.second.bytes;
  return bytes;
}
