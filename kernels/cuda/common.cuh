// Shared by all kernels: activation types, fast exponentials, warp reductions. Needs no CUDA header, so NVRTC starts
// at once. The Python side inlines this file where a kernel includes it.
//
// ACT is the activation type: 0 float32, 1 float16, 2 bfloat16. Everything is computed in float32.
#pragma once

typedef long long int64;
typedef unsigned int uint32;
typedef unsigned short uint16;

#if ACT == 0
typedef float act_t;
#else
typedef uint16 act_t;
#endif

#define FULL_WARP 0xffffffffu
#define LOG2E 1.44269504f
#define LN2 0.6931471805599453f

#ifndef VM_EMULATE
__device__ __forceinline__ float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float rcp_approx(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float half_to_float(uint16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ __forceinline__ uint16 float_to_half(float x) { uint16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
// Two values in one register, the first in the low half.
__device__ __forceinline__ uint32 pack_bf16(float low, float high) { uint32 y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y; }
__device__ __forceinline__ float bits_to_float(uint32 x) { return __uint_as_float(x); }
__device__ __forceinline__ uint32 float_to_bits(float x) { return __float_as_uint(x); }
#endif

__device__ __forceinline__ float to_float(act_t x) {
#if ACT == 0
  return x;
#elif ACT == 1
  return half_to_float(x);
#else
  return bits_to_float((uint32)x << 16);
#endif
}

__device__ __forceinline__ act_t from_float(float x) {
#if ACT == 0
  return x;
#elif ACT == 1
  return float_to_half(x);
#else
  return (act_t)(pack_bf16(x, 0.f) & 0xffff);
#endif
}

// The type of a decoding state (STATE, coded like ACT).
#if defined(STATE) && STATE == 0
typedef float state_t;
#elif defined(STATE)
typedef uint16 state_t;
#endif
#ifdef STATE
__device__ __forceinline__ float load_state(state_t s) {
#if STATE == 0
  return s;
#elif STATE == 1
  return half_to_float(s);
#else
  return bits_to_float((uint32)s << 16);
#endif
}

__device__ __forceinline__ state_t round_state(float f) {
#if STATE == 0
  return f;
#elif STATE == 1
  return float_to_half(f);
#else
  return (state_t)(pack_bf16(f, 0.f) & 0xffff);
#endif
}
#endif

// V neighbouring activations as one memory access, kept as loaded ("raw") until they are needed as floats.
template <int V> struct Raw;
#if ACT == 0
template <> struct Raw<1> { float x; };
template <> struct __align__(8) Raw<2> { float x, y; };
__device__ __forceinline__ void unpack(Raw<1> r, float* f) { f[0] = r.x; }
__device__ __forceinline__ void unpack(Raw<2> r, float* f) { f[0] = r.x; f[1] = r.y; }
__device__ __forceinline__ Raw<1> pack(const float* f, Raw<1>) { Raw<1> r; r.x = f[0]; return r; }
__device__ __forceinline__ Raw<2> pack(const float* f, Raw<2>) { Raw<2> r; r.x = f[0]; r.y = f[1]; return r; }
template <int V> __device__ __forceinline__ Raw<V> raw_zero();
template <> __device__ __forceinline__ Raw<1> raw_zero<1>() { Raw<1> r; r.x = 0.f; return r; }
template <> __device__ __forceinline__ Raw<2> raw_zero<2>() { Raw<2> r; r.x = 0.f; r.y = 0.f; return r; }
template <> struct __align__(16) Raw<4> { float x, y, z, w; };
template <> __device__ __forceinline__ Raw<4> raw_zero<4>() { Raw<4> r; r.x = r.y = r.z = r.w = 0.f; return r; }
__device__ __forceinline__ void unpack(Raw<4> r, float* f) { f[0] = r.x; f[1] = r.y; f[2] = r.z; f[3] = r.w; }
__device__ __forceinline__ Raw<4> pack(const float* f, Raw<4>) { Raw<4> r; r.x = f[0]; r.y = f[1]; r.z = f[2]; r.w = f[3]; return r; }
#else
template <> struct Raw<1> { uint16 x; };
template <> struct __align__(4) Raw<2> { uint32 x; };
__device__ __forceinline__ void unpack(Raw<1> r, float* f) { f[0] = to_float(r.x); }
__device__ __forceinline__ void unpack(Raw<2> r, float* f) {
#if ACT == 1
  f[0] = half_to_float((uint16)(r.x & 0xffff)); f[1] = half_to_float((uint16)(r.x >> 16));
#else
  f[0] = bits_to_float(r.x << 16); f[1] = bits_to_float(r.x & 0xffff0000u);
#endif
}
__device__ __forceinline__ Raw<1> pack(const float* f, Raw<1>) { Raw<1> r; r.x = from_float(f[0]); return r; }
__device__ __forceinline__ Raw<2> pack(const float* f, Raw<2>) {
  Raw<2> r;
#if ACT == 1
  r.x = (uint32)float_to_half(f[0]) | ((uint32)float_to_half(f[1]) << 16);
#else
  r.x = pack_bf16(f[0], f[1]);
#endif
  return r;
}
template <int V> __device__ __forceinline__ Raw<V> raw_zero() { Raw<V> r; r.x = 0; return r; }
template <> struct __align__(8) Raw<4> { Raw<2> low, high; };
template <> __device__ __forceinline__ Raw<4> raw_zero<4>() { Raw<4> r; r.low = r.high = raw_zero<2>(); return r; }
__device__ __forceinline__ void unpack(Raw<4> r, float* f) { unpack(r.low, f); unpack(r.high, f + 2); }
__device__ __forceinline__ Raw<4> pack(const float* f, Raw<4>) { Raw<4> r; r.low = pack(f, Raw<2>()); r.high = pack(f + 2, Raw<2>()); return r; }
#endif

// The same for floats, whatever ACT is.
template <int V> struct RawFloat;
template <> struct RawFloat<1> { float x; };
template <> struct __align__(8) RawFloat<2> { float x, y; };
__device__ __forceinline__ void unpack(RawFloat<1> r, float* f) { f[0] = r.x; }
__device__ __forceinline__ void unpack(RawFloat<2> r, float* f) { f[0] = r.x; f[1] = r.y; }
template <> struct __align__(16) RawFloat<4> { float x, y, z, w; };
__device__ __forceinline__ void unpack(RawFloat<4> r, float* f) { f[0] = r.x; f[1] = r.y; f[2] = r.z; f[3] = r.w; }

// Minus infinity in every value.
template <int V> __device__ __forceinline__ RawFloat<V> lowest(RawFloat<V> r) {
  const float f = bits_to_float(0xff800000u);
  if constexpr (V == 1) { r.x = f; } else if constexpr (V == 2) { r.x = r.y = f; } else { r.x = r.y = r.z = r.w = f; }
  return r;
}
template <int V> __device__ __forceinline__ Raw<V> lowest(Raw<V> r) {
#if ACT == 0
  const float f = bits_to_float(0xff800000u);
  if constexpr (V == 1) { r.x = f; } else if constexpr (V == 2) { r.x = r.y = f; } else { r.x = r.y = r.z = r.w = f; }
#else
  const uint32 bits = ACT == 1 ? 0xfc00fc00u : 0xff80ff80u;
  if constexpr (V == 1) { r.x = (uint16)bits; } else if constexpr (V == 2) { r.x = bits; } else { r.low.x = r.high.x = bits; }
#endif
  return r;
}

// Step sizes come as activations, or in float32 (DELTA_FLOAT) where they were expanded from their low rank.
#if defined(DELTA_FLOAT) && DELTA_FLOAT
typedef float delta_t;
template <int V> using RawDelta = RawFloat<V>;
#else
typedef act_t delta_t;
template <int V> using RawDelta = Raw<V>;
#endif

// Row `row` of an array whose rows are `stride` bytes apart: one multiply-add of 64 bits.
template <class T> __device__ __forceinline__ T* row_of(T* base, int row, int stride) {
  return (T*)((char*)base + (unsigned long long)(uint32)row * (uint32)stride);
}

template <int V> __device__ __forceinline__ RawDelta<V> load_delta(const delta_t* p) { return *reinterpret_cast<const RawDelta<V>*>(p); }
template <int V> __device__ __forceinline__ Raw<V> load_raw(const act_t* p) { return *reinterpret_cast<const Raw<V>*>(p); }
template <int V> __device__ __forceinline__ void store_act(act_t* p, const float* f) { *reinterpret_cast<Raw<V>*>(p) = pack(f, Raw<V>()); }

struct __align__(8) Pair { float x, y; };
struct __align__(16) Quad { float x, y, z, w; };

// V floats from or to memory that is aligned to V floats (V a power of two; at most 4 at a time).
template <int V> __device__ __forceinline__ void load_floats(const float* p, float* f) {
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 4) { Quad q = *reinterpret_cast<const Quad*>(p + i); f[i] = q.x; f[i + 1] = q.y; f[i + 2] = q.z; f[i + 3] = q.w; }
  } else if constexpr (V == 2) {
    Pair q = *reinterpret_cast<const Pair*>(p); f[0] = q.x; f[1] = q.y;
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) f[i] = p[i];
  }
}

template <int V> __device__ __forceinline__ void store_floats(float* p, const float* f) {
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 4) { Quad q; q.x = f[i]; q.y = f[i + 1]; q.z = f[i + 2]; q.w = f[i + 3]; *reinterpret_cast<Quad*>(p + i) = q; }
  } else if constexpr (V == 2) {
    Pair q; q.x = f[0]; q.y = f[1]; *reinterpret_cast<Pair*>(p) = q;
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) p[i] = f[i];
  }
}

template <int V> __device__ __forceinline__ void store_delta(delta_t* p, const float* f) {
#if defined(DELTA_FLOAT) && DELTA_FLOAT
  store_floats<V>(p, f);
#else
  store_act<V>(p, f);
#endif
}

// exp(t). The error of the special-function unit, two units in the last place, which a slow decay sums up, is too large for
// float32 activations: theirs is 2^n e^r, |r| <= log(2) / 2, with e^r a polynomial (minimax in relative error, 1.1e-8).
__device__ __forceinline__ float exponential(float t) {
#if ACT == 0
  t = fminf(fmaxf(t, -88.f), 89.f);
  const float shifted = fmaf(t, LOG2E, 12582912.f), n = shifted - 12582912.f;
  const float r = fmaf(n, 1.90465421e-9f, fmaf(n, -LN2, t));
  float p = fmaf(r, 0.00139338837f, 0.00836333539f);
  p = fmaf(r, p, 0.041666463f);
  p = fmaf(r, p, 0.166665763f);
  p = fmaf(r, p, 0.5f);
  p = fmaf(r, p, 1.f);
  p = fmaf(r, p, 1.f);
  return p * bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
#else
  return exp2_approx(t * LOG2E);
#endif
}

// log(1 + e) for e in [0, 1] by a polynomial (minimax in relative error: lg2.approx, with its absolute error, is not accurate
// for small e): 5e-9 and one rounding for float32 activations, 4e-7 for 16-bit ones (9e-6, two degrees less, showed in the
// states).
__device__ __forceinline__ float log1p_unit(float e) {
#if ACT == 0
  float p = -0.00331846974f;
  p = fmaf(p, e, 0.020204572f);
  p = fmaf(p, e, -0.0576644205f);
  p = fmaf(p, e, 0.106805533f);
  p = fmaf(p, e, -0.153553948f);
  p = fmaf(p, e, 0.196953997f);
  p = fmaf(p, e, -0.249585867f);
  p = fmaf(p, e, 0.33330512f);
  p = fmaf(p, e, -0.499999315f);
  return fmaf(e * e, p, e);
#else
  float p = -0.00853909647f;
  p = p * e + 0.0440892386f;
  p = p * e - 0.107681171f;
  p = p * e + 0.177452044f;
  p = p * e - 0.244954498f;
  p = p * e + 0.332754776f;
  p = p * e - 0.499974053f;
  p = p * e + 0.999999806f;
  return p * e;
#endif
}

// V ints from memory that is aligned to 4 (V a multiple of 4).
struct __align__(16) Four { int i[4]; };
template <int V> __device__ __forceinline__ void load_ints(const int* from, int to[V]) {
#pragma unroll
  for (int j = 0; j < V; j += 4) {
    const Four four = *reinterpret_cast<const Four*>(from + j);
#pragma unroll
    for (int i = 0; i < 4; i++) to[j + i] = four.i[i];
  }
}

// 16 bytes copied to shared memory past the first-level cache, and the wait for all copies that this thread began.
#ifndef VM_EMULATE
__device__ __forceinline__ void copy_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((uint32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

// softplus(v) = max(v, 0) + log(1 + exp(-|v|)): finite for every finite v, accurate for small results.
__device__ __forceinline__ float softplus(float v) {
  return fmaxf(v, 0.f) + log1p_unit(exponential(-fabsf(v)));
}

// softplus and its derivative, which share the exponential.
__device__ __forceinline__ float softplus(float v, float& derivative) {
  float e = exponential(-fabsf(v));
  float r = rcp_approx(1.f + e);
  derivative = v >= 0.f ? r : e * r;
  return fmaxf(v, 0.f) + log1p_unit(e);
}

#if ACT != 0
// log2(1 + e) / e: log1p_unit's polynomial over ln 2.
__device__ __forceinline__ float log2p1_ratio(float e) {
  float p = -0.0123193121f;
  p = fmaf(p, e, 0.0636073259f);
  p = fmaf(p, e, -0.155351091f);
  p = fmaf(p, e, 0.256009184f);
  p = fmaf(p, e, -0.35339464f);
  p = fmaf(p, e, 0.480063665f);
  p = fmaf(p, e, -0.721310087f);
  p = fmaf(p, e, 1.44269476f);
  return p;
}
// softplus(v / log2(e)) log2(e).
__device__ __forceinline__ float scaled_softplus(float v) {
  const float e = exp2_approx(-fabsf(v));
  return fmaf(e, log2p1_ratio(e), fmaxf(v, 0.f));
}
#endif

// A decay exp(Delta A). 16-bit activations take A times log2(e) once and one exponential of the special-function unit a
// step; float32 ones an accurate one.
#if ACT == 0
#define DECAY_SCALE 1.f
#define DECAY_UNSCALE 1.f
__device__ __forceinline__ float decay_of(float x, float a) { return exponential(x * a); }
#else
#define DECAY_SCALE LOG2E
#define DECAY_UNSCALE LN2
__device__ __forceinline__ float decay_of(float x, float a) { return exp2_approx(x * a); }
#endif

__device__ __forceinline__ float sigmoid(float z) {
  float e = exp2_approx(-fabsf(z) * LOG2E);
  float r = rcp_approx(1.f + e);
  return z >= 0.f ? r : e * r;
}

__device__ __forceinline__ float silu(float z) { return z * sigmoid(z); }

// Gradients of parameters are long sums whose terms, and the images' parts, may cancel. With float32 activations what
// rounding takes from dA is kept beside it, and the second stage adds that in a row of its own.
constexpr int PARAMETER_ROWS = ACT == 0 ? 2 : 1;

// Adds to a sum, and to what rounding has taken from it.
__device__ __forceinline__ void add_exactly(float& sum, float& lost, float term) {
  const float total = sum + term, part = total - sum;
  lost += (sum - (total - part)) + (term - part);
  sum = total;
}

// sum += a b; exactly, but for the product, with float32 activations.
__device__ __forceinline__ void accumulate(float& sum, float& lost, float a, float b) {
  if constexpr (PARAMETER_ROWS > 1) add_exactly(sum, lost, a * b);
  else sum += a * b;
}

// Sum M values each over `lanes` lanes (powers of two) whose numbers differ by multiples of `stride`, by halving: each
// exchange sends the half that the partner keeps, so M values cost about M shuffles, not M log(lanes).
// A lane ends with max(1, M / LANES) values summed; the first of them, kept_by(lane), is returned.
template <int M, int LANES, int STRIDE> __device__ __forceinline__ int reduce_over_lanes(float* v, int lane) {
  if constexpr (LANES == 1) {
    return 0;
  } else {
    constexpr int BIT = (LANES / 2) * STRIDE;
    if constexpr (M == 1) {
      v[0] += __shfl_xor_sync(FULL_WARP, v[0], BIT);
      return reduce_over_lanes<1, LANES / 2, STRIDE>(v, lane);
    } else {
      const bool upper = lane & BIT;
#pragma unroll
      for (int i = 0; i < M / 2; i++) {
        float send = upper ? v[i] : v[i + M / 2], keep = upper ? v[i + M / 2] : v[i];
        v[i] = keep + __shfl_xor_sync(FULL_WARP, send, BIT);
      }
      return (upper ? M / 2 : 0) + reduce_over_lanes<M / 2, LANES / 2, STRIDE>(v, lane);
    }
  }
}

template <int M, int LANES, int STRIDE> __device__ __forceinline__ int kept_by(int lane) {
  if constexpr (LANES == 1 || M == 1) return 0;
  else return (lane & (LANES / 2) * STRIDE ? M / 2 : 0) + kept_by<M / 2, LANES / 2, STRIDE>(lane);
}
