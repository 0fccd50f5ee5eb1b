// What simt.cpp checks of each access: that it stays in memory the kernel was given, that its address is a multiple of its
// size, and that no other thread's access to the same bytes is unordered with it (a race), whatever order the threads ran in.
//
// Order is what barriers make: a thread's moments are numbered, and each thread knows up to which moment of each other
// thread it has come after. A copy to shared memory is an actor of its own from its beginning to its thread's wait.
#pragma once
#include <unordered_map>

namespace simt {
struct Access { uint32_t moment = 0, actor = 0; const void* site = nullptr; };  // moment 0: there was none
// What happened to two bytes.
struct Cell {
  uint32_t block = ~0u;
  Access write;
  std::vector<Access> reads;  // since the write
  const void *written_elsewhere = nullptr, *read_elsewhere = nullptr;  // by other blocks
};
struct Page { Cell cells[2048]; };
struct Space { const char *begin, *end; bool shared, writable; std::vector<Cell> cells; };

static std::vector<Space> spaces;
static std::unordered_map<uintptr_t, Page> pages;  // of memory that blocks share

static void start_clock(unsigned i) {
  if (!schedule.checks) return;
  threads[i].seen.assign(2 * count, 0);
  threads[i].seen[i] = 1;
}
static void join(Clock& to, const Clock& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}
static void release(Barrier& barrier) {
  Clock& seen = threads[current].seen;
  join(barrier.gathered, seen);
  seen[current]++;
}
static void acquire(const Barrier& barrier) { join(threads[current].seen, barrier.passed); }
static void join_copies() { threads[current].seen[count + current]++; }

// Shared memory.
static void add_space(const char* begin, size_t bytes) {
  spaces.push_back({begin, begin + bytes, true, true, {}});
  spaces.back().cells.resize((bytes + 1) / 2);
}
static void start_checks(const char* arguments, unsigned argument_bytes, unsigned shared_bytes, const Region* regions, unsigned region_count) {
  spaces.clear();
  pages.clear();
  if (!schedule.checks) return;
  add_space(dynamic_memory.get(), shared_bytes);
  spaces.push_back({arguments, arguments + argument_bytes, false, false, {}});
  for (unsigned i = 0; i < region_count; i++) spaces.push_back({regions[i].begin, regions[i].end, false, true, {}});
}

static void race(const char* first, const Access& before, const char* second, const Access& now) {
  fault(std::string("race: ") + first + " at " + place(before.site) + " and " + second + " at " + place(now.site) + ", which no barrier orders",
        who(before.actor) + who(now.actor));
}
static void race_between_blocks(const void* before, const Access& now) {
  fault("race: blocks meet in memory, at " + place(before) + " and " + place(now.site), who(now.actor));
}

static void note(Cell& cell, bool shared, bool write, const Access& now) {
  const Clock& seen = threads[current].seen;
  const auto before = [&](const Access& a) { return a.actor != now.actor || a.actor >= count ? a.moment <= seen[a.actor] : true; };
  if (cell.block != block) {
    if (!shared && cell.write.moment) cell.written_elsewhere = cell.write.site;
    if (!shared && !cell.reads.empty()) cell.read_elsewhere = cell.reads[0].site;
    cell.block = block, cell.write = Access();
    cell.reads.clear();
  }
  if (cell.written_elsewhere) race_between_blocks(cell.written_elsewhere, now);
  if (write && cell.read_elsewhere) race_between_blocks(cell.read_elsewhere, now);
  if (cell.write.moment && !before(cell.write)) race("a write", cell.write, write ? "a write" : "a read", now);
  if (write) {
    for (const Access& read : cell.reads)
      if (!before(read)) race("a read", read, "a write", now);
    cell.reads.clear();
    cell.write = now;
  } else {
    cell.reads.erase(std::remove_if(cell.reads.begin(), cell.reads.end(), before), cell.reads.end());
    cell.reads.push_back(now);
  }
}

static Cell& cell_of(const char* byte) {
  static uintptr_t number;
  static Page* page;
  if (pages.empty() || number != (uintptr_t)byte >> 12) number = (uintptr_t)byte >> 12, page = &pages[number];
  return page->cells[((uintptr_t)byte & 4095) / 2];
}

// Registers, as it were: the threads' stacks, and what shuffles bring.
static bool is_private(const char* at) {
  const char* words = (const char*)exchanged.data();
  return (at >= stacks.data() && at < stacks.data() + stacks.size()) || (at >= words && at < words + exchanged.size() * 4);
}

static void check(const void* address, unsigned size, bool write, const void* site, bool by_copy = false) {
  const char* at = (const char*)address;
  if (is_private(at)) return;
  static size_t last;
  if (last >= spaces.size() || at < spaces[last].begin || at >= spaces[last].end)
    for (last = 0; last < spaces.size() && (at < spaces[last].begin || at >= spaces[last].end); last++) {}
  if (last == spaces.size() || at + size > spaces[last].end || (write && !spaces[last].writable)) {
    char text[64];
    snprintf(text, sizeof text, "%s of %u bytes", write ? "write" : "read", size);
    fault(std::string("memory: a ") + text + " outside of what the kernel was given, at " + place(site), who(current));
    return give_up();
  }
  if ((uintptr_t)at % std::min(size, 16u)) fault("memory: a misaligned access at " + place(site));
  Space& space = spaces[last];
  if (!space.writable) return;
  const unsigned actor = by_copy ? count + current : current;
  const Access now = {threads[current].seen[actor] + by_copy, actor, site};
  for (const char* byte = at; byte < at + size; byte += 2) {
    note(space.shared ? space.cells[(byte - space.begin) / 2] : cell_of(byte), space.shared, write, now);
  }
}

static void check_copy(void* to, const void* from, const void* site) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16) fault("memory: a misaligned copy at " + place(site));
  check(from, 16, false, site, true);
  check(to, 16, true, site, true);
}
}  // namespace simt

// The compiler's calls: -fsanitize=thread before each access, -fsanitize=alignment and its like where something is amiss.
#define ACCESS(name, size, write) \
  extern "C" void __tsan_##name(void* address) { if (simt::schedule.checks) simt::check(address, size, write, __builtin_return_address(0)); }
ACCESS(read1, 1, false)
ACCESS(read2, 2, false)
ACCESS(read4, 4, false)
ACCESS(read8, 8, false)
ACCESS(read16, 16, false)
ACCESS(write1, 1, true)
ACCESS(write2, 2, true)
ACCESS(write4, 4, true)
ACCESS(write8, 8, true)
ACCESS(write16, 16, true)
// Whose alignment the compiler does not know; what the program says of it is -fsanitize=alignment's to check.
#define UNALIGNED(name, bytes, write) \
  extern "C" void __tsan_unaligned_##name(void* address) { \
    for (unsigned i = 0; simt::schedule.checks && i < bytes; i += 2) simt::check((char*)address + i, 2, write, __builtin_return_address(0)); \
  }
UNALIGNED(read2, 2, false)
UNALIGNED(read4, 4, false)
UNALIGNED(read8, 8, false)
UNALIGNED(read16, 16, false)
UNALIGNED(write2, 2, true)
UNALIGNED(write4, 4, true)
UNALIGNED(write8, 8, true)
UNALIGNED(write16, 16, true)
#define RANGE(name, write) \
  extern "C" void __tsan_##name(void* address, unsigned long bytes) { \
    for (unsigned long i = 0; simt::schedule.checks && i < bytes; i += 2) simt::check((char*)address + i, 2, write, __builtin_return_address(0)); \
  }
RANGE(read_range, false)
RANGE(write_range, true)
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

struct SourceLocation { const char* file; uint32_t line, column; };
static void undefined(const char* what, const void* data) {
  const SourceLocation& at = *(const SourceLocation*)data;
  simt::fault(std::string("undefined: ") + what + " at " + at.file + ":" + std::to_string(at.line));
}
#define UNDEFINED(name, what) extern "C" void __ubsan_handle_##name(void* data, uintptr_t, uintptr_t) { undefined(what, data); }
UNDEFINED(type_mismatch_v1, "a misaligned or null object")
UNDEFINED(out_of_bounds, "an index past the end of an array")
UNDEFINED(add_overflow, "an overflow")
UNDEFINED(sub_overflow, "an overflow")
UNDEFINED(mul_overflow, "an overflow")
UNDEFINED(negate_overflow, "an overflow")
UNDEFINED(divrem_overflow, "a division by zero")
UNDEFINED(shift_out_of_bounds, "a shift past the width")
