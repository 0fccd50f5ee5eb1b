// The forward of the scan with one state a channel. See tile_scan.cuh and kernels/README.md.
//
// A round's states need all threads' Links, that is a barrier. While the others arrive, a thread prepares its next round:
// step sizes, decays and its own Link, which need no state.
#include "common.cuh"
#include "tile_scan.cuh"

// The skip D u of all directions is where the tile starts; otherwise each direction adds its own.
constexpr bool SKIP_FIRST = MERGE && COMPLETE;

// A round of a thread, from its inputs to the Links before its own.
struct Round {
  float a[STEPS][VEC], b[STEPS][VEC];
  Raw<VEC> u[SKIP_FIRST ? 1 : STEPS];
  Link before[VEC];
};

// Which direction and round the next of a sequence is.
struct Turn {
  int k = 0, round = 0;
  __device__ __forceinline__ void advance(const TileArgs& p) {
    if (++round == p.rounds) { round = 0; k++; }
  }
};

struct Forward {
  const TileArgs& p;
  const Seat at;
  Link* totals;         // [2][WARPS][TILE_CHANNELS], of even and odd rounds
  float* carries;       // [2][TILE_CHANNELS]: the state at a round's start
  float* projections;   // [2][2 WARP_STEPS] of this warp
  Tile tile;
  Steps<false> raw;
  Projections shared;
  int ahead[STEPS];     // tokens of the inputs that are loaded next
  Turn found, loaded, prepared, walked;  // the next whose tokens are loaded, whose inputs are loaded, ...
  Direction in;         // of loaded
  float a2[VEC], bias[VEC], skip[VEC];  // of prepared, prepared and walked

  __device__ __forceinline__ Forward(const TileArgs& p) : p(p), at(p) {
    totals = (Link*)dynamic_shared;
    carries = dynamic_shared + 4 * WARPS * TILE_CHANNELS;
    projections = carries + 2 * TILE_CHANNELS + at.warp * 4 * WARP_STEPS;
    tile.rows = carries + 2 * TILE_CHANNELS + WARPS * 4 * WARP_STEPS;
  }
  __device__ __forceinline__ void find_next() {
    if (found.k == p.K) return;
    const int* order = p.order + (int64)found.k * p.P;
    load_tokens(order, at.first_step(found.round), ahead);
    shared.load_tokens(at, order, found.round);
    found.advance(p);
  }
  __device__ __forceinline__ void load_next() {
    if (loaded.k == p.K) return;
    if (loaded.round == 0) in.enter(p, at, loaded.k);
    raw.load(p, in, at.first_step(loaded.round), ahead);
    shared.load(p, at, in, loaded.round);
    loaded.advance(p);
  }

  // Turn what was loaded for the next round into decays and inputs of the state, and start the loads of the one after.
  __device__ __forceinline__ void prepare(int parity, Round& to, Link own[VEC]) {
    if (prepared.round == 0) {
      load_columns(p.A, p, at, prepared.k, a2);
      load_columns(p.bias, p, at, prepared.k, bias);
#pragma unroll
      for (int v = 0; v < VEC; v++) a2[v] *= DECAY_SCALE;
    }
    prepared.advance(p);
    float* staged = projections + parity * 2 * WARP_STEPS;
    shared.stage(at, staged);
    find_next();
    float B[STEPS];
    load_floats<STEPS>(staged + at.lane / GROUPS * STEPS, B);
#pragma unroll
    for (int v = 0; v < VEC; v++) own[v].decay = own[v].h = 0.f;
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float x[VEC], f[VEC];
      step_size<false>(raw.delta[j], bias, raw.has(j), x, nullptr);
      if constexpr (!SKIP_FIRST) to.u[j] = raw.u[j];
      unpack(raw.u[j], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        to.a[j][v] = decay_of(x[v], a2[v]);
        to.b[j][v] = x[v] * f[v] * B[j];
        own[v].decay += x[v];                               // the sum of Delta, until it is turned
        own[v].h = to.a[j][v] * own[v].h + to.b[j][v];
      }
    }
#pragma unroll
    for (int v = 0; v < VEC; v++) own[v].decay = decay_of(own[v].decay, a2[v]);
    load_next();
  }

  __device__ __forceinline__ void publish(int parity, const Link own[VEC], Round& to) {
    Link total[VEC];
    scan_warp<false>(at, own, to.before, total);
    if (at.lane / GROUPS == PER_WARP - 1)
#pragma unroll
      for (int v = 0; v < VEC; v++) totals[(parity * WARPS + at.warp) * TILE_CHANNELS + at.column + v] = total[v];
  }

  // The state that enters this thread's steps; the last warp passes on the one at the round's end.
  __device__ __forceinline__ void collect(int parity, const Round& now, float h[VEC]) {
    const int64 bk = (int64)at.b * p.K + walked.k;
    if (walked.round == 0) load_columns(p.state_in, p, at, bk, h);
    else load_floats<VEC>(carries + parity * TILE_CHANNELS + at.column, h);
    const Link* from = totals + parity * WARPS * TILE_CHANNELS + at.column;
#pragma unroll 4
    for (int w = 0; w < at.warp; w++)
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const Link total = from[w * TILE_CHANNELS + v];
        h[v] = total.decay * h[v] + total.h;
      }
    if (at.warp == WARPS - 1) {
      float end[VEC];
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const Link total = from[at.warp * TILE_CHANNELS + v];
        end[v] = total.decay * h[v] + total.h;
      }
      if (at.lane < GROUPS) {
        if (walked.round == p.rounds - 1) store_columns(p.last_state, p, at, bk, end);
        else store_floats<VEC>(carries + (1 - parity) * TILE_CHANNELS + at.column, end);
      }
    }
#pragma unroll
    for (int v = 0; v < VEC; v++) h[v] = now.before[v].decay * h[v] + now.before[v].h;
  }

  __device__ __forceinline__ void walk(int parity, const Round& now, const int token[STEPS]) {
    float h[VEC], C[STEPS], sum[STEPS][VEC];
#if MERGE
#pragma unroll
    for (int j = 0; j < STEPS; j++) tile.read(at, token[j], sum[j]);
#endif
    if (!SKIP_FIRST && walked.round == 0) load_columns(p.D, p, at, walked.k, skip);
    load_floats<STEPS>(projections + parity * 2 * WARP_STEPS + WARP_STEPS + at.lane / GROUPS * STEPS, C);
    collect(parity, now, h);
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float f[VEC], y[VEC];
      if constexpr (!SKIP_FIRST) unpack(now.u[j], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        h[v] = now.a[j][v] * h[v] + now.b[j][v];
        y[v] = h[v] * C[j] + (SKIP_FIRST ? 0.f : skip[v] * f[v]);
      }
#if MERGE
#pragma unroll
      for (int v = 0; v < VEC; v++) y[v] += sum[j][v];
      tile.write(at, token[j], y);
#else
      if (token[j] >= 0 && at.ok) {
#if GATE
        unpack(load_raw<VEC>(row_of(p.z + at.b * p.z_b + (int64)walked.k * p.z_k + at.channel, token[j], p.z_l)), f);
#pragma unroll
        for (int v = 0; v < VEC; v++) y[v] *= silu(f[v]);
#endif
        store_act<VEC>(p.y + (((int64)at.b * p.L + token[j]) * p.K + walked.k) * p.channels + at.channel, y);
      }
#endif
    }
  }

  // A round of which all but the states is known, and what can be known of the next.
  __device__ __forceinline__ bool advance(int parity, const Round& now, Round& next) {
    Link own[VEC];
    const bool more = prepared.k < p.K;
    int token[STEPS];
    load_tokens(p.order + (int64)walked.k * p.P, at.first_step(walked.round), token);
    if (more) prepare(1 - parity, next, own);
    __syncthreads();
    walk(parity, now, token);
    walked.advance(p);
    if (more) publish(1 - parity, own, next);
    return more;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) tile_forward(const __grid_constant__ TileArgs p) {
  Forward block(p);
  block.tile.start(p, block.at, SKIP_FIRST ? p.u : nullptr);
  Round even, odd;
  Link own[VEC];
  block.find_next();
  block.load_next();
  block.prepare(0, even, own);
  block.publish(0, own, even);
  while (block.advance(0, even, odd) && block.advance(1, odd, even)) {}
  if (MERGE) block.tile.store(p, block.at, p.y, true);
}
