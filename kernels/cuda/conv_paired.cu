// Causal depthwise convolutions of the same tokens along a direction and its reverse, with SiLU: forward and backward, both
// directions from one reading. See kernels/README.md.
//
// A lane takes VEC neighbouring channels, a warp consecutive steps of the first direction. At step s the inputs of steps
// s - W + 1 .. s are what the first direction's output at s and the reverse's at s - W + 1 are made of.
// Macros: ACT, WIDTH, VEC, AHEAD (steps whose rows are read together), WARPS, MIN_BLOCKS
// (blocks of the backward a multiprocessor that registers must suffice for), SILU.
#include "common.cuh"

constexpr int PAST = WIDTH - 1, CHANNELS = 32 * VEC;

struct PairedArgs {
  const act_t *x, *dout;         // (B, L, D), (B, L, 2, D)
  const float *weight, *bias;    // (2, D, W), (2, D) or null
  const int* order;              // (P): the first direction
  act_t *out, *final_states;     // (B, L, 2, D), (B, 2, D, W - 1)
  act_t* dx;                     // (B, L, D)
  float* dparams;                // (B groups, 2 D (W + 1)): dweight, dbias
  int64 x_b, dout_b, dx_b;       // strides: _b and _k in elements, _l in bytes
  int x_l, dout_l, dout_k, dx_l;
  int P, D, tiles, groups, chunk, pad;  // a block: a tile of channels, and a group of WARPS chunks of `chunk` steps
};

struct Seat {
  int b, group, channel, lane, warp, first, end;
  bool present;
  __device__ __forceinline__ Seat(const PairedArgs& p) {
    int64 block = blockIdx.x;
    lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    channel = (int)(block % p.tiles) * CHANNELS + lane * VEC; block /= p.tiles;
    group = (int)(block % p.groups);
    b = (int)(block / p.groups);
    first = min((group * WARPS + warp) * p.chunk, p.P), end = min(first + p.chunk, p.P);
    present = channel < p.D;
    if (!present) channel = 0;
  }
};

// The tokens of AHEAD steps and of the PAST steps before them, -1 where there is none.
struct Tokens {
  int at[PAST + AHEAD];
  __device__ __forceinline__ void load(const PairedArgs& p, int step) {
#pragma unroll
    for (int i = 0; i < PAST + AHEAD; i++) {
      const int s = step - PAST + i;
      at[i] = s >= 0 && s < p.P ? p.order[s] : -1;
    }
  }
};

__device__ __forceinline__ Raw<VEC> load_row(const act_t* base, int token, int stride) {
  return token >= 0 ? load_raw<VEC>(row_of(base, token, stride)) : raw_zero<VEC>();
}

struct Weights {
  float w[2][WIDTH][VEC], bias[2][VEC];
  __device__ __forceinline__ Weights(const PairedArgs& p, int channel) {
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const int kd = k * p.D + channel + v;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) w[k][j][v] = p.weight[kd * WIDTH + j];
        bias[k][v] = p.bias != nullptr ? p.bias[kd] : 0.f;
      }
  }
};

template <int ROWS> __device__ __forceinline__ void shift(float window[ROWS][VEC]) {
#pragma unroll
  for (int i = 0; i + 1 < ROWS; i++)
#pragma unroll
    for (int v = 0; v < VEC; v++) window[i][v] = window[i + 1][v];
}

// What the two directions' outputs are before SiLU: of the window's last step and, of the reverse, its first.
__device__ __forceinline__ void convolve(const Weights& weights, const float x[WIDTH][VEC], float ahead[VEC], float back[VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    ahead[v] = weights.bias[0][v], back[v] = weights.bias[1][v];
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
      ahead[v] += weights.w[0][j][v] * x[j][v];
      back[v] += weights.w[1][j][v] * x[PAST - j][v];
    }
  }
}

__device__ __forceinline__ float plain_sigmoid(float z) { return rcp_approx(1.f + exp2_approx(z * -LOG2E)); }

__device__ __forceinline__ void first_window(const PairedArgs& p, const act_t* x, int first, float window[WIDTH][VEC]) {
#pragma unroll
  for (int i = 0; i < PAST; i++) {
    const int s = first - PAST + i;
    unpack(load_row(x, s >= 0 && s < p.P ? p.order[s] : -1, p.x_l), window[i + 1]);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) paired_forward(const __grid_constant__ PairedArgs p) {
  const Seat at(p);
  const act_t* x = p.x + at.b * p.x_b + at.channel;
  const int row = 2 * p.D * (int)sizeof(act_t);
  act_t* out = p.out + (int64)at.b * p.P * 2 * p.D + at.channel;
  const Weights weights(p, at.channel);
  float window[WIDTH][VEC];
  first_window(p, x, at.first, window);
  Tokens tokens, next;
  Raw<VEC> raw[AHEAD];
  tokens.load(p, at.first);
  const int end = at.first < at.end ? at.end + PAST : at.first;
  for (int step = at.first; step < end; step += AHEAD) {
    next.load(p, step + AHEAD);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) raw[i] = load_row(x, tokens.at[PAST + i], p.x_l);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int s = step + i, t = s - PAST;
      shift<WIDTH>(window);
      unpack(raw[i], window[PAST]);
      float ahead[VEC], back[VEC];
      convolve(weights, window, ahead, back);
#if SILU
#pragma unroll
      for (int v = 0; v < VEC; v++) ahead[v] *= plain_sigmoid(ahead[v]), back[v] *= plain_sigmoid(back[v]);
#endif
      if (at.present && s < at.end) store_act<VEC>(row_of(out, tokens.at[PAST + i], row), ahead);
      if (at.present && t >= at.first && t < at.end) store_act<VEC>(row_of(out + p.D, tokens.at[i], row), back);
    }
    tokens = next;
  }
  if (at.group != 0 || at.warp != 0 || !at.present) return;
#pragma unroll
  for (int i = 0; i < PAST; i++) {  // the last inputs of each direction, oldest first
    const int steps[2] = {p.P - PAST + i, PAST - 1 - i};
#pragma unroll
    for (int k = 0; k < 2; k++) {
      float f[VEC];
      unpack(load_row(x, steps[k] >= 0 && steps[k] < p.P ? p.order[steps[k]] : -1, p.x_l), f);
#pragma unroll
      for (int v = 0; v < VEC; v++) p.final_states[(((int64)at.b * 2 + k) * p.D + at.channel + v) * PAST + i] = from_float(f[v]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) paired_backward(const __grid_constant__ PairedArgs p) {
  const Seat at(p);
  const act_t* x = p.x + at.b * p.x_b + at.channel;
  const act_t* dahead = p.dout + at.b * p.dout_b + at.channel;
  const act_t* dback = dahead + p.dout_k;
  act_t* dx = p.dx + at.b * p.dx_b + at.channel;
  const Weights weights(p, at.channel);
  float window[WIDTH][VEC], d[2][WIDTH][VEC], sums[2][WIDTH + 1][VEC];  // sums: dweight, dbias
#pragma unroll
  for (int k = 0; k < 2; k++)
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      sums[k][WIDTH][v] = 0.f;
#pragma unroll
      for (int j = 0; j < WIDTH; j++) d[k][j][v] = sums[k][j][v] = 0.f;
    }
  first_window(p, x, at.first, window);
  Tokens tokens, next;
  struct Rows {
    Raw<VEC> x, ahead, back;
  } raw[AHEAD];
  tokens.load(p, at.first);
  const int end = at.first < at.end ? at.end + PAST : at.first;
  for (int step = at.first; step < end; step += AHEAD) {
    next.load(p, step + AHEAD);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      raw[i].x = load_row(x, tokens.at[PAST + i], p.x_l);
      raw[i].ahead = load_row(dahead, tokens.at[PAST + i], p.dout_l);
      raw[i].back = load_row(dback, tokens.at[i], p.dout_l);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int s = step + i, t = s - PAST;
      shift<WIDTH>(window), shift<WIDTH>(d[0]), shift<WIDTH>(d[1]);
      unpack(raw[i].x, window[PAST]);
      unpack(raw[i].ahead, d[0][PAST]);
      unpack(raw[i].back, d[1][PAST]);
#if SILU
      float total[2][VEC];
      convolve(weights, window, total[0], total[1]);
#pragma unroll
      for (int k = 0; k < 2; k++)
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          const float sigma = plain_sigmoid(total[k][v]);
          d[k][PAST][v] *= sigma * (1.f + total[k][v] * (1.f - sigma));
        }
#endif
      if (s < at.end) {
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          sums[0][WIDTH][v] += d[0][PAST][v];
#pragma unroll
          for (int j = 0; j < WIDTH; j++) sums[0][j][v] += d[0][PAST][v] * window[j][v];
        }
      }
      if (t >= at.first && t < at.end) {
        float f[VEC];
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          sums[1][WIDTH][v] += d[1][PAST][v];
          f[v] = 0.f;
#pragma unroll
          for (int j = 0; j < WIDTH; j++) {
            sums[1][j][v] += d[1][PAST][v] * window[PAST - j][v];
            f[v] += weights.w[0][PAST - j][v] * d[0][j][v] + weights.w[1][j][v] * d[1][j][v];
          }
        }
        if (at.present) store_act<VEC>(row_of(dx, tokens.at[i], p.dx_l), f);
      }
    }
    tokens = next;
  }
  // The warps' sums one after the other, so that the order is fixed.
  __shared__ float shared[2 * (WIDTH + 1)][CHANNELS];
  for (int warp = 0; warp < WARPS; warp++) {
    if (warp > 0) __syncthreads();
    if (warp != at.warp) continue;
#pragma unroll
    for (int i = 0; i < 2 * (WIDTH + 1); i++)
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        float* sum = &shared[i][v * 32 + at.lane];
        const float own = sums[i / (WIDTH + 1)][i % (WIDTH + 1)][v];
        *sum = warp == 0 ? own : *sum + own;
      }
  }
  __syncthreads();
  float* dparams = p.dparams + ((int64)at.b * p.groups + at.group) * 2 * p.D * (WIDTH + 1);
  const int tile = (int)(blockIdx.x % p.tiles) * CHANNELS, width = min(CHANNELS, p.D - tile);
  for (int i = threadIdx.x; i < 2 * width * WIDTH; i += WARPS * 32) {
    const int k = i / (width * WIDTH), in = i - k * width * WIDTH, c = in / WIDTH;
    dparams[((int64)k * p.D + tile) * WIDTH + in] = shared[k * (WIDTH + 1) + in % WIDTH][c % VEC * 32 + c / VEC];
  }
  for (int i = threadIdx.x; i < 2 * width; i += WARPS * 32) {
    const int k = i / width, c = i - k * width;
    dparams[(int64)2 * p.D * WIDTH + k * p.D + tile + c] = shared[k * (WIDTH + 1) + WIDTH][c % VEC * 32 + c / VEC];
  }
}
