// What the backward pass of a GELU-MLP needs of its hidden layer, in one pass, and sums of columns. See kernels/README.md.
//
// A warp takes 32 VEC neighbouring columns and walks over rows, so that a lane's columns stay its own.
// Macros: ACT, VEC, AHEAD (rows that are read together).
#include "common.cuh"

constexpr int WARPS = 8, COLUMNS = 32 * VEC;

struct ColumnArgs {
  const act_t *x, *dy;    // (rows, columns)
  act_t *y, *dx;          // GELU(x), and dy times its slope
  float* sums;            // (parts, columns): of dx, or of x
  int64 rows;
  int columns, tiles, parts, pad;
};

struct Seat {
  int lane, warp, tile, part, column;
  __device__ __forceinline__ Seat(const ColumnArgs& p) {
    lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    tile = blockIdx.x % p.tiles, part = blockIdx.x / p.tiles, column = tile * COLUMNS + lane * VEC;
  }
};

// The block's row of sums, its warps' in a fixed order.
__device__ __forceinline__ void write_sums(const ColumnArgs& p, const Seat& at, const float sums[VEC]) {
  __shared__ float shared[WARPS][COLUMNS];
#pragma unroll
  for (int v = 0; v < VEC; v++) shared[at.warp][v * 32 + at.lane] = sums[v];
  __syncthreads();
  if (threadIdx.x < COLUMNS) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += shared[w][threadIdx.x];
    const int column = at.tile * COLUMNS + threadIdx.x % 32 * VEC + threadIdx.x / 32;
    if (column < p.columns) p.sums[(int64)at.part * p.columns + column] = total;
  }
}

extern "C" __global__ void __launch_bounds__(256) gelu_recompute(const __grid_constant__ ColumnArgs p) {
  const Seat at(p);
  float sums[VEC] = {};
  if (at.column < p.columns) {
    const int64 step = (int64)p.parts * WARPS;
    for (int64 row = at.part * WARPS + at.warp; row < p.rows; row += AHEAD * step) {
      Raw<VEC> raw_x[AHEAD], raw_dy[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        if (row + i * step >= p.rows) break;
        raw_x[i] = load_raw<VEC>(p.x + (row + i * step) * p.columns + at.column);
        raw_dy[i] = load_raw<VEC>(p.dy + (row + i * step) * p.columns + at.column);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        if (row + i * step >= p.rows) break;
        float x[VEC], dy[VEC], y[VEC];
        unpack(raw_x[i], x);
        unpack(raw_dy[i], dy);
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          const float normal = 0.5f * (1.f + erff(x[v] * 0.70710678f));  // the normal distribution up to x
          const float density = 0.39894228f * exp2_approx(x[v] * x[v] * (-0.5f * LOG2E));
          y[v] = x[v] * normal;
          dy[v] *= normal + x[v] * density;
          sums[v] += dy[v];
        }
        const int64 to = (row + i * step) * p.columns + at.column;
        store_act<VEC>(p.y + to, y);
        store_act<VEC>(p.dx + to, dy);
      }
    }
  }
  write_sums(p, at, sums);
}

extern "C" __global__ void __launch_bounds__(256) column_sums(const __grid_constant__ ColumnArgs p) {
  const Seat at(p);
  float sums[VEC] = {};
  if (at.column < p.columns) {
    const int64 step = (int64)p.parts * WARPS;
    for (int64 row = at.part * WARPS + at.warp; row < p.rows; row += 2 * AHEAD * step) {
      Raw<VEC> raw[2 * AHEAD];
#pragma unroll
      for (int i = 0; i < 2 * AHEAD; i++) raw[i] = row + i * step < p.rows ? load_raw<VEC>(p.x + (row + i * step) * p.columns + at.column) : raw_zero<VEC>();
#pragma unroll
      for (int i = 0; i < 2 * AHEAD; i++) {
        float x[VEC];
        unpack(raw[i], x);
#pragma unroll
        for (int v = 0; v < VEC; v++) sums[v] += x[v];
      }
    }
  }
  write_sums(p, at, sums);
}
