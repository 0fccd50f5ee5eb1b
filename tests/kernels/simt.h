// What a CUDA kernel sees when it is compiled for the CPU: enough of the language to run the kernels without a GPU. Every
// thread is a coroutine; simt.cpp says when each runs, and checks what it does.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define VM_EMULATE 1
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }

struct dim1 { unsigned x; };

namespace simt {
dim1 thread_index();
dim1 block_index();
dim1 block_size();
void* dynamic_shared();
void* shared_array(unsigned number, unsigned bytes, unsigned alignment);
// All lanes leave `count` words and find all lanes' of them, 32 rows of 8.
const uint32_t (*exchange(const uint32_t* words, unsigned count))[8];
template <class T> static inline T shuffle(T value, unsigned source) {
  static_assert(sizeof(T) == 4, "32-bit shuffles");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = exchange(&bits, 1)[source & 31][0];
  memcpy(&value, &bits, 4);
  return value;
}
static inline unsigned lane() { return thread_index().x & 31; }
}  // namespace simt

// A declaration of arrays in shared memory is turned into these, one for each array, with a number of its own.
#define SHARED_ARRAY(number, alignment, type, name, sizes) \
  typedef type array_##number sizes;                       \
  array_##number& name = *(array_##number*)simt::shared_array(number, sizeof(array_##number), max<unsigned>(alignment, alignof(type)));

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())

template <class T> static inline T __shfl_xor_sync(unsigned, T v, int mask) { return simt::shuffle(v, simt::lane() ^ mask); }
template <class T> static inline T __shfl_sync(unsigned, T v, int from) { return simt::shuffle(v, from); }
void __syncwarp();
void __syncthreads();
void pair_arrive(int id);
void pair_wait(int id);
void copy_16(void* to, const void* from);
void wait_for_copies();

static inline float exp2_approx(float x) { return exp2f(x); }
static inline float rcp_approx(float x) { return 1.f / x; }
static inline float bits_to_float(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
static inline uint32_t float_to_bits(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
static inline uint16_t round_bf16(float x) { uint32_t b = float_to_bits(x); return (uint16_t)((b + 0x7fff + ((b >> 16) & 1)) >> 16); }
static inline uint32_t pack_bf16(float low, float high) { return round_bf16(low) | ((uint32_t)round_bf16(high) << 16); }
static inline float half_to_float(uint16_t x) { _Float16 h; memcpy(&h, &x, 2); return (float)h; }
static inline uint16_t float_to_half(float x) { _Float16 h = (_Float16)x; uint16_t y; memcpy(&y, &h, 2); return y; }
// c (16 x 8) += a (16 x 16) b (16 x 8) over a warp, laid out as the tensor cores' instruction does.
static inline void emulated_mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  const unsigned g = simt::lane() / 4, q = simt::lane() % 4;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto all = simt::exchange(mine, 6);
  auto value = [](uint32_t x, int i) { return bits_to_float(i ? x & 0xffff0000u : x << 16); };
  for (unsigned pair = 0; pair < 8; pair++)
    for (int i = 0; i < 4; i++)
      for (int k = 0; k < 2; k++)
        c[i] += value(all[g * 4 + pair % 4][pair / 4 * 2 + i / 2], k) * value(all[(2 * q + i % 2) * 4 + pair % 4][4 + pair / 4], k);
}

// An 8 x 8 matrix of 16-bit values over a warp, a row in four lanes, transposed.
static inline uint32_t emulated_transpose(uint32_t x) {
  const unsigned g = simt::lane() / 4, q = simt::lane() % 4;
  const auto all = simt::exchange(&x, 1);
  const uint32_t first = all[2 * q * 4 + g / 2][0], second = all[(2 * q + 1) * 4 + g / 2][0];
  return (first >> 16 * (g % 2) & 0xffff) | (second >> 16 * (g % 2)) << 16;
}
