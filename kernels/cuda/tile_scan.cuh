// What the tile kernels share: the scan with one state a channel, all directions of an image in one block. See
// kernels/README.md.
//
// A block owns TILE_CHANNELS channels of one image and walks its directions one after another, so that their outputs
// (backward: the gradients of the u that they share) are summed in shared memory, in a fixed order, and written once.
// With one state there is little work a step and many steps, so the steps are the parallel axis: a thread takes VEC
// channels of STEPS consecutive steps of the path, and a scan over the block's threads passes the states on. Decays
// multiply along the path, so the scan's elements are (exp(A sum Delta), h). A path longer than a round of all threads
// takes several rounds.
//
// Macros: ACT, DELTA_FLOAT, TILE_CHANNELS, VEC, STEPS, THREADS, MIN_BLOCKS, SOFTPLUS, STEP_ORDER, MERGE (sum the
// directions; otherwise each is written), COMPLETE (every direction visits every token), ONE_ROUND, GATE.
#pragma once

#define INFINITE bits_to_float(0x7f800000u)

constexpr int GROUPS = TILE_CHANNELS / VEC;      // lanes that share a step
constexpr int PER_WARP = 32 / GROUPS;            // chunks of steps a warp
constexpr int WARP_STEPS = PER_WARP * STEPS;     // steps a warp and round
constexpr int STAGED = (WARP_STEPS + 31) / 32;   // of which a lane brings B and C of this many
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
  __device__ __forceinline__ int first_of_warp(int round) const { return (round * WARPS + warp) * WARP_STEPS; }
};

// Scan of a warp's chunks: the Link of those before (REVERSE: behind) a lane's own, and the warp's total in the lanes of
// its last (REVERSE: first) chunk.
template <bool REVERSE> __device__ __forceinline__ void scan_warp(const Seat& at, const Link own[VEC], Link before[VEC], Link total[VEC]) {
  const int place = at.lane / GROUPS, step = REVERSE ? GROUPS : -GROUPS;
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    Link sum = own[v];
#pragma unroll
    for (int hop = 1; hop < PER_WARP; hop *= 2) {
      const Link other = shuffle(sum, at.lane + hop * step);
      if (REVERSE ? place + hop < PER_WARP : place >= hop) sum = after(sum, other);
    }
    total[v] = sum;
    before[v] = shuffle(sum, at.lane + step);
    if (place == (REVERSE ? PER_WARP - 1 : 0)) { before[v].decay = 1.f; before[v].h = 0.f; }
  }
}

struct __align__(16) Four { int i[4]; };

// Where a direction's rows begin, for a thread's channels.
struct Direction {
  const act_t *u, *dy, *B, *C;
  const delta_t* delta;
  const int* order;
  __device__ __forceinline__ void enter(const TileArgs& p, const Seat& at, int k) {
    u = p.u + at.b * p.u_b + (int64)k * p.u_k + at.channel;
    dy = p.dy + at.b * p.dy_b + (int64)k * p.dy_k + at.channel;
    delta = p.delta + at.b * p.delta_b + (int64)k * p.delta_k + at.channel;
    B = p.B + at.b * p.B_b + (int64)k * p.B_k;
    C = p.C + at.b * p.C_b + (int64)k * p.C_k;
    order = p.order + (int64)k * p.P;
  }
};

// The tokens of STEPS consecutive steps; -1 where there is no step.
__device__ __forceinline__ void load_tokens(const int* order, int first, int token[STEPS]) {
#pragma unroll
  for (int j = 0; j < STEPS; j += 4) {
    const Four four = *reinterpret_cast<const Four*>(order + first + j);
#pragma unroll
    for (int i = 0; i < 4; i++) token[j + i] = four.i[i];
  }
}

// The row of delta, B and C that a step reads.
__device__ __forceinline__ int row_read(int token, int step) { return STEP_ORDER && token >= 0 ? step : token; }

// What a thread reads of its STEPS steps, as loaded, and a bit for each step that has a token. Steps without one read
// token 0, and get Delta = 0 and dy = 0.
template <bool BACKWARD> struct Steps {
  Raw<VEC> u[STEPS], dy[BACKWARD ? STEPS : 1];
  RawDelta<VEC> delta[STEPS];
  uint32 valid;
  __device__ __forceinline__ void load(const TileArgs& p, const Direction& in, int first, const int token[STEPS]) {
    valid = 0;
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      const int seen = max(token[j], 0);
      valid |= token[j] >= 0 ? 1u << j : 0;
      u[j] = load_raw<VEC>(row_of(in.u, seen, p.u_l));
      delta[j] = load_delta<VEC>(row_of(in.delta, max(row_read(token[j], first + j), 0), p.delta_l));
      if constexpr (BACKWARD) dy[j] = load_raw<VEC>(row_of(in.dy, seen, p.dy_l));
    }
  }
  __device__ __forceinline__ bool has(int j) const { return valid >> j & 1; }
};

// B and C are the same for all channels: a lane loads those of STAGED of its warp's steps, which meet in shared memory,
// B[WARP_STEPS] before C[WARP_STEPS]. Steps without a token get those of token 0: their Delta and dy are 0.
struct Projections {
  act_t B[STAGED], C[STAGED];
  int token[STAGED];
  static __device__ __forceinline__ int step(const Seat& at, int i) { return min(at.lane * STAGED + i, WARP_STEPS - 1); }
  __device__ __forceinline__ void load_tokens(const Seat& at, const int* order, int round) {
#pragma unroll
    for (int i = 0; i < STAGED; i++) token[i] = order[at.first_of_warp(round) + step(at, i)];
  }
  __device__ __forceinline__ void load(const TileArgs& p, const Seat& at, const Direction& in, int round) {
#pragma unroll
    for (int i = 0; i < STAGED; i++) {
      const int row = max(row_read(token[i], at.first_of_warp(round) + step(at, i)), 0);
      B[i] = *row_of(in.B, row, p.B_l);
      C[i] = *row_of(in.C, row, p.C_l);
    }
  }
  __device__ __forceinline__ void stage(const Seat& at, float* shared) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < STAGED; i++)
      if (at.lane * STAGED + i < WARP_STEPS) {
        shared[at.lane * STAGED + i] = to_float(B[i]);
        shared[WARP_STEPS + at.lane * STAGED + i] = to_float(C[i]);
      }
    __syncwarp();
  }
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

// Delta of one step, and its derivative if asked for; both 0 where there is no step (softplus(-infinity) is exactly 0).
template <bool SLOPE> __device__ __forceinline__ void step_size(RawDelta<VEC> raw, const float bias[VEC], bool valid, float x[VEC], float slope[VEC]) {
  if (SOFTPLUS && !valid) raw = lowest(raw);
  unpack(raw, x);
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    x[v] += bias[v];
    if constexpr (SLOPE) {
      slope[v] = valid ? 1.f : 0.f;
      if (SOFTPLUS) x[v] = softplus(x[v], slope[v]);
    } else {
      if (SOFTPLUS) x[v] = softplus(x[v]);
    }
    if (!SOFTPLUS && !valid) x[v] = 0.f;
  }
}

// The directions' sum: a row a token. What is read for a step without a token is undefined, and not written back.
struct Tile {
  float* rows;
  __device__ __forceinline__ void read(const Seat& at, int token, float f[VEC]) const {
    if (token >= 0) load_floats<VEC>(rows + token * TILE_CHANNELS + at.column, f);
  }
  __device__ __forceinline__ void write(const Seat& at, int token, const float f[VEC]) const {
    if (token >= 0) store_floats<VEC>(rows + token * TILE_CHANNELS + at.column, f);
  }
  __device__ __forceinline__ void clear(const TileArgs& p) const {
    if (!MERGE) return;
    const float zero[4] = {};
    for (int i = threadIdx.x; i < p.L * TILE_CHANNELS / 4; i += THREADS) store_floats<4>(rows + 4 * i, zero);
    __syncthreads();
  }
  // To (B, L, D), times silu(z) with GATE.
  __device__ __forceinline__ void store(const TileArgs& p, const Seat& at, act_t* to, bool gate) const {
    __syncthreads();
    for (int l = at.chunk; l < p.L; l += CHUNKS) {
      float f[VEC];
      load_floats<VEC>(rows + l * TILE_CHANNELS + at.column, f);
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
};

extern __shared__ float dynamic_shared[];
