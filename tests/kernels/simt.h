// Runs a CUDA kernel on the CPU, one block after another, every thread a coroutine: enough of the language to test the
// kernels' arithmetic and indexing on a machine without a GPU. Threads switch only at barriers and shuffles.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <stdio.h>
#include <ucontext.h>
#include <functional>
#include <vector>
#include <algorithm>

#define VM_EMULATE 1
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
using std::min;
using std::max;

struct dim1 { unsigned x; };
static dim1 threadIdx, blockIdx, blockDim;

namespace simt {
struct Barrier { unsigned arrived = 0, generation = 0; };
struct Copy { void* to; const void* from; };
struct Thread { ucontext_t context; std::vector<char> stack; bool done; unsigned shuffles; std::vector<Copy> copies; };
static std::vector<Thread> threads;
static ucontext_t scheduler;
static unsigned current;
static std::vector<Barrier> warp_barriers;
static Barrier block_barrier;
static Barrier named_barriers[16];
static float exchange[2][1024];
static std::function<void()> body;
static inline void yield() { swapcontext(&threads[current].context, &scheduler); }
static inline bool arrive(Barrier& b, unsigned count) {
  if (++b.arrived < count) return false;
  b.arrived = 0; b.generation++;
  return true;
}
static inline void wait(Barrier& b, unsigned count) {
  const unsigned generation = b.generation;
  if (arrive(b, count)) return;
  while (b.generation == generation) yield();
}
static inline void warp_wait() { wait(warp_barriers[current / 32], 32); }
static void entry() { body(); threads[current].done = true; yield(); }
static void run(unsigned blocks, unsigned block_threads, std::function<void()> f) {
  body = f;
  blockDim.x = block_threads;
  threads.resize(block_threads);
  for (unsigned b = 0; b < blocks; b++) {
    warp_barriers.assign((block_threads + 31) / 32, Barrier());
    block_barrier = Barrier();
    for (auto& b : named_barriers) b = Barrier();
    for (auto& t : threads) {
      t.stack.resize(1 << 17); t.done = false; t.shuffles = 0; t.copies.clear();
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.data(); t.context.uc_stack.ss_size = t.stack.size(); t.context.uc_link = nullptr;
      makecontext(&t.context, entry, 0);
    }
    for (bool left = true; left;) {
      left = false;
      for (unsigned i = 0; i < block_threads; i++)
        if (!threads[i].done) {
          left = true; current = i; threadIdx.x = i; blockIdx.x = b;
          swapcontext(&scheduler, &threads[i].context);
        }
    }
  }
}
template <class T> static inline T shuffle(T v, unsigned source) {
  static_assert(sizeof(T) == 4, "32-bit shuffles");
  float bits; memcpy(&bits, &v, 4);
  float* buffer = exchange[threads[current].shuffles++ & 1];
  buffer[current] = bits;
  warp_wait();
  bits = buffer[(current & ~31u) + (source & 31)];
  memcpy(&v, &bits, 4);
  return v;
}
}  // namespace simt

template <class T> static inline T __shfl_xor_sync(unsigned, T v, int mask) { return simt::shuffle(v, (simt::current & 31) ^ mask); }
template <class T> static inline T __shfl_sync(unsigned, T v, int lane) { return simt::shuffle(v, lane); }
template <class T> static inline T __shfl_up_sync(unsigned, T v, unsigned delta) { unsigned l = simt::current & 31; return simt::shuffle(v, l >= delta ? l - delta : l); }
template <class T> static inline T __shfl_down_sync(unsigned, T v, unsigned delta) { unsigned l = simt::current & 31; return simt::shuffle(v, l + delta < 32 ? l + delta : l); }
static inline void __syncwarp() { simt::warp_wait(); }
static inline void __syncthreads() { simt::wait(simt::block_barrier, (unsigned)simt::threads.size()); }

static inline void pair_arrive(int id) { simt::arrive(simt::named_barriers[id], 64); }
static inline void pair_wait(int id) { simt::wait(simt::named_barriers[id], 64); }

// Copies are made when they are waited for, and not a moment earlier.
static inline void copy_16(void* to, const void* from) { simt::threads[simt::current].copies.push_back({to, from}); }
static inline void wait_for_copies() {
  auto& copies = simt::threads[simt::current].copies;
  for (auto& c : copies) memcpy(c.to, c.from, 16);
  copies.clear();
}

static inline float exp2_approx(float x) { return exp2f(x); }
static inline float log2_approx(float x) { return log2f(x); }
static inline float rcp_approx(float x) { return 1.f / x; }
static inline float bits_to_float(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
static inline uint32_t float_to_bits(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
static inline uint16_t round_bf16(float x) { uint32_t b = float_to_bits(x); return (uint16_t)((b + 0x7fff + ((b >> 16) & 1)) >> 16); }
static inline uint32_t pack_bf16(float low, float high) { return round_bf16(low) | ((uint32_t)round_bf16(high) << 16); }
static inline float half_to_float(uint16_t x) { _Float16 h; memcpy(&h, &x, 2); return (float)h; }
static inline uint16_t float_to_half(float x) { _Float16 h = (_Float16)x; uint16_t y; memcpy(&y, &h, 2); return y; }
// c (16 x 8) += a (16 x 16) b (16 x 8) over a warp, laid out as the tensor cores' instruction does.
static inline void emulated_mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  const unsigned lane = simt::current & 31, g = lane / 4, q = lane % 4;
  auto value = [](uint32_t x, int i) { return bits_to_float(i ? x & 0xffff0000u : x << 16); };
  for (unsigned pair = 0; pair < 8; pair++) {
    const unsigned half = pair / 4, from = pair % 4;
    uint32_t rows[2], columns[2];
    for (int i = 0; i < 2; i++) rows[i] = simt::shuffle(a[half * 2 + i], g * 4 + from);
    for (int i = 0; i < 2; i++) columns[i] = simt::shuffle(b[half], (2 * q + i) * 4 + from);
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < 2; k++) c[i] += value(rows[i / 2], k) * value(columns[i % 2], k);
  }
}

// An 8 x 8 matrix of 16-bit values over a warp, a row in four lanes, transposed.
static inline uint32_t emulated_transpose(uint32_t x) {
  const unsigned lane = simt::current & 31, g = lane / 4, q = lane % 4;
  const uint32_t first = simt::shuffle(x, 2 * q * 4 + g / 2), second = simt::shuffle(x, (2 * q + 1) * 4 + g / 2);
  return (first >> 16 * (g % 2) & 0xffff) | (second >> 16 * (g % 2)) << 16;
}
