// What the tile kernels share: the scan with one state a channel, all directions of an image in one block. See
// kernels/README.md.
//
// A block owns TILE_CHANNELS channels of one image; the directions' results are summed in shared memory, in a fixed order,
// and written once. With one state there is little work a step and many steps, so the steps are the parallel axis: a warp
// takes one piece of a path after another, WARPS pieces apart. LANES lanes share a step, VEC channels each, and a warp's
// CHUNKS of lanes take STEPS consecutive steps each. Decays multiply along a path, so that what steps do is known from zero,
// a Link, before the state that enters them.
//
// Macros: ACT, DELTA_FLOAT, TILE_CHANNELS, VEC, STEPS, WARPS, MIN_BLOCKS, SOFTPLUS, STEP_ORDER, MERGE (sum the directions;
// otherwise each is written), COMPLETE (every direction visits every token), FULL (every step of every piece has a token, and
// every lane a channel), ONE_SKIP (complete, and the directions' skips read the same row of u and are added up: one product
// does), GATE.
#pragma once

constexpr int LANES = TILE_CHANNELS / VEC;
constexpr int CHUNKS = 32 / LANES;
constexpr int PIECE = CHUNKS * STEPS;
constexpr int SLOTS = (STEPS + 3) / 4 * 4;       // a chunk's room in shared memory, for wide loads
constexpr int BROUGHT = (PIECE + 31) / 32;       // steps whose token, B and C a lane brings
constexpr int ROW = CHUNKS * SLOTS;
constexpr int WARP_WORDS = 4 * ROW;              // B, C and the tokens of two pieces
constexpr int THREADS = 32 * WARPS;
constexpr int DIRECTIONS = 8;                    // at most

struct TileArgs {
  const act_t* u;
  const delta_t* delta;
  const act_t *B, *C, *z, *dy;
  const float *A, *D, *bias;      // (K, D); D and bias may be null
  const int* order;               // (K, pieces PIECE); -1 where there is no step
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
  int L, P, channels, K, tiles, pieces;  // pieces of a direction: WARPS or more
};

// A decay over some steps and the state that they reach from zero. Later after earlier: (a2 a1, a2 h1 + h2).
struct Link { float decay, h; };
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
    lane = threadIdx.x & 31;
    warp = __shfl_sync(FULL_WARP, (int)(threadIdx.x >> 5), 0);  // which tells the compiler that a warp's places are one value
    chunk = lane / LANES;
    column = (lane % LANES) * VEC;
    ok = tile * TILE_CHANNELS + column < p.channels;
    channel = ok ? tile * TILE_CHANNELS + column : 0;
  }
};

// Direction k of an array: its strides over directions come in elements.
template <class T> __device__ __forceinline__ const T* direction(const T* base, int k, int stride) { return row_of(base, k, stride * (int)sizeof(T)); }

// Piece i of direction k.
struct Place {
  int k, i;
  __device__ __forceinline__ int first() const { return i * PIECE; }
};

// Scan of a warp's chunks: the Link of those before (REVERSE: behind) a lane's own, and the warp's total in the lanes of
// its last (REVERSE: first) chunk.
template <bool REVERSE> __device__ __forceinline__ void scan_warp(const Seat& at, const Link own[VEC], Link before[VEC], Link total[VEC]) {
  const int step = REVERSE ? LANES : -LANES;
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    Link sum = own[v];
#pragma unroll
    for (int hop = 1; hop < CHUNKS; hop *= 2) {
      const Link other = shuffle(sum, at.lane + hop * step);
      const bool has = REVERSE ? at.chunk + hop < CHUNKS : at.chunk >= hop;
      sum.h += has ? sum.decay * other.h : 0.f;
      sum.decay *= has ? other.decay : 1.f;
    }
    total[v] = sum;
    before[v].decay = 1.f; before[v].h = 0.f;
    if constexpr (CHUNKS > 1) {
      const Link other = shuffle(sum, at.lane + step);
      if (at.chunk != (REVERSE ? CHUNKS - 1 : 0)) before[v] = other;
    }
  }
}

// The row of delta, B and C that a step reads; steps without a token read row 0.
__device__ __forceinline__ int row_seen(int token) { return FULL ? token : max(token, 0); }
__device__ __forceinline__ int row_read(int token, int step) { return STEP_ORDER ? (FULL || token >= 0 ? step : 0) : row_seen(token); }

// A warp's tokens, B and C: the same for all channels, so that a lane brings those of a few steps, for all in shared memory.
struct Common {
  float* words;
  const int* order;
  const act_t *B_0, *C_0;
  act_t B[BROUGHT], C[BROUGHT];
  int token[BROUGHT];   // of the piece after the one whose B and C these are
  __device__ __forceinline__ void enter(const TileArgs& p, const Seat& at, float* shared) {
    words = shared + at.warp * WARP_WORDS;
    order = p.order + at.lane;
    B_0 = p.B + at.b * p.B_b;
    C_0 = p.C + at.b * p.C_b;
  }
  static __device__ __forceinline__ int step(const Seat& at, int i) { return min(i * 32 + at.lane, PIECE - 1); }
  static __device__ __forceinline__ bool has(const Seat& at, int i) { return PIECE % 32 == 0 || i * 32 + at.lane < PIECE; }
  static __device__ __forceinline__ int slot(int step) { return step / STEPS * SLOTS + step % STEPS; }
  __device__ __forceinline__ void load_tokens(const TileArgs& p, const Seat& at, Place to) {
#pragma unroll
    for (int i = 0; i < BROUGHT; i++) token[i] = order[to.k * p.P + to.first() + step(at, i) - at.lane];
  }
  // Needs the place's tokens in `token`.
  __device__ __forceinline__ void load(const TileArgs& p, const Seat& at, Place to) {
    const act_t *B_k = direction(B_0, to.k, p.B_k), *C_k = direction(C_0, to.k, p.C_k);
#pragma unroll
    for (int i = 0; i < BROUGHT; i++) {
      const int row = row_read(token[i], to.first() + step(at, i));
      B[i] = *row_of(B_k, row, p.B_l);
      C[i] = *row_of(C_k, row, p.C_l);
    }
  }
  __device__ __forceinline__ void leave_tokens(const Seat& at, int turn) const {
#pragma unroll
    for (int i = 0; i < BROUGHT; i++)
      if (has(at, i)) ((int*)words)[(2 + turn) * ROW + slot(step(at, i))] = token[i];
  }
  __device__ __forceinline__ void leave_projections(const Seat& at) const {
#pragma unroll
    for (int i = 0; i < BROUGHT; i++)
      if (has(at, i)) {
        words[slot(step(at, i))] = to_float(B[i]) * DECAY_UNSCALE;
        words[ROW + slot(step(at, i))] = to_float(C[i]);
      }
  }
  __device__ __forceinline__ void tokens(const Seat& at, int turn, int to[SLOTS]) const { load_ints<SLOTS>((const int*)words + (2 + turn) * ROW + at.chunk * SLOTS, to); }
  __device__ __forceinline__ int token_at(int turn, int step) const { return ((const int*)words)[(2 + turn) * ROW + slot(step)]; }
  __device__ __forceinline__ int token_of(const Seat& at, int turn, int j) const { return ((const int*)words)[(2 + turn) * ROW + at.chunk * SLOTS + j]; }
  __device__ __forceinline__ void read_B(const Seat& at, float to[SLOTS]) const { load_floats<SLOTS>(words + at.chunk * SLOTS, to); }
  __device__ __forceinline__ void read_C(const Seat& at, float to[SLOTS]) const { load_floats<SLOTS>(words + ROW + at.chunk * SLOTS, to); }
};

// Where a thread's channels begin.
struct Bases {
  const act_t *u, *dy;
  const delta_t* delta;
  __device__ __forceinline__ void enter(const TileArgs& p, const Seat& at) {
    u = p.u + at.b * p.u_b + at.channel;
    dy = p.dy + at.b * p.dy_b + at.channel;
    delta = p.delta + at.b * p.delta_b + at.channel;
  }
};

// What a thread reads of its steps, as loaded.
template <bool BACKWARD> struct Inputs {
  Raw<VEC> u[STEPS], dy[BACKWARD ? STEPS : 1];
  RawDelta<VEC> delta[STEPS];
  __device__ __forceinline__ void load(const TileArgs& p, const Seat& at, const Bases& from, Place to, const int token[SLOTS], bool with_dy = true) {
    const act_t *u_k = direction(from.u, to.k, p.u_k), *dy_k = direction(from.dy, to.k, p.dy_k);
    const delta_t* delta_k = direction(from.delta, to.k, p.delta_k);
    const int first = to.first() + at.chunk * STEPS;
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      delta[j] = load_delta<VEC>(row_of(delta_k, row_read(token[j], first + j), p.delta_l));
      u[j] = load_raw<VEC>(row_of(u_k, row_seen(token[j]), p.u_l));
    }
    if constexpr (BACKWARD)
      if (with_dy)
#pragma unroll
        for (int j = 0; j < STEPS; j++) dy[j] = load_raw<VEC>(row_of(dy_k, row_seen(token[j]), p.dy_l));
  }
};

// Parameters of all directions in shared memory: [which][DIRECTIONS][TILE_CHANNELS].
__device__ __forceinline__ void stage_columns(const TileArgs& p, const Seat& at, const float* from, float factor, float* to) {
  for (int i = threadIdx.x; i < p.K * TILE_CHANNELS; i += THREADS) {
    const int channel = at.tile * TILE_CHANNELS + i % TILE_CHANNELS;
    to[i] = from != nullptr && channel < p.channels ? from[i / TILE_CHANNELS * p.channels + channel] * factor : 0.f;
  }
}
__device__ __forceinline__ void load_columns(const float* from, const TileArgs& p, const Seat& at, int64 lead, float f[VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; v++) f[v] = from != nullptr && at.ok ? from[lead * p.channels + at.channel + v] : 0.f;
}
__device__ __forceinline__ void store_columns(float* to, const TileArgs& p, const Seat& at, int64 lead, const float f[VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; v++)
    if (at.ok) to[lead * p.channels + at.channel + v] = f[v];
}

// Step sizes are kept times DECAY_SCALE, and B over it: with 16-bit activations a decay is exp2(Delta A) then, and a
// softplus saves a product.
#if ACT == 0
__device__ __forceinline__ float scaled_softplus(float v) { return softplus(v); }
__device__ __forceinline__ float scaled_softplus(float v, float& slope) { return softplus(v, slope); }
#else
__device__ __forceinline__ float scaled_softplus(float v, float& slope) {
  const float e = exp2_approx(-fabsf(v)), r = rcp_approx(fmaf(e, LN2, LN2));
  slope = v >= 0.f ? r : e * r;
  return fmaf(e, log2p1_ratio(e), fmaxf(v, 0.f));
}
#endif

// Delta of one step, and its derivative if asked for; both 0 where there is no step (softplus(-infinity) is exactly 0).
template <bool SLOPE> __device__ __forceinline__ void step_size(RawDelta<VEC> raw, const float bias[VEC], bool valid, float x[VEC], float slope[VEC]) {
  valid = FULL || valid;
  if (SOFTPLUS && !valid) raw = lowest(raw);
  unpack(raw, x);
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    x[v] = fmaf(x[v], DECAY_SCALE, bias[v]);
    if constexpr (SLOPE) {
      slope[v] = valid ? DECAY_SCALE : 0.f;
      if (SOFTPLUS) x[v] = scaled_softplus(x[v], slope[v]);
    } else {
      if (SOFTPLUS) x[v] = scaled_softplus(x[v]);
    }
    if (!SOFTPLUS && !valid) x[v] = 0.f;
  }
}

// The directions' sum: a row a token.
struct Tile {
  float *rows, *mine;
  __device__ __forceinline__ void enter(const Seat& at, float* shared) { rows = shared; mine = shared + at.column; }
  __device__ __forceinline__ void read(int token, float f[VEC]) const {
    if (FULL || token >= 0) load_floats<VEC>(mine + token * TILE_CHANNELS, f);
  }
  __device__ __forceinline__ void write(int token, const float f[VEC]) const {
    if (FULL || token >= 0) store_floats<VEC>(mine + token * TILE_CHANNELS, f);
  }
  __device__ __forceinline__ void clear(const TileArgs& p) const {
    const float zero[4] = {};
    for (int i = threadIdx.x; i < p.L * TILE_CHANNELS / 4; i += THREADS) store_floats<4>(rows + 4 * i, zero);
  }
};

extern __shared__ float dynamic_shared[];

// What both passes hold: where a thread sits, the directions' parameters, and the tile in which the directions meet.
struct Walk {
  const TileArgs& p;
  const Seat at;
  float* parameters;  // [3][DIRECTIONS][TILE_CHANNELS]: A, bias and D
  Common common;
  Bases bases;
  Tile tile;
  __device__ __forceinline__ Walk(const TileArgs& p) : p(p), at(p) {}

  // With MERGE, the first direction of a complete path sets the tile (with ONE_SKIP to all directions' skips), the last
  // writes the result.
  __device__ __forceinline__ bool sets(int k) const { return !MERGE || (COMPLETE && k == 0); }
  __device__ __forceinline__ bool writes(int k) const { return !MERGE || (COMPLETE && k == p.K - 1); }
  __device__ __forceinline__ void parameter(int which, int k, float f[VEC]) const {
    load_floats<VEC>(parameters + (which * DIRECTIONS + k) * TILE_CHANNELS + at.column, f);
  }
  __device__ __forceinline__ void stage_parameters() const {
    const int size = DIRECTIONS * TILE_CHANNELS;
    stage_columns(p, at, p.A, 1.f, parameters);
    stage_columns(p, at, p.bias, DECAY_SCALE, parameters + size);
    stage_columns(p, at, p.D, 1.f, parameters + 2 * size);
    if (MERGE && !COMPLETE) tile.clear(p);
    __syncthreads();
    if (ONE_SKIP) {
      for (int i = threadIdx.x; i < TILE_CHANNELS; i += THREADS)
        for (int k = 1; k < p.K; k++) parameters[2 * size + i] += parameters[2 * size + k * TILE_CHANNELS + i];
      __syncthreads();
    }
  }
};
