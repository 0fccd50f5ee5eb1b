// LayerNorm and RMSNorm of rows, with an addition to the rows or to their channels first: forward and backward. See kernels/README.md.
//
// ROW_LANES threads hold a row, each ITERS times VEC neighbouring channels, and keep their channels from row to row: weights
// are read once, and their gradients are summed in registers.
// Macros: ACT; X_FLOAT, ADDED_FLOAT, OUT_FLOAT (those rows are float32 and not ACT); ROW_LANES, ITERS, VEC; ADD; SHIFT; RMS.
#include "common.cuh"

constexpr int THREADS = 256, GROUPS = THREADS / ROW_LANES, WIDTH = ROW_LANES * VEC;

#if X_FLOAT
typedef float x_t;
#else
typedef act_t x_t;
#endif
#if ADDED_FLOAT
typedef float added_t;
#else
typedef act_t added_t;
#endif
#if OUT_FLOAT
typedef float out_t;
#else
typedef act_t out_t;
#endif

struct NormArgs {
  const x_t* x;              // (rows, C); in the backward the sum that was normalised
  const added_t* added;      // (rows, C), or null
  const float *weight, *bias;
  const float* shift;        // (C), or null: added to every row
  out_t* out;                // (rows, C)
  x_t* total;                // (rows, C), or null: x + scale added
  const out_t* dout;
  const x_t* dtotal;         // or null
  x_t* dx;
  added_t* dadded;           // or null
  float* dparams;            // (blocks, C) for the weight, those for the bias, those for the shift, row by row
  int64 rows, blocks;
  int C, eps_bits, scale_bits, has_bias;
};

template <class T> struct Type {};
__device__ __forceinline__ void load_values(const float* p, float* f, Type<float>) { load_floats<VEC>(p, f); }
__device__ __forceinline__ void store_values(float* p, const float* f, Type<float>) { store_floats<VEC>(p, f); }
#if ACT != 0
__device__ __forceinline__ void load_values(const act_t* p, float* f, Type<act_t>) { unpack(load_raw<VEC>(p), f); }
__device__ __forceinline__ void store_values(act_t* p, const float* f, Type<act_t>) { store_act<VEC>(p, f); }
#endif
template <class T> __device__ __forceinline__ void load_row(const T* row, int lane, int C, float f[ITERS][VEC]) {
#pragma unroll
  for (int i = 0; i < ITERS; i++) {
    const int column = i * WIDTH + lane * VEC;
    if (column < C) {
      load_values(row + column, f[i], Type<T>());
    } else {
#pragma unroll
      for (int v = 0; v < VEC; v++) f[i][v] = 0.f;
    }
  }
}
template <class T> __device__ __forceinline__ void store_row(T* row, int lane, int C, const float f[ITERS][VEC]) {
#pragma unroll
  for (int i = 0; i < ITERS; i++) {
    const int column = i * WIDTH + lane * VEC;
    if (column < C) store_values(row + column, f[i], Type<T>());
  }
}

// The sum over a row of what its lanes hold.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int bit = ROW_LANES / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(FULL_WARP, x, bit);
  return x;
}

#if SHIFT
__device__ __forceinline__ void add(float f[ITERS][VEC], const float g[ITERS][VEC]) {
#pragma unroll
  for (int i = 0; i < ITERS; i++)
#pragma unroll
    for (int v = 0; v < VEC; v++) f[i][v] += g[i][v];
}
#endif

// Replace a row by its normal form; returns the reciprocal deviation. Columns past C stay 0.
__device__ __forceinline__ float normalise(float f[ITERS][VEC], int lane, int C, float eps) {
  const float share = 1.f / C;
#if !RMS
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < ITERS; i++)
#pragma unroll
    for (int v = 0; v < VEC; v++) sum += f[i][v];
  const float mean = row_sum(sum) * share;
#pragma unroll
  for (int i = 0; i < ITERS; i++)
#pragma unroll
    for (int v = 0; v < VEC; v++) f[i][v] = i * WIDTH + lane * VEC < C ? f[i][v] - mean : 0.f;
#endif
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < ITERS; i++)
#pragma unroll
    for (int v = 0; v < VEC; v++) squares += f[i][v] * f[i][v];
  const float rstd = 1.f / sqrtf(row_sum(squares) * share + eps);
#pragma unroll
  for (int i = 0; i < ITERS; i++)
#pragma unroll
    for (int v = 0; v < VEC; v++) f[i][v] *= rstd;
  return rstd;
}

extern "C" __global__ void __launch_bounds__(256) norm_forward(const __grid_constant__ NormArgs p) {
  const int lane = threadIdx.x % ROW_LANES, C = p.C;
  const float eps = bits_to_float((uint32)p.eps_bits);
  float weight[ITERS][VEC], bias[ITERS][VEC];
  load_row(p.weight, lane, C, weight);
  if (p.has_bias) load_row(p.bias, lane, C, bias);
#if SHIFT
  float shift[ITERS][VEC];
  load_row(p.shift, lane, C, shift);
#endif
  for (int64 first = (int64)blockIdx.x * GROUPS; first < p.rows; first += p.blocks * GROUPS) {
    const int64 row = first + threadIdx.x / ROW_LANES;
    const bool present = row < p.rows;  // all lanes of a warp take part in its sums
    const int64 at = (present ? row : first) * C;
    float f[ITERS][VEC];
    load_row(p.x + at, lane, C, f);
#if SHIFT
    add(f, shift);
#endif
#if ADD
    const float scale = bits_to_float((uint32)p.scale_bits);
    float g[ITERS][VEC];
    load_row(p.added + at, lane, C, g);
#pragma unroll
    for (int i = 0; i < ITERS; i++)
#pragma unroll
      for (int v = 0; v < VEC; v++) f[i][v] += scale * g[i][v];
    if (present) store_row(p.total + at, lane, C, f);
#endif
    normalise(f, lane, C, eps);
#pragma unroll
    for (int i = 0; i < ITERS; i++)
#pragma unroll
      for (int v = 0; v < VEC; v++) f[i][v] = p.has_bias ? f[i][v] * weight[i][v] + bias[i][v] : f[i][v] * weight[i][v];
    if (present) store_row(p.out + at, lane, C, f);
  }
}

// Sum what the rows' groups of a block hold for each channel, in a fixed order, and write the block's row of `to`.
__device__ __forceinline__ void block_sums(const float f[ITERS][VEC], int lane, int C, float* to) {
  __shared__ float sums[THREADS / 32][WIDTH];
#pragma unroll
  for (int i = 0; i < ITERS; i++) {
    float total[VEC];
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      total[v] = f[i][v];
#pragma unroll
      for (int bit = 16; bit >= ROW_LANES; bit /= 2) total[v] += __shfl_xor_sync(FULL_WARP, total[v], bit);
    }
    if ((threadIdx.x & 31) < ROW_LANES) {
#pragma unroll
      for (int v = 0; v < VEC; v++) sums[threadIdx.x >> 5][lane * VEC + v] = total[v];
    }
    __syncthreads();
    if (threadIdx.x < WIDTH && i * WIDTH + (int)threadIdx.x < C) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < THREADS / 32; w++) sum += sums[w][threadIdx.x];
      to[i * WIDTH + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(256) norm_backward(const __grid_constant__ NormArgs p) {
  const int lane = threadIdx.x % ROW_LANES, C = p.C;
  const float eps = bits_to_float((uint32)p.eps_bits), scale = bits_to_float((uint32)p.scale_bits), share = 1.f / C;
  float weight[ITERS][VEC], dweight[ITERS][VEC], dbias[ITERS][VEC];
  load_row(p.weight, lane, C, weight);
#pragma unroll
  for (int i = 0; i < ITERS; i++)
#pragma unroll
    for (int v = 0; v < VEC; v++) dweight[i][v] = dbias[i][v] = 0.f;
#if SHIFT
  float shift[ITERS][VEC], dshift[ITERS][VEC] = {};
  load_row(p.shift, lane, C, shift);
#endif
  for (int64 first = (int64)blockIdx.x * GROUPS; first < p.rows; first += p.blocks * GROUPS) {
    const int64 row = first + threadIdx.x / ROW_LANES;
    const bool present = row < p.rows;
    const int64 at = (present ? row : first) * C;
    float f[ITERS][VEC], g[ITERS][VEC];
    load_row(p.x + at, lane, C, f);
    load_row(p.dout + at, lane, C, g);
#if SHIFT
    add(f, shift);
#endif
    const float rstd = normalise(f, lane, C, eps);
    float mean = 0.f, along = 0.f;  // of the gradient, and of its product with the normal form
#pragma unroll
    for (int i = 0; i < ITERS; i++)
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        dweight[i][v] += present ? g[i][v] * f[i][v] : 0.f;
#if !RMS
        dbias[i][v] += present ? g[i][v] : 0.f;
#endif
        g[i][v] *= weight[i][v];
        mean += g[i][v];
        along += g[i][v] * f[i][v];
      }
    along = row_sum(along) * share;
    mean = RMS ? 0.f : row_sum(mean) * share;
#pragma unroll
    for (int i = 0; i < ITERS; i++)
#pragma unroll
      for (int v = 0; v < VEC; v++) g[i][v] = rstd * (g[i][v] - mean - f[i][v] * along);
    if (p.dtotal != nullptr) {
      load_row(p.dtotal + at, lane, C, f);
#pragma unroll
      for (int i = 0; i < ITERS; i++)
#pragma unroll
        for (int v = 0; v < VEC; v++) g[i][v] += f[i][v];
    }
    if (present) store_row(p.dx + at, lane, C, g);
#if SHIFT
    if (present) add(dshift, g);
#endif
#if ADD
#pragma unroll
    for (int i = 0; i < ITERS; i++)
#pragma unroll
      for (int v = 0; v < VEC; v++) g[i][v] *= scale;
    if (present) store_row(p.dadded + at, lane, C, g);
#endif
  }
  const int width = (RMS ? 1 : 2) * C + SHIFT * C;
  block_sums(dweight, lane, C, p.dparams + (int64)blockIdx.x * width);
#if !RMS
  block_sums(dbias, lane, C, p.dparams + (int64)blockIdx.x * width + C);
#endif
#if SHIFT
  block_sums(dshift, lane, C, p.dparams + (int64)blockIdx.x * width + width - C);
#endif
}
