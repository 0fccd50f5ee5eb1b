// The step sizes' low-rank projection, delta = W x for each token and direction, and its gradients. See kernels/README.md.
//
// A warp takes VEC channels a lane of one direction and walks over tokens; a token's R values go round by shuffles. The
// gradients of x and of W come from one reading of delta's gradient, which is the largest tensor by far.
// Macros: ACT, RANK, VEC.
#include "common.cuh"

constexpr int AHEAD = 4, AHEAD_BACKWARD = 2;  // rows of a warp whose values are read together
constexpr int WARPS = 8, CHANNELS = 32 * VEC, HELD = (RANK + 31) / 32;
__device__ constexpr int padded(int n) { return n <= 1 ? 1 : 2 * padded((n + 1) / 2); }
constexpr int PADDED = padded(RANK), KEPT = PADDED > 32 ? PADDED / 32 : 1, REPEATS = PADDED < 32 ? 32 / PADDED : 1;

struct DtArgs {
  const act_t* x;            // (rows, K, R), with strides
  const float* weight;       // (K, D, R)
  float* delta;              // (rows, K, D): the result, or its gradient
  float* dx;                 // (tiles, rows, K, R): the sums over the tiles' channels
  float* dweight;            // (chunks, K, D, R)
  int64 rows, x_row, x_k;
  int K, D, tiles, chunk;    // rows of a block
};

// What a block works on: rows [first, end) of direction k, and VEC channels a lane.
struct Seat {
  int lane, warp, k, tile, channel;
  bool present;
  int64 part, first, end;
  __device__ __forceinline__ Seat(const DtArgs& p) {
    lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    tile = (int)(blockIdx.x % p.tiles), k = (int)(blockIdx.x / p.tiles % p.K), part = blockIdx.x / p.tiles / p.K;
    channel = tile * CHANNELS + lane * VEC, present = channel < p.D;
    first = part * p.chunk, end = min(first + p.chunk, p.rows);
  }
};

// A token's values, one or more a lane.
__device__ __forceinline__ void load_token(const DtArgs& p, const Seat& at, int64 row, float x[HELD]) {
  const act_t* from = p.x + row * p.x_row + at.k * p.x_k;
#pragma unroll
  for (int i = 0; i < HELD; i++) x[i] = i * 32 + at.lane < RANK ? to_float(from[i * 32 + at.lane]) : 0.f;
}

__device__ __forceinline__ void load_channels(const float* from, bool present, float f[VEC]) {
  if (present) {
    load_floats<VEC>(from, f);
  } else {
#pragma unroll
    for (int v = 0; v < VEC; v++) f[v] = 0.f;
  }
}

// The weight of a block's channels as [r][channel], zero past the last channel.
__device__ __forceinline__ void load_weight(const DtArgs& p, int64 from, int channels, float* weight) {
  for (int i = threadIdx.x; i < RANK * CHANNELS; i += 32 * WARPS) {
    const int channel = i / RANK, r = i % RANK;
    weight[r * CHANNELS + channel] = channel < channels ? p.weight[from + i] : 0.f;
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(256) dt_expand(const __grid_constant__ DtArgs p) {
  const Seat at(p);
  __align__(16) __shared__ float weight[RANK * CHANNELS];
  load_weight(p, ((int64)at.k * p.D + at.tile * CHANNELS) * RANK, min(CHANNELS, p.D - at.tile * CHANNELS), weight);
  float w[RANK][VEC];
#pragma unroll
  for (int r = 0; r < RANK; r++) load_floats<VEC>(weight + r * CHANNELS + at.lane * VEC, w[r]);
  for (int64 begin = at.first + at.warp; begin < at.end; begin += AHEAD * WARPS) {
    float x[AHEAD][HELD];  // loads of several rows are under way at a time
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (begin + i * WARPS < at.end) load_token(p, at, begin + i * WARPS, x[i]);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int64 row = begin + i * WARPS;
      if (row >= at.end) break;
      float delta[VEC];
#pragma unroll
      for (int v = 0; v < VEC; v++) delta[v] = 0.f;
#pragma unroll
      for (int r = 0; r < RANK; r++) {
        const float value = __shfl_sync(FULL_WARP, x[i][r / 32], r % 32);
#pragma unroll
        for (int v = 0; v < VEC; v++) delta[v] += value * w[r][v];
      }
      if (at.present) store_floats<VEC>(p.delta + (row * p.K + at.k) * p.D + at.channel, delta);
    }
  }
}

extern "C" __global__ void __launch_bounds__(256) dt_backward(const __grid_constant__ DtArgs p) {
  __align__(16) __shared__ float weight[RANK * CHANNELS];  // [r][channel]; then the sums of dweight
  const Seat at(p);
  const int64 from = ((int64)at.k * p.D + at.tile * CHANNELS) * RANK;
  const int channels = min(CHANNELS, p.D - at.tile * CHANNELS);
  load_weight(p, from, channels, weight);
  float dweight[RANK][VEC];
#pragma unroll
  for (int r = 0; r < RANK; r++)
#pragma unroll
    for (int v = 0; v < VEC; v++) dweight[r][v] = 0.f;
  float* dx = p.dx + (int64)at.tile * p.rows * p.K * RANK;
  for (int64 begin = at.first + at.warp; begin < at.end; begin += AHEAD_BACKWARD * WARPS) {
    float g[AHEAD_BACKWARD][VEC], x[AHEAD_BACKWARD][HELD];
#pragma unroll
    for (int i = 0; i < AHEAD_BACKWARD; i++) {
      const int64 row = begin + i * WARPS;
      if (row >= at.end) break;
      load_channels(p.delta + (row * p.K + at.k) * p.D + at.channel, at.present, g[i]);
      load_token(p, at, row, x[i]);
    }
#pragma unroll
    for (int i = 0; i < AHEAD_BACKWARD; i++) {
      const int64 row = begin + i * WARPS;
      if (row >= at.end) break;
      float sums[PADDED];
#pragma unroll
      for (int r = RANK; r < PADDED; r++) sums[r] = 0.f;
#pragma unroll
      for (int r = 0; r < RANK; r++) {
        const float value = __shfl_sync(FULL_WARP, x[i][r / 32], r % 32);
        float w[VEC];
        load_floats<VEC>(weight + r * CHANNELS + at.lane * VEC, w);
        sums[r] = 0.f;
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          sums[r] += g[i][v] * w[v];
          dweight[r][v] += g[i][v] * value;
        }
      }
      const int r = reduce_over_lanes<PADDED, 32, 1>(sums, at.lane);
      if (at.lane % REPEATS == 0) {
#pragma unroll
        for (int j = 0; j < KEPT; j++)
          if (r + j < RANK) dx[(row * p.K + at.k) * RANK + r + j] = sums[j];
      }
    }
  }
  for (int warp = 0; warp < WARPS; warp++) {  // one after the other, so that the order is fixed
    __syncthreads();
    if (warp != at.warp) continue;
#pragma unroll
    for (int r = 0; r < RANK; r++)
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        float* sum = weight + r * CHANNELS + at.lane * VEC + v;
        *sum = warp == 0 ? dweight[r][v] : *sum + dweight[r][v];
      }
  }
  __syncthreads();
  float* to = p.dweight + at.part * p.K * p.D * RANK + from;
  for (int i = threadIdx.x; i < RANK * channels; i += 32 * WARPS) to[i] = weight[i % RANK * CHANNELS + i / RANK];
}
