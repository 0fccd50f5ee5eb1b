// Causal depthwise convolution along a path, with SiLU: forward and backward. See kernels/README.md.
//
// A thread takes VEC neighbouring channels of CHUNK consecutive steps and slides a window of WIDTH inputs along them.
// Macros: ACT, WIDTH, VEC, CHUNK, SILU, SEQUENCES (taps in another sequence than the step's read 0), PARTIAL (the input's
// gradient is written as one float32 part a direction, which a second kernel sums).
#include "common.cuh"

__device__ __forceinline__ float silu_slope(float z) {
  float s = sigmoid(z);
  return s * (1.f + z * (1.f - s));
}

constexpr int PAST = WIDTH - 1;

struct ConvArgs {
  const act_t *x, *dout;
  const float *weight, *bias;      // (K, D, W), (K, D); bias may be null
  const int *order, *counts;       // (K, P), (K): steps of each direction
  const int* sequence;             // (B, L), or null
  const float *initial, *dfinal;   // (B, K, D, W - 1), or null for zero
  act_t *out, *final_states;       // (B, L, K, D), (B, K, D, W - 1)
  void* dx;                        // act_t, or float with PARTIAL
  float *dinitial, *dparams;       // (B, K, D, W - 1) or null; (B chunks, K D (W + 1)): dweight, dbias
  int64 x_b, dout_b, dx_b, total;  // strides: _b and _k in elements, _l in bytes; total threads that have work
  int x_l, x_k, dout_l, dout_k, dx_l, dx_k;
  int L, P, D, K, chunks, pad;
};

struct Seat {
  int b, k, chunk, channel, first, count;
  int64 bk;
  __device__ __forceinline__ Seat(const ConvArgs& p, int64 index) {
    const int columns = p.D / VEC;
    channel = (int)(index % columns) * VEC; index /= columns;
    chunk = (int)(index % p.chunks); index /= p.chunks;
    k = (int)(index % p.K);
    b = (int)(index / p.K);
    bk = (int64)b * p.K + k;
    first = chunk * CHUNK;
    count = p.counts[k];
  }
  __device__ __forceinline__ int token(const ConvArgs& p, int step) const { return p.order[(int64)k * p.P + step]; }
};

// The input at a step, which may lie before the first one.
__device__ __forceinline__ void load_input(const ConvArgs& p, const Seat& at, const act_t* x, int step, float f[VEC]) {
  if (step >= 0) {
    unpack(load_raw<VEC>(row_of(x, at.token(p, step), p.x_l)), f);
  } else {
#pragma unroll
    for (int v = 0; v < VEC; v++)
      f[v] = p.initial != nullptr && step >= -PAST ? p.initial[(at.bk * p.D + at.channel + v) * PAST + PAST + step] : 0.f;
  }
}

__device__ __forceinline__ int load_sequence(const ConvArgs& p, const Seat& at, int step) {
#if SEQUENCES
  return p.sequence[(int64)at.b * p.L + at.token(p, max(step, 0))];
#else
  return 0;
#endif
}

__device__ __forceinline__ void load_weights(const ConvArgs& p, const Seat& at, float w[WIDTH][VEC], float bias[VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    const int64 kd = (int64)at.k * p.D + at.channel + v;
#pragma unroll
    for (int j = 0; j < WIDTH; j++) w[j][v] = p.weight[kd * WIDTH + j];
    bias[v] = p.bias != nullptr ? p.bias[kd] : 0.f;
  }
}

// bias + sum_i w_i x_i over the window; w_{W-1} weighs the current step.
__device__ __forceinline__ void convolve(const float w[WIDTH][VEC], const float bias[VEC], const float x[WIDTH][VEC], const int sequence[WIDTH], float total[VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; v++) total[v] = bias[v];
#pragma unroll
  for (int i = 0; i < WIDTH; i++) {
    const bool same = !SEQUENCES || sequence[i] == sequence[WIDTH - 1];
#pragma unroll
    for (int v = 0; v < VEC; v++) total[v] += same ? w[i][v] * x[i][v] : 0.f;
  }
}

template <class T, int ROWS> __device__ __forceinline__ void shift(T window[ROWS]) {
#pragma unroll
  for (int i = 0; i + 1 < ROWS; i++) window[i] = window[i + 1];
}
template <int ROWS> __device__ __forceinline__ void shift(float window[ROWS][VEC]) {
#pragma unroll
  for (int i = 0; i + 1 < ROWS; i++)
#pragma unroll
    for (int v = 0; v < VEC; v++) window[i][v] = window[i + 1][v];
}

extern "C" __global__ void __launch_bounds__(128) conv_forward(const __grid_constant__ ConvArgs p) {
  const int64 index = (int64)blockIdx.x * 128 + threadIdx.x;
  if (index >= p.total) return;
  const Seat at(p, index);
  const act_t* x = p.x + at.b * p.x_b + (int64)at.k * p.x_k + at.channel;
  act_t* out = p.out + ((int64)at.b * p.L * p.K + at.k) * p.D + at.channel;
  float w[WIDTH][VEC], bias[VEC], window[WIDTH][VEC];
  int sequence[WIDTH];
  load_weights(p, at, w, bias);
#pragma unroll
  for (int i = 0; i < PAST; i++) {
    const int step = at.first - PAST + i;
    if (step < at.count) load_input(p, at, x, step, window[i + 1]);
    sequence[i + 1] = step < at.count && at.count > 0 ? load_sequence(p, at, step) : 0;
  }
#pragma unroll 4
  for (int i = 0; i < CHUNK; i++) {
    const int step = at.first + i;
    if (step >= at.count) break;
    shift<WIDTH>(window);
    shift<int, WIDTH>(sequence);
    load_input(p, at, x, step, window[PAST]);
    sequence[PAST] = load_sequence(p, at, step);
    float y[VEC];
    convolve(w, bias, window, sequence, y);
#if SILU
#pragma unroll
    for (int v = 0; v < VEC; v++) y[v] = silu(y[v]);
#endif
    store_act<VEC>(row_of(out, at.token(p, step), p.K * p.D * (int)sizeof(act_t)), y);
  }
  if (at.chunk != 0) return;
#pragma unroll
  for (int i = 0; i < PAST; i++) {
    float f[VEC];
    load_input(p, at, x, at.count - PAST + i, f);
#pragma unroll
    for (int v = 0; v < VEC; v++) p.final_states[(at.bk * p.D + at.channel + v) * PAST + i] = from_float(f[v]);
  }
}

extern "C" __global__ void __launch_bounds__(128) conv_backward(const __grid_constant__ ConvArgs p) {
  const int64 index = (int64)blockIdx.x * 128 + threadIdx.x;
  if (index >= p.total) return;
  const Seat at(p, index);
  const act_t* x = p.x + at.b * p.x_b + (int64)at.k * p.x_k + at.channel;
  const act_t* dout = p.dout + at.b * p.dout_b + (int64)at.k * p.dout_k + at.channel;
  const int64 dx_offset = at.b * p.dx_b + (int64)at.k * p.dx_k + at.channel;
  float w[WIDTH][VEC], bias[VEC], window[WIDTH][VEC], dtotal[WIDTH][VEC], dw[WIDTH][VEC], dbias[VEC];
  int sequence[WIDTH];  // of the window; before it shifts in, entry 0 belongs to the step whose dx is complete
  load_weights(p, at, w, bias);
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    dbias[v] = 0.f;
#pragma unroll
    for (int j = 0; j < WIDTH; j++) dw[j][v] = dtotal[j][v] = 0.f;
  }
  // The gradients of the first chunk's initial states come out as those of the steps before its first.
  const int begin = at.chunk == 0 ? -PAST : at.first, end = min(at.first + CHUNK, at.count);
#pragma unroll
  for (int i = 0; i < PAST; i++) {
    const int step = at.first - PAST + i;
    if (step < at.count) load_input(p, at, x, step, window[i + 1]);
    sequence[i + 1] = step < at.count && at.count > 0 ? load_sequence(p, at, step) : 0;
  }
#pragma unroll 2
  for (int step = at.first; step < at.first + CHUNK + PAST; step++) {
    if (step - PAST >= end) break;
    shift<WIDTH>(window);
    shift<WIDTH>(dtotal);
    shift<int, WIDTH>(sequence);
#pragma unroll
    for (int v = 0; v < VEC; v++) dtotal[PAST][v] = 0.f;
    if (step < at.count) {
      load_input(p, at, x, step, window[PAST]);
      sequence[PAST] = load_sequence(p, at, step);
      unpack(load_raw<VEC>(row_of(dout, at.token(p, step), p.dout_l)), dtotal[PAST]);
#if SILU
      float total[VEC];
      convolve(w, bias, window, sequence, total);
#pragma unroll
      for (int v = 0; v < VEC; v++) dtotal[PAST][v] *= silu_slope(total[v]);
#endif
      if (step < at.first + CHUNK) {
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
          const bool same = !SEQUENCES || sequence[j] == sequence[PAST];
#pragma unroll
          for (int v = 0; v < VEC; v++) dw[j][v] += same ? dtotal[PAST][v] * window[j][v] : 0.f;
        }
#pragma unroll
        for (int v = 0; v < VEC; v++) dbias[v] += dtotal[PAST][v];
      }
    }
    // dx of the step that has just got its last contribution: sum_j w_{W-1-j} dtotal_{s+j}
    const int done = step - PAST;
    if (done < begin || done >= end) continue;
    float f[VEC];
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      f[v] = 0.f;
#pragma unroll
      for (int j = 0; j < WIDTH; j++) {
        const bool same = !SEQUENCES || sequence[0] == sequence[j];
        f[v] += same ? w[PAST - j][v] * dtotal[j][v] : 0.f;
      }
      const int in_final = done - (at.count - PAST);
      if (p.dfinal != nullptr && in_final >= 0) f[v] += p.dfinal[(at.bk * p.D + at.channel + v) * PAST + in_final];
    }
    if (done < 0) {
#pragma unroll
      for (int v = 0; v < VEC; v++)
        if (p.dinitial != nullptr) p.dinitial[(at.bk * p.D + at.channel + v) * PAST + PAST + done] = f[v];
    } else {
#if PARTIAL
      store_floats<VEC>(row_of((float*)p.dx + dx_offset, at.token(p, done), p.dx_l), f);
#else
      store_act<VEC>(row_of((act_t*)p.dx + dx_offset, at.token(p, done), p.dx_l), f);
#endif
    }
  }
  const int64 KD = (int64)p.K * p.D, kd = (int64)at.k * p.D + at.channel;
  float* dparams = p.dparams + ((int64)at.b * p.chunks + at.chunk) * KD * (WIDTH + 1);
#pragma unroll
  for (int v = 0; v < VEC; v++) {
#pragma unroll
    for (int j = 0; j < WIDTH; j++) dparams[(kd + v) * WIDTH + j] = dw[j][v];
    dparams[KD * WIDTH + kd + v] = dbias[v];
  }
}
