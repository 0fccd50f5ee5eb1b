// What pair_links.cu and pair_backward.cu share: how a warp walks a direction and its reverse over the same tokens, with the
// inputs of its next piece on their way to shared memory. See kernels/README.md.
//
// A path is cut into pieces of CHUNKS times STEPS tokens. LANES lanes share a token, VEC channels each; a chunk of them holds
// STEPS consecutive tokens and walks them in the order of the one direction, then of the other. Blocks belong to TILE_CHANNELS
// channels of an image and a pair of directions; their warps take pieces in turn and need nothing of each other.
//
// Macros: ACT (16-bit activations), DELTA_FLOAT, WARPS, MIN_BLOCKS, ROUNDS (pieces a warp takes), SOFTPLUS, FULL (every step has
// a token, and every lane a channel); pair_backward.cu takes FIRST and LAST, too (whether the pair is the first or the last whose
// du is summed).
#pragma once

constexpr int LANES = 16, VEC = 2, CHUNKS = 2, STEPS = 7;
constexpr int TILE_CHANNELS = LANES * VEC, PIECE = CHUNKS * STEPS;
constexpr int SLOTS = 8;                         // a chunk's room in shared memory, for wide loads
constexpr int ROW = CHUNKS * SLOTS;
constexpr int THREADS = 32 * WARPS;

// Bytes of a warp's shared memory: B, C and the tokens of two pieces; two buffers of copied rows.
constexpr int COMMON_BYTES = 6 * ROW * 4;
constexpr int ACT_ROW = TILE_CHANNELS * (int)sizeof(act_t), DELTA_ROW = TILE_CHANNELS * (int)sizeof(delta_t);
constexpr int DY_AT = PIECE * ACT_ROW, DELTA_AT = 2 * DY_AT, COPIED = DELTA_AT + 2 * PIECE * DELTA_ROW;

struct PairArgs {
  const act_t* u;
  const delta_t* delta;
  const act_t *B, *C, *dy;
  const float *A, *D, *bias;      // (K, D); D and bias may be null
  const int* order;               // (K, pieces PIECE); -1 where there is no step
  const float *state_in, *dlast;  // (B, K, D), or null for zero
  act_t* du;                      // (B, L, D)
  float* du_before;               // (B, L, D): that of the pairs before this one; not used by a pair that is first and last
  delta_t* ddelta;                // (B, L, K, D)
  float* dBC;                     // (B, K, tiles, L, 2)
  float* dparams;                 // (B groups, 3 K D): dA, dD, dbias
  float* dstate;                  // (B, K, D), or null
  float* spans;                   // (B, K, pieces, D): sums of the pieces' step sizes
  float* links;                   // (B, K, pieces, D, 2): state and adjoint that pieces reach from zero; then, that enter them
  int64 u_b, delta_b, B_b, C_b, dy_b;  // strides: _b and _k in elements, _l in bytes
  int u_l, delta_l, delta_k, B_l, B_k, C_l, C_k, dy_l;
  int L, P, channels, K, tiles, pieces, groups;
  int batch, last_first;          // whether the last image comes first: what it was made from may still be in a cache
  int pairs, ahead[4], back[4];   // the pairs of this launch: a direction and its reverse
};

extern __shared__ float dynamic_shared[];

// Hides from the compiler how an address came about, so that it keeps it instead of computing it again for every piece.
template <class T> __device__ __forceinline__ T* kept(T* address) {
#ifndef VM_EMULATE
  asm volatile("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

// yes ? a : b, which the compiler cannot turn into a branch: shuffles behind one that parts a warp take ten times as long.
__device__ __forceinline__ float choose(bool yes, float a, float b) {
#ifdef VM_EMULATE
  return yes ? a : b;
#else
  float chosen;
  asm("{ .reg .pred yes; setp.ne.s32 yes, %3, 0; selp.f32 %0, %1, %2, yes; }" : "=f"(chosen) : "f"(a), "f"(b), "r"((int)yes));
  return chosen;
#endif
}

struct Seat {
  int b, pair, tile, group, lane, warp, chunk, column, channel;
  bool ok;
  __device__ __forceinline__ Seat(const PairArgs& p) {
    int i = blockIdx.x;
    tile = i % p.tiles; i /= p.tiles;
    group = i % p.groups; i /= p.groups;
    pair = i % p.pairs;
    b = p.last_first ? p.batch - 1 - i / p.pairs : i / p.pairs;
    lane = threadIdx.x & 31;
    warp = __shfl_sync(FULL_WARP, threadIdx.x >> 5, 0);  // the compiler learns that it is the same for all lanes
    chunk = lane / LANES;
    column = (lane % LANES) * VEC;
    ok = FULL || tile * TILE_CHANNELS + column < p.channels;
    channel = ok ? tile * TILE_CHANNELS + column : 0;
  }
  __device__ __forceinline__ int piece(int round) const { return (group * ROUNDS + round) * WARPS + warp; }
  __device__ __forceinline__ int direction(const PairArgs& p, bool reverse) const { return reverse ? p.back[pair] : p.ahead[pair]; }
};

__device__ __forceinline__ int row_seen(int token) { return FULL ? token : max(token, 0); }  // steps without a token read row 0

// A warp's tokens, and B and C of both directions: the same for all channels, so that a lane brings those of one step of one
// direction, for all in shared memory.
struct Common {
  float* words;
  const int* order;
  const act_t *B_0, *C_0;
  act_t B, C;
  int token;  // of the piece after the one whose B and C these are
  __device__ __forceinline__ void enter(const PairArgs& p, const Seat& at, float* shared) {
    const int k = at.direction(p, index(at) >= PIECE);
    words = shared;
    order = kept(p.order + p.ahead[at.pair] * p.P + index(at) % PIECE);
    B_0 = kept(p.B + at.b * p.B_b + (int64)k * p.B_k);
    C_0 = kept(p.C + at.b * p.C_b + (int64)k * p.C_k);
  }
  static __device__ __forceinline__ int index(const Seat& at) { return min(at.lane, 2 * PIECE - 1); }
  static __device__ __forceinline__ int slot(int step) { return step / STEPS * SLOTS + step % STEPS; }
  __device__ __forceinline__ int* tokens_of(int turn) const { return (int*)words + (4 + turn) * ROW; }
  __device__ __forceinline__ void load_tokens(const PairArgs& p, int piece) { token = piece < p.pieces ? order[piece * PIECE] : 0; }
  // Needs the piece's tokens in `token`.
  __device__ __forceinline__ void load(const PairArgs& p) {
    B = *row_of(B_0, row_seen(token), p.B_l);
    C = *row_of(C_0, row_seen(token), p.C_l);
  }
  __device__ __forceinline__ void leave_projections(const Seat& at) const {
    if (at.lane >= 2 * PIECE) return;
    const int to = index(at) / PIECE * ROW + slot(index(at) % PIECE);
    words[to] = to_float(B);
    words[2 * ROW + to] = to_float(C);
  }
  __device__ __forceinline__ void leave_tokens(const Seat& at, int turn) const {
    if (index(at) < PIECE) tokens_of(turn)[slot(index(at))] = token;
  }
  __device__ __forceinline__ void read_B(const Seat& at, bool reverse, float to[SLOTS]) const { load_floats<SLOTS>(words + reverse * ROW + at.chunk * SLOTS, to); }
  __device__ __forceinline__ void read_C(const Seat& at, bool reverse, float to[SLOTS]) const { load_floats<SLOTS>(words + (2 + reverse) * ROW + at.chunk * SLOTS, to); }
};

// Copies of a piece's rows of 32 channels, 16 bytes a lane. Without a token row 0 is read; rows that this launch writes are
// left out then, since another warp may be writing that one.
template <class T> struct Rows {
  static constexpr int PER_ROW = TILE_CHANNELS * (int)sizeof(T) / 16, TURNS = (PIECE * PER_ROW + 31) / 32;
  static __device__ __forceinline__ int wanted(const Seat& at) { return at.tile * TILE_CHANNELS + at.lane % PER_ROW * (16 / (int)sizeof(T)); }
  static __device__ __forceinline__ bool present(const PairArgs& p, const Seat& at) { return FULL || wanted(at) < p.channels; }
  static __device__ __forceinline__ int channel(const PairArgs& p, const Seat& at) { return present(p, at) ? wanted(at) : 0; }
  int token[TURNS];  // of the rows that a lane copies
  __device__ __forceinline__ Rows(const Seat& at, const int* tokens) {
#pragma unroll
    for (int i = 0; i < TURNS; i++) token[i] = tokens[Common::slot(min((i * 32 + at.lane) / PER_ROW, PIECE - 1))];
  }
  __device__ __forceinline__ void copy(const Seat& at, char* to, const T* from, int stride, bool written = false) const {
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const int part = i * 32 + at.lane;
      if (part < PIECE * PER_ROW && (FULL || !written || token[i] >= 0)) copy_16(to + part * 16, row_of(from, row_seen(token[i]), stride));
    }
  }
};

// What a lane's steps, or a piece, do from zero: the sum of (scaled) step sizes, the state after them, the adjoint before them.
struct Link { float x, h, g; };

// A lane and the inputs of its steps. The tokens' order is that of the direction ahead.
struct Walk {
  const PairArgs& p;
  const Seat at;
  Common common;
  char *buffers, *copied;  // of the warp; the buffer of this piece
  Raw<VEC> u[STEPS], dy[STEPS];
  int token[SLOTS];
  const act_t *u_0, *dy_0;
  const delta_t* delta_0[2];

  __device__ __forceinline__ Walk(const PairArgs& p, int warp_bytes) : p(p), at(p) {
    char* shared = (char*)dynamic_shared + at.warp * warp_bytes;
    common.enter(p, at, (float*)shared);
    buffers = shared + COMMON_BYTES;
    u_0 = kept(p.u + at.b * p.u_b + Rows<act_t>::channel(p, at));
    dy_0 = kept(p.dy + at.b * p.dy_b + Rows<act_t>::channel(p, at));
#pragma unroll
    for (int r = 0; r < 2; r++) delta_0[r] = kept(p.delta + at.b * p.delta_b + (int64)at.direction(p, r) * p.delta_k + Rows<delta_t>::channel(p, at));
  }
  // A direction's row of (B, K, pieces, D).
  __device__ __forceinline__ int64 first_link(bool reverse) const { return ((int64)at.b * p.K + at.direction(p, reverse)) * p.pieces * p.channels; }
  __device__ __forceinline__ bool valid(int j) const { return FULL || (token[j] >= 0 && at.ok); }
  __device__ __forceinline__ int row(int j) const { return at.chunk * STEPS + j; }

  // Begins the copies of the piece whose tokens are those of `turn`.
  __device__ __forceinline__ void copy(int turn, int buffer) const {
    const Rows<delta_t> delta_rows(at, common.tokens_of(turn));
    const Rows<act_t> rows(at, common.tokens_of(turn));
    char* to = buffers + turn * buffer;
#pragma unroll
    for (int r = 0; r < 2; r++) delta_rows.copy(at, to + DELTA_AT + r * PIECE * DELTA_ROW, delta_0[r], p.delta_l);
    rows.copy(at, to, u_0, p.u_l);
    rows.copy(at, to + DY_AT, dy_0, p.dy_l);
  }
  __device__ __forceinline__ void load(int turn, int buffer) {
    load_ints<SLOTS>(common.tokens_of(turn) + at.chunk * SLOTS, token);
    copied = buffers + turn * buffer;
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      u[j] = load_raw<VEC>((const act_t*)(copied + row(j) * ACT_ROW) + at.column);
      dy[j] = load_raw<VEC>((const act_t*)(copied + DY_AT + row(j) * ACT_ROW) + at.column);
      if (!valid(j)) u[j] = dy[j] = raw_zero<VEC>();
    }
  }
  // Delta of token j, and its derivative if asked for; both 0 where there is no token.
  template <bool SLOPE> __device__ __forceinline__ void step_size(bool reverse, int j, const float bias[VEC], float x[VEC], float slope[VEC]) const {
    RawDelta<VEC> raw = load_delta<VEC>((const delta_t*)(copied + DELTA_AT + (reverse * PIECE + row(j)) * DELTA_ROW) + at.column);
    if (SOFTPLUS && !valid(j)) raw = lowest(raw);
    unpack(raw, x);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      const float from = fmaf(x[v], DECAY_SCALE, bias[v]);
      if (SOFTPLUS) {
        x[v] = scaled_softplus(from);
        if constexpr (SLOPE) slope[v] = exp2_approx(from - x[v]);  // the derivative of softplus(v) is exp(v - softplus(v))
      } else {
        x[v] = valid(j) ? from : 0.f;
        if constexpr (SLOPE) slope[v] = valid(j) ? 1.f : 0.f;
      }
    }
  }
  // Whether a lane's chunk comes first.
  __device__ __forceinline__ bool is_first(bool reverse) const { return (at.chunk == 0) != reverse; }
};

// Runs `work` on this warp's pieces, with the next one's inputs, and what `begin` copies, on their way.
template <class Walker, class Begin, class Work> __device__ __forceinline__ void for_each_piece(Walker& walk, int buffer, Begin begin, Work work) {
  const PairArgs& p = walk.p;
  const Seat& at = walk.at;
  Common& common = walk.common;
  int piece = at.piece(0);
  common.load_tokens(p, piece);
  common.leave_tokens(at, 0);
  __syncwarp();
  if (piece < p.pieces) {
    walk.copy(0, buffer);
    begin(piece, 0);
    common.load(p);
  }
  common.load_tokens(p, at.piece(1));
#pragma unroll 1
  for (int round = 0; round < ROUNDS && piece < p.pieces; round++) {
    const int turn = round & 1, next = at.piece(round + 1);
    __syncwarp();
    common.leave_projections(at);
    common.leave_tokens(at, turn ^ 1);
    wait_for_copies();
    __syncwarp();
    if (round + 1 < ROUNDS && next < p.pieces) {
      walk.copy(turn ^ 1, buffer);
      begin(next, turn ^ 1);
      common.load(p);
      common.load_tokens(p, at.piece(round + 2));
    }
    walk.load(turn, buffer);
    work(piece, turn);
    piece = next;
  }
}

// A parameter of the block's channels, both directions.
__device__ __forceinline__ void stage_parameter(const PairArgs& p, const Seat& at, const float* from, float factor, float* to) {
#pragma unroll
  for (int turn = 0; turn < (2 * TILE_CHANNELS + THREADS - 1) / THREADS; turn++) {
    const int i = turn * THREADS + threadIdx.x, channel = at.tile * TILE_CHANNELS + i % TILE_CHANNELS;
    if (i >= 2 * TILE_CHANNELS) break;
    to[i] = from != nullptr && channel < p.channels ? from[at.direction(p, i >= TILE_CHANNELS) * p.channels + channel] * factor : 0.f;
  }
}
