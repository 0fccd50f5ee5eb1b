// The forward of the scan with one state a channel. See tile_walk.cuh and kernels/README.md.
//
// Macro: STAGED (tile_ahead.cuh).
#include "common.cuh"
#include "tile_walk.cuh"
#include "tile_ahead.cuh"

// A row of the output, times silu(z) with GATE.
__device__ __forceinline__ void store_row(const TileArgs& p, const Seat& at, int k, int token, float y[VEC]) {
  if (!at.ok || (!FULL && token < 0)) return;
#if GATE
  float z[VEC];
  unpack(load_raw<VEC>(row_of(p.z + at.b * p.z_b + (int64)k * p.z_k + at.channel, token, p.z_l)), z);
#pragma unroll
  for (int v = 0; v < VEC; v++) y[v] *= silu(z[v]);
#endif
  const int directions = MERGE ? 1 : p.K, row = directions * p.channels * (int)sizeof(act_t);
  act_t* y_k = p.y + ((int64)at.b * p.L * directions + (MERGE ? 0 : k)) * p.channels + at.channel;
  store_act<VEC>(row_of(y_k, token, row), y);
}

// One warp to the next: the one that arrives does not wait.
#ifndef VM_EMULATE
__device__ __forceinline__ void pair_arrive(int id) { asm volatile("bar.arrive %0, 64;" :: "r"(id) : "memory"); }
__device__ __forceinline__ void pair_wait(int id) { asm volatile("bar.sync %0, 64;" :: "r"(id) : "memory"); }
#endif

// The next piece of a warp. All warps' pieces are those of all directions in order.
__device__ __forceinline__ void advance(const TileArgs& p, Place& place) {
  place.i += WARPS;
  if (place.i >= p.pieces) { place.i -= p.pieces; place.k++; }
}

struct Forward : Walk {
  Ahead ahead;
  Place now, next, later;  // the warp's piece, the one whose inputs and the one whose tokens are under way
  float *handed;       // [WARPS][TILE_CHANNELS]: the state that enters each warp's piece
  float carry[VEC];    // with one warp: the state that enters its piece
  int finished;        // directions whose results are all in the tile

  __device__ __forceinline__ Forward(const TileArgs& p) : Walk(p) {
    handed = dynamic_shared;
    parameters = handed + WARPS * TILE_CHANNELS;
    float* warps = parameters + 3 * DIRECTIONS * TILE_CHANNELS;
    common.enter(p, at, warps);
    ahead.enter(p, at, warps + WARPS * WARP_WORDS);
    tile.enter(at, warps + WARPS * (WARP_WORDS + Ahead::WORDS));
    finished = 0;
    now.k = 0; now.i = at.warp;
    next = now;
    advance(p, next);
    later = next;
    advance(p, later);
  }

  // The state that enters this warp's piece, and what it hands to the next.
  __device__ __forceinline__ void exchange(const Link total[VEC], float enters[VEC]) const {
    if (now.i == 0) {
      load_columns(p.state_in, p, at, (int64)at.b * p.K + now.k, enters);
    } else if (WARPS == 1) {
#pragma unroll
      for (int v = 0; v < VEC; v++) enters[v] = carry[v];
    } else {
      pair_wait(1 + at.warp);
      load_floats<VEC>(handed + at.warp * TILE_CHANNELS + at.column, enters);
    }
    if (WARPS > 1 && now.i + 1 < p.pieces) {
      const int next = at.warp + 1 < WARPS ? at.warp + 1 : 0;
      float leaves[VEC];
#pragma unroll
      for (int v = 0; v < VEC; v++) leaves[v] = total[v].decay * enters[v] + total[v].h;
      if (at.chunk == CHUNKS - 1) store_floats<VEC>(handed + next * TILE_CHANNELS + at.column, leaves);
      pair_arrive(1 + next);
    }
  }

  // Read the first piece's inputs and the second one's tokens.
  __device__ __forceinline__ void start() {
    common.load_tokens(p, at, now);
    common.leave_tokens(at, 0);
    __syncwarp();
    ahead.load(p, at, common, now, 0);
    common.load(p, at, now);
    if (next.k < p.K) common.load_tokens(p, at, next);
    stage_parameters();
  }

  // Take the inputs of this piece, and read those of the next.
  __device__ __forceinline__ Inputs<false> take(int turn) {
    const Inputs<false> inputs = ahead.take(at);
    __syncwarp();
    common.leave_projections(at);
    common.leave_tokens(at, turn ^ 1);
    __syncwarp();
    if (next.k < p.K) {
      ahead.load(p, at, common, next, turn ^ 1);
      common.load(p, at, next);
      if (later.k < p.K) common.load_tokens(p, at, later);
    }
    return inputs;
  }

  __device__ __forceinline__ void walk(const Inputs<false>& inputs, int turn) {
    float a[STEPS][VEC], b[STEPS][VEC], A[VEC], bias[VEC], B[SLOTS], C[SLOTS], sum[STEPS][VEC], h[VEC];
    int token[SLOTS];
    Link own[VEC], before[VEC], total[VEC];
    parameter(0, now.k, A);
    parameter(1, now.k, bias);
    common.read_B(at, B);
    common.tokens(at, turn, token);
#pragma unroll
    for (int v = 0; v < VEC; v++) own[v].decay = own[v].h = 0.f;  // .decay: the sum of Delta, until it is turned
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float x[VEC], f[VEC];
      step_size<false>(inputs.delta[j], bias, token[j] >= 0, x, nullptr);
      unpack(inputs.u[j], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        a[j][v] = decay_of(x[v], A[v]);
        b[j][v] = x[v] * f[v] * B[j];
        own[v].decay += x[v];
        own[v].h = a[j][v] * own[v].h + b[j][v];
      }
    }
#pragma unroll
    for (int v = 0; v < VEC; v++) own[v].decay = decay_of(own[v].decay, A[v]);
    scan_warp<false>(at, own, before, total);
    if (finished < now.k) { __syncthreads(); finished++; }
    exchange(total, h);
#pragma unroll
    for (int v = 0; v < VEC; v++) h[v] = before[v].decay * h[v] + before[v].h;
    if (!sets(now.k)) {
#pragma unroll
      for (int j = 0; j < STEPS; j++) tile.read(token[j], sum[j]);
    }
    if (!ONE_SKIP || sets(now.k)) {
      float skip[VEC];
      parameter(2, now.k, skip);
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
        float f[VEC];
        unpack(inputs.u[j], f);
#pragma unroll
        for (int v = 0; v < VEC; v++) sum[j][v] = skip[v] * f[v] + (sets(now.k) ? 0.f : sum[j][v]);
      }
    }
    common.read_C(at, C);
#pragma unroll
    for (int j = 0; j < STEPS; j++)
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        h[v] = a[j][v] * h[v] + b[j][v];
        sum[j][v] += h[v] * C[j];
      }
    if (writes(now.k)) {
#pragma unroll
      for (int j = 0; j < STEPS; j++) store_row(p, at, now.k, token[j], sum[j]);
    } else {
#pragma unroll
      for (int j = 0; j < STEPS; j++) tile.write(token[j], sum[j]);
    }
    if (WARPS == 1)
#pragma unroll
      for (int v = 0; v < VEC; v++) carry[v] = CHUNKS > 1 ? __shfl_sync(FULL_WARP, h[v], 32 - LANES + at.lane % LANES) : h[v];
    if (now.i + 1 == p.pieces && at.chunk == CHUNKS - 1) store_columns(p.last_state, p, at, (int64)at.b * p.K + now.k, h);
  }

  // Take and walk a piece; whether there is another.
  __device__ __forceinline__ bool round(int turn) {
    const Inputs<false> inputs = take(turn);
    walk(inputs, turn);
    now = next;
    next = later;
    advance(p, later);
    return now.k < p.K;
  }

  // A warp passes as many barriers as the others, though it has no piece of the last directions.
  __device__ __forceinline__ void finish() {
    for (; finished < p.K - 1; finished++) __syncthreads();
    for (; MERGE && !COMPLETE && finished < p.K; finished++) __syncthreads();
    if (MERGE && !COMPLETE)
      for (int l = threadIdx.x / LANES; l < p.L; l += THREADS / LANES) {
        float y[VEC];
        load_floats<VEC>(tile.rows + l * TILE_CHANNELS + at.column, y);
        store_row(p, at, 0, l, y);
      }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) tile_forward(const __grid_constant__ TileArgs p) {
  Forward block(p);
  block.start();
  while (block.round(0) && block.round(1)) {}
  block.finish();
}
