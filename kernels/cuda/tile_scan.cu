// Selective scan with one state a channel (d_state 1), all directions of an image in one block. See kernels/README.md.
//
// A block owns TILE_CHANNELS channels of one image and walks its directions one after another, so that their outputs
// (backward: the gradients of the u that they share) are summed in shared memory, in a fixed order, and written once.
// With one state there is little work a step and many steps, so the steps are the parallel axis: a thread takes VEC
// channels of STEPS consecutive steps of the path, and a scan over the block's threads passes the states on. Decays
// multiply along the path, so the scan's elements are (exp(A sum Delta), h). A path longer than a round of all threads
// takes several rounds.
//
// Macros: ACT, DELTA_FLOAT, TILE_CHANNELS, VEC, STEPS, THREADS, MIN_BLOCKS, SOFTPLUS, STEP_ORDER, MERGE (sum the directions; otherwise
// each is written), COMPLETE (every direction visits every token), GATE.
#include "common.cuh"

constexpr int GROUPS = TILE_CHANNELS / VEC;   // lanes that share a step
constexpr int PER_WARP = 32 / GROUPS;         // chunks of steps a warp
constexpr int WARPS = THREADS / 32;
constexpr int CHUNKS = THREADS / GROUPS;

struct TileArgs {
  const act_t* u;
  const delta_t* delta;
  const act_t *B, *C, *z, *dy;
  const float *A, *D, *bias;      // (K, D); D and bias may be null
  const int* order;               // (K, P), P a whole number of rounds; -1 where there is no step
  const float *state_in, *dlast;  // (B, K, D), or null for zero
  act_t* y;                       // (B, L, D) with MERGE, else (B, L, K, D)
  float* last_state;              // (B, K, D)
  act_t* du;                      // like y
  delta_t* ddelta;                // (B, L, K, D)
  float* dBC;                     // (B, K, tiles, L, 2)
  float* dparams;                 // (B, 3 K D): dA, dD, dbias
  float* dstate;                  // (B, K, D), or null
  int64 u_b, delta_b, B_b, C_b, z_b, dy_b;  // strides: _b and _k in elements, _l in bytes
  int u_l, u_k, delta_l, delta_k, B_l, B_k, C_l, C_k, z_l, z_k, dy_l, dy_k;
  int L, P, channels, K, tiles, rounds;
};

// A decay over some steps and the state that they reach from zero. Later after earlier: (a2 a1, a2 h1 + h2).
struct Link { float decay, h; };
__device__ __forceinline__ Link after(Link later, Link earlier) {
  Link r;
  r.decay = later.decay * earlier.decay;
  r.h = later.decay * earlier.h + later.h;
  return r;
}
__device__ __forceinline__ Link shuffle(Link x, int from) {
  Link r;
  r.decay = __shfl_sync(FULL_WARP, x.decay, from & 31);
  r.h = __shfl_sync(FULL_WARP, x.h, from & 31);
  return r;
}

struct Seat {
  int b, tile, lane, warp, chunk, column, channel;
  bool ok;
  __device__ __forceinline__ Seat(const TileArgs& p) {
    b = blockIdx.x / p.tiles; tile = blockIdx.x % p.tiles;
    lane = threadIdx.x & 31; warp = threadIdx.x >> 5;
    chunk = threadIdx.x / GROUPS;
    column = (threadIdx.x % GROUPS) * VEC;
    ok = tile * TILE_CHANNELS + column < p.channels;
    channel = ok ? tile * TILE_CHANNELS + column : 0;
  }
  __device__ __forceinline__ int first_step(int round) const { return (round * CHUNKS + chunk) * STEPS; }
};

// Scan of the block's chunks, in two halves around a barrier. `publish` scans the warp's chunks, leaves the Link of those
// before this one in `before` and the warp's total in `totals`; `collect` turns them into the state that enters this
// chunk, from `carry` at the start of the round, and moves `carry` to the round's end. REVERSE starts at the last chunk.
template <bool REVERSE> __device__ __forceinline__ void publish(const Seat& at, const Link own[VEC], Link* totals, Link before[VEC]) {
  const int place = at.lane / GROUPS, step = REVERSE ? GROUPS : -GROUPS;
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    Link sum = own[v];
#pragma unroll
    for (int hop = 1; hop < PER_WARP; hop *= 2) {
      const Link other = shuffle(sum, at.lane + hop * step);
      if (REVERSE ? place + hop < PER_WARP : place >= hop) sum = after(sum, other);
    }
    if (place == (REVERSE ? 0 : PER_WARP - 1)) totals[at.warp * TILE_CHANNELS + at.column + v] = sum;
    before[v] = shuffle(sum, at.lane + step);
    if (place == (REVERSE ? PER_WARP - 1 : 0)) { before[v].decay = 1.f; before[v].h = 0.f; }
  }
}

template <bool REVERSE> __device__ __forceinline__ void collect(const Seat& at, const Link* totals, const Link before[VEC], float carry[VEC], float enters[VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; v++) enters[v] = 0.f;
#pragma unroll
  for (int i = 0; i < WARPS; i++) {
    const int w = REVERSE ? WARPS - 1 - i : i;
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      const Link total = totals[w * TILE_CHANNELS + at.column + v];
      if (w == at.warp) enters[v] = before[v].decay * carry[v] + before[v].h;
      carry[v] = total.decay * carry[v] + total.h;
    }
  }
}

struct __align__(16) Four { int i[4]; };

// What a thread reads of its STEPS steps, as loaded. Steps without a token read token 0; their Delta, B and C are set to
// zero instead, which leaves the state and the adjoint as they are.
template <bool BACKWARD> struct Steps {
  int token[STEPS];
  Raw<VEC> u[STEPS], dy[BACKWARD ? STEPS : 1];
  RawDelta<VEC> delta[STEPS];
  act_t B[STEPS], C[STEPS];

  __device__ __forceinline__ void load_tokens(const TileArgs& p, int k, int first) {
    const int* order = p.order + (int64)k * p.P + first;
#pragma unroll
    for (int j = 0; j < STEPS; j += 4) {
      const Four four = *reinterpret_cast<const Four*>(order + j);
#pragma unroll
      for (int i = 0; i < 4; i++) token[j + i] = four.i[i];
    }
  }
  __device__ __forceinline__ int row(int j, int first) const { return STEP_ORDER && token[j] >= 0 ? first + j : token[j]; }
  template <bool CARRY_ONLY> __device__ __forceinline__ void load(const TileArgs& p, const Seat& at, int k, int first) {
    const act_t* u_k = p.u + at.b * p.u_b + (int64)k * p.u_k + at.channel;
    const delta_t* delta_k = p.delta + at.b * p.delta_b + (int64)k * p.delta_k + at.channel;
    const act_t* B_k = p.B + at.b * p.B_b + (int64)k * p.B_k;
    const act_t* C_k = p.C + at.b * p.C_b + (int64)k * p.C_k;
    const act_t* dy_k = BACKWARD ? p.dy + at.b * p.dy_b + (int64)k * p.dy_k + at.channel : nullptr;
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      const int seen = max(token[j], 0), read = max(row(j, first), 0);
      u[j] = load_raw<VEC>(row_of(u_k, seen, p.u_l));
      delta[j] = load_delta<VEC>(row_of(delta_k, read, p.delta_l));
      B[j] = *row_of(B_k, read, p.B_l);
      if constexpr (!CARRY_ONLY) {
        C[j] = *row_of(C_k, read, p.C_l);
        if constexpr (BACKWARD) dy[j] = load_raw<VEC>(row_of(dy_k, seen, p.dy_l));
      }
    }
  }
  __device__ __forceinline__ float b(int j) const { return token[j] >= 0 ? to_float(B[j]) : 0.f; }
  __device__ __forceinline__ float c(int j) const { return token[j] >= 0 ? to_float(C[j]) : 0.f; }
};

__device__ __forceinline__ void load_columns(const float* from, const TileArgs& p, const Seat& at, int64 lead, float f[VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; v++) f[v] = from != nullptr && at.ok ? from[lead * p.channels + at.channel + v] : 0.f;
}
__device__ __forceinline__ void store_columns(float* to, const TileArgs& p, const Seat& at, int64 lead, const float f[VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; v++)
    if (at.ok) to[lead * p.channels + at.channel + v] = f[v];
}

// Delta, its slope and the decay of one step; Delta = 0 where there is no step.
__device__ __forceinline__ void step_size(const RawDelta<VEC>& raw, const float bias[VEC], bool valid, float x[VEC]) {
  unpack(raw, x);
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    x[v] += bias[v];
    if (SOFTPLUS) x[v] = softplus(x[v]);
    if (!valid) x[v] = 0.f;
  }
}

// Add to (the first direction of a complete path: set) a token's entry of the tile; -1 is a spare row before the first.
__device__ __forceinline__ void accumulate(float* tile, const Seat& at, int token, int k, const float f[VEC]) {
  float* to = tile + token * TILE_CHANNELS + at.column;
  float sum[VEC];
  if (COMPLETE && k == 0) {
    store_floats<VEC>(to, f);
  } else {
    load_floats<VEC>(to, sum);
#pragma unroll
    for (int v = 0; v < VEC; v++) sum[v] += f[v];
    store_floats<VEC>(to, sum);
  }
}

__device__ __forceinline__ void clear(float* tile, const TileArgs& p) {
  if (MERGE && !COMPLETE) {
    for (int i = threadIdx.x; i < p.L * TILE_CHANNELS; i += THREADS) tile[i] = 0.f;
    __syncthreads();
  }
}

// Write the tile to (B, L, D), times silu(z) with GATE.
__device__ __forceinline__ void write_tile(const float* tile, const TileArgs& p, const Seat& at, act_t* to, bool gate) {
  __syncthreads();
  for (int l = at.chunk; l < p.L; l += CHUNKS) {
    float f[VEC];
    load_floats<VEC>(tile + l * TILE_CHANNELS + at.column, f);
    if (!at.ok) continue;
#if GATE
    if (gate) {
      float z[VEC];
      unpack(load_raw<VEC>(row_of(p.z + at.b * p.z_b + at.channel, l, p.z_l)), z);
#pragma unroll
      for (int v = 0; v < VEC; v++) f[v] *= silu(z[v]);
    }
#endif
    store_act<VEC>(to + ((int64)at.b * p.L + l) * p.channels + at.channel, f);
  }
}

extern __shared__ float dynamic_shared[];

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) tile_forward(const __grid_constant__ TileArgs p) {
  Link* totals = (Link*)dynamic_shared;                               // [2][WARPS][TILE_CHANNELS]
  float* tile = dynamic_shared + (4 * WARPS + 1) * TILE_CHANNELS;  // [-1, L)[TILE_CHANNELS] with MERGE
  const Seat at(p);
  clear(tile, p);
  Steps<false> next;
  next.load_tokens(p, 0, at.first_step(0));
  next.load<false>(p, at, 0, at.first_step(0));
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
      Steps<false> now = next;
      const int next_k = round + 1 < p.rounds ? k : k + 1, next_first = at.first_step(round + 1 < p.rounds ? round + 1 : 0);
      if (next_k < p.K) next.load_tokens(p, next_k, next_first);
      float a[STEPS][VEC], b[STEPS][VEC];
      Link own[VEC], before[VEC];
#pragma unroll
      for (int v = 0; v < VEC; v++) own[v].decay = own[v].h = 0.f;  // .decay: the sum of Delta, until it is turned
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
        float x[VEC], f[VEC];
        step_size(now.delta[j], bias, now.token[j] >= 0 && at.ok, x);
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
      publish<false>(at, own, shared, before);
      if (next_k < p.K) next.load<false>(p, at, next_k, next_first);
      __syncthreads();
      float h[VEC];
      collect<false>(at, shared, before, carry, h);
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
        if (now.token[j] >= 0) {
#if GATE
          unpack(load_raw<VEC>(row_of(p.z + at.b * p.z_b + (int64)k * p.z_k + at.channel, now.token[j], p.z_l)), f);
#pragma unroll
          for (int v = 0; v < VEC; v++) y[v] *= silu(f[v]);
#endif
          if (at.ok) store_act<VEC>(p.y + (((int64)at.b * p.L + now.token[j]) * p.K + k) * p.channels + at.channel, y);
        }
#endif
      }
    }
    if (at.chunk == 0) store_columns(p.last_state, p, at, (int64)at.b * p.K + k, carry);
  }
  if (MERGE) write_tile(tile, p, at, p.y, true);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) tile_backward(const __grid_constant__ TileArgs p) {
  Link* totals = (Link*)dynamic_shared;                                        // [2][2][WARPS][TILE_CHANNELS]
  float* sums = dynamic_shared + 8 * WARPS * TILE_CHANNELS;                // [3][WARPS][TILE_CHANNELS]
  float* starts = sums + 3 * WARPS * TILE_CHANNELS;                        // [rounds][TILE_CHANNELS]
  float* tile = starts + (p.rounds + 1) * TILE_CHANNELS;                       // [-1, L)[TILE_CHANNELS] with MERGE
  const Seat at(p);
  clear(tile, p);
  int turn = 0;
  for (int k = 0; k < p.K; k++) {
    const int64 bk = (int64)at.b * p.K + k;
    float A[VEC], a2[VEC], bias[VEC], skip[VEC], carry[VEC];
    load_columns(p.A, p, at, k, A);
    load_columns(p.bias, p, at, k, bias);
    load_columns(p.D, p, at, k, skip);
    load_columns(p.state_in, p, at, bk, carry);
#pragma unroll
    for (int v = 0; v < VEC; v++) a2[v] = A[v] * DECAY_SCALE;
    Steps<true> now;
    // The state at the start of each round but the last needs the rounds before it.
    for (int round = 0; round < p.rounds - 1; round++, turn ^= 1) {
      if (at.chunk == 0) store_floats<VEC>(starts + round * TILE_CHANNELS + at.column, carry);
      const int first = at.first_step(round);
      now.load_tokens(p, k, first);
      now.load<true>(p, at, k, first);
      Link own[VEC], before[VEC];
#pragma unroll
      for (int v = 0; v < VEC; v++) own[v].decay = own[v].h = 0.f;
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
        float x[VEC], f[VEC];
        step_size(now.delta[j], bias, now.token[j] >= 0 && at.ok, x);
        unpack(now.u[j], f);
        const float B = now.b(j);
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          own[v].decay += x[v];
          own[v].h = decay_of(x[v], a2[v]) * own[v].h + x[v] * f[v] * B;
        }
      }
      float unused[VEC];
#pragma unroll
      for (int v = 0; v < VEC; v++) own[v].decay = decay_of(own[v].decay, a2[v]);
      Link* shared = totals + turn * 2 * WARPS * TILE_CHANNELS;
      publish<false>(at, own, shared, before);
      __syncthreads();
      collect<false>(at, shared, before, carry, unused);
    }
    if (at.chunk == 0) store_floats<VEC>(starts + (p.rounds - 1) * TILE_CHANNELS + at.column, carry);
    float adjoint[VEC], dA[VEC], dskip[VEC], dbias[VEC];  // adjoint: a_{t+1} g_{t+1} at the round's end
    load_columns(p.dlast, p, at, bk, adjoint);
#pragma unroll
    for (int v = 0; v < VEC; v++) dA[v] = dskip[v] = dbias[v] = 0.f;

    for (int round = p.rounds - 1; round >= 0; round--, turn ^= 1) {
      const int first = at.first_step(round);
      now.load_tokens(p, k, first);
      now.load<false>(p, at, k, first);
      float x[STEPS][VEC], slope[STEPS][VEC], a[STEPS][VEC], h[STEPS][VEC];
      Link own[VEC], back[VEC], before[VEC], behind[VEC];
#pragma unroll
      for (int v = 0; v < VEC; v++) own[v].decay = own[v].h = back[v].h = 0.f;
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
        float f[VEC];
        unpack(now.delta[j], x[j]);
        unpack(now.u[j], f);
        const float B = now.b(j);
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          slope[j][v] = 1.f;
          x[j][v] += bias[v];
          if (SOFTPLUS) x[j][v] = softplus(x[j][v], slope[j][v]);
          if (now.token[j] < 0 || !at.ok) x[j][v] = 0.f;
          a[j][v] = decay_of(x[j][v], a2[v]);
          own[v].decay += x[j][v];
          own[v].h = a[j][v] * own[v].h + x[j][v] * f[v] * B;
        }
      }
#pragma unroll
      for (int j = STEPS - 1; j >= 0; j--) {
        float g[VEC];
        unpack(now.dy[j], g);
        const float C = now.c(j);
#pragma unroll
        for (int v = 0; v < VEC; v++) back[v].h = a[j][v] * (C * g[v] + back[v].h);
      }
#pragma unroll
      for (int v = 0; v < VEC; v++) own[v].decay = back[v].decay = decay_of(own[v].decay, a2[v]);
      Link *forth_shared = totals + turn * 2 * WARPS * TILE_CHANNELS, *back_shared = forth_shared + WARPS * TILE_CHANNELS;
      publish<false>(at, own, forth_shared, before);
      publish<true>(at, back, back_shared, behind);
      __syncthreads();
      float state[VEC], carried[VEC], start[VEC];
      load_floats<VEC>(starts + round * TILE_CHANNELS + at.column, start);
      collect<false>(at, forth_shared, before, start, state);
      collect<true>(at, back_shared, behind, adjoint, carried);
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
        float f[VEC];
        unpack(now.u[j], f);
        const float B = now.b(j);
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          h[j][v] = state[v];  // the state before step j
          state[v] = a[j][v] * state[v] + x[j][v] * f[v] * B;
        }
      }
      const int row = p.K * p.channels;
      const int64 image = ((int64)at.b * p.L * p.K + k) * p.channels + at.channel;
      delta_t* ddelta_k = p.ddelta + image;
      act_t* du_k = p.du + image;
      float shared_sums[2 * STEPS];  // dB and dC of each step, over this thread's channels
#pragma unroll
      for (int j = STEPS - 1; j >= 0; j--) {
        float f[VEC], gy[VEC], du[VEC], ddelta[VEC];
        unpack(now.u[j], f);
        unpack(now.dy[j], gy);
        const float B = now.b(j), C = now.c(j);
        shared_sums[2 * j] = shared_sums[2 * j + 1] = 0.f;
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          const float g = C * gy[v] + carried[v], through = g * B;
          carried[v] = g * a[j][v];
          const float r = carried[v] * h[j][v];
          shared_sums[2 * j] += g * x[j][v] * f[v];
          shared_sums[2 * j + 1] += gy[v] * state[v];
          state[v] = h[j][v];
          du[v] = through * x[j][v] + skip[v] * gy[v];
          ddelta[v] = (r * A[v] + through * f[v]) * slope[j][v];
          dA[v] += r * x[j][v];
          if (now.token[j] >= 0) { dskip[v] += gy[v] * f[v]; dbias[v] += ddelta[v]; }
        }
#if MERGE
        accumulate(tile, at, now.token[j], k, du);
#endif
        if (now.token[j] >= 0 && at.ok) {
          store_delta<VEC>(row_of(ddelta_k, now.row(j, first), row * (int)sizeof(delta_t)), ddelta);
#if !MERGE
          store_act<VEC>(row_of(du_k, now.token[j], row * (int)sizeof(act_t)), du);
#endif
        }
      }
      // Over the lanes that share these steps; each then writes its share of the sums.
      constexpr int LEFT = 2 * STEPS > GROUPS ? 2 * STEPS / GROUPS : 1, COPIES = GROUPS > 2 * STEPS ? GROUPS / (2 * STEPS) : 1;
      const int first_sum = reduce_over_lanes<2 * STEPS, GROUPS, 1>(shared_sums, at.lane);
      float* dBC = p.dBC + (bk * p.tiles + at.tile) * p.L * 2;
#pragma unroll
      for (int i = 0; i < LEFT; i++) {
        const int s = first_sum + i, step = first + s / 2;
        const int token = p.order[(int64)k * p.P + step];
        if (token >= 0 && at.lane % COPIES == 0) dBC[(int64)(STEP_ORDER ? step : token) * 2 + s % 2] = shared_sums[i];
      }
    }
    if (at.chunk == 0 && p.dstate != nullptr) store_columns(p.dstate, p, at, bk, adjoint);

    // Parameters' gradients of this direction, over the block's chunks.
#pragma unroll
    for (int v = 0; v < VEC; v++) {
#pragma unroll
      for (int hop = GROUPS; hop < 32; hop *= 2) {
        dA[v] += __shfl_xor_sync(FULL_WARP, dA[v], hop);
        dskip[v] += __shfl_xor_sync(FULL_WARP, dskip[v], hop);
        dbias[v] += __shfl_xor_sync(FULL_WARP, dbias[v], hop);
      }
      if (at.lane < GROUPS) {
        float* to = sums + at.warp * TILE_CHANNELS + at.column + v;
        to[0] = dA[v]; to[WARPS * TILE_CHANNELS] = dskip[v]; to[2 * WARPS * TILE_CHANNELS] = dbias[v];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * TILE_CHANNELS; i += THREADS) {
      const int which = i / TILE_CHANNELS, column = i % TILE_CHANNELS, channel = at.tile * TILE_CHANNELS + column;
      float total = 0.f;
      for (int w = 0; w < WARPS; w++) total += sums[(which * WARPS + w) * TILE_CHANNELS + column];
      if (channel < p.channels) p.dparams[(((int64)at.b * 3 + which) * p.K + k) * p.channels + channel] = total;
    }
    __syncthreads();
  }
  if (MERGE) write_tile(tile, p, at, p.du, false);
}
