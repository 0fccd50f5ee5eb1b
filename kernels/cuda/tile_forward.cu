// The forward of the scan with one state a channel. See tile_scan.cuh and kernels/README.md.
#include "common.cuh"
#include "tile_scan.cuh"

// What a thread reads of its STEPS steps, as loaded. Steps without a token read token 0; their Delta is set to zero
// instead, which leaves the state as it is, and their output is not written.
struct Round {
  int token[STEPS];
  Raw<VEC> u[STEPS];
  RawDelta<VEC> delta[STEPS];
  act_t B[STEPS], C[STEPS];
  __device__ __forceinline__ void load(const TileArgs& p, const Seat& at, int k, int first) {
    Direction in;
    in.enter(p, at, k);
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      const int seen = max(token[j], 0), read = max(row_read(token[j], first + j), 0);
      u[j] = load_raw<VEC>(row_of(in.u, seen, p.u_l));
      delta[j] = load_delta<VEC>(row_of(in.delta, read, p.delta_l));
      B[j] = *row_of(in.B, read, p.B_l);
      C[j] = *row_of(in.C, read, p.C_l);
    }
  }
};

// The state that enters this thread's steps, from `carry` at the start of the round; moves `carry` to the round's end.
__device__ __forceinline__ void collect(const Seat& at, const Link* totals, const Link before[VEC], float carry[VEC], float enters[VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; v++) enters[v] = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      const Link total = totals[w * TILE_CHANNELS + at.column + v];
      if (w == at.warp) enters[v] = before[v].decay * carry[v] + before[v].h;
      carry[v] = total.decay * carry[v] + total.h;
    }
  }
}

// Add to (the first direction of a complete path: set) a token's entry of the tile.
__device__ __forceinline__ void accumulate(const Tile& tile, const Seat& at, int token, int k, float f[VEC]) {
  if (!(COMPLETE && k == 0)) {
    float sum[VEC];
    tile.read(at, token, sum);
#pragma unroll
    for (int v = 0; v < VEC; v++) f[v] += sum[v];
  }
  tile.write(at, token, f);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) tile_forward(const __grid_constant__ TileArgs p) {
  Link* totals = (Link*)dynamic_shared;  // [2][WARPS][TILE_CHANNELS]
  Tile tile;
  tile.rows = dynamic_shared + 4 * WARPS * TILE_CHANNELS;
  const Seat at(p);
  if (!COMPLETE) tile.clear(p);
  Round next;
  load_tokens(p.order, at.first_step(0), next.token);
  next.load(p, at, 0, at.first_step(0));
  int turn = 0;
  for (int k = 0; k < p.K; k++) {
    float a2[VEC], bias[VEC], skip[VEC], carry[VEC];
    load_columns(p.A, p, at, k, a2);
    load_columns(p.bias, p, at, k, bias);
    load_columns(p.D, p, at, k, skip);
    load_columns(p.state_in, p, at, (int64)at.b * p.K + k, carry);
#pragma unroll
    for (int v = 0; v < VEC; v++) a2[v] *= DECAY_SCALE;
    for (int round = 0; round < p.rounds; round++, turn ^= 1) {
      Round now = next;
      const int next_k = round + 1 < p.rounds ? k : k + 1, next_first = at.first_step(round + 1 < p.rounds ? round + 1 : 0);
      if (next_k < p.K) load_tokens(p.order + (int64)next_k * p.P, next_first, next.token);
      float a[STEPS][VEC], b[STEPS][VEC];
      Link own[VEC], before[VEC], total[VEC];
#pragma unroll
      for (int v = 0; v < VEC; v++) own[v].decay = own[v].h = 0.f;  // .decay: the sum of Delta, until it is turned
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
        float x[VEC], f[VEC];
        step_size<false>(now.delta[j], bias, now.token[j] >= 0, x, nullptr);
        unpack(now.u[j], f);
        const float B = to_float(now.B[j]);
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          a[j][v] = decay_of(x[v], a2[v]);
          b[j][v] = x[v] * f[v] * B;
          own[v].decay += x[v];
          own[v].h = a[j][v] * own[v].h + b[j][v];
        }
      }
#pragma unroll
      for (int v = 0; v < VEC; v++) own[v].decay = decay_of(own[v].decay, a2[v]);
      Link* shared = totals + turn * WARPS * TILE_CHANNELS;
      scan_warp<false>(at, own, before, total);
      if (at.lane / GROUPS == PER_WARP - 1)
#pragma unroll
        for (int v = 0; v < VEC; v++) shared[at.warp * TILE_CHANNELS + at.column + v] = total[v];
      if (next_k < p.K) next.load(p, at, next_k, next_first);
      __syncthreads();
      float h[VEC];
      collect(at, shared, before, carry, h);
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
        float f[VEC], y[VEC];
        unpack(now.u[j], f);
        const float C = to_float(now.C[j]);
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          h[v] = a[j][v] * h[v] + b[j][v];
          y[v] = h[v] * C + skip[v] * f[v];
        }
#if MERGE
        accumulate(tile, at, now.token[j], k, y);
#else
        if (now.token[j] >= 0 && at.ok) {
#if GATE
          unpack(load_raw<VEC>(row_of(p.z + at.b * p.z_b + (int64)k * p.z_k + at.channel, now.token[j], p.z_l)), f);
#pragma unroll
          for (int v = 0; v < VEC; v++) y[v] *= silu(f[v]);
#endif
          store_act<VEC>(p.y + (((int64)at.b * p.L + now.token[j]) * p.K + k) * p.channels + at.channel, y);
        }
#endif
      }
    }
    if (at.chunk == 0) store_columns(p.last_state, p, at, (int64)at.b * p.K + k, carry);
  }
  if (MERGE) tile.store(p, at, p.y, true);
}
