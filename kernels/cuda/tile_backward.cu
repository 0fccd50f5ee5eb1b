// The backward of the scan with one state a channel. See tile_scan.cuh and kernels/README.md.
//
// A direction takes two walks. The first leaves in shared memory what each warp's steps of a round do to the state and to
// the adjoint, from zero; combining these gives the state and the adjoint that enter each. The second needs no other
// warp's results then, so its warps run free of barriers. A direction of one round keeps what the first walk computed.
#include "common.cuh"
#include "tile_scan.cuh"

constexpr int PARTS = THREADS / TILE_CHANNELS;
constexpr int SCRATCH = 3 * (WARPS > PARTS ? WARPS : PARTS) * TILE_CHANNELS;

// What steps do: the decay over them, the state that they reach from zero, and the adjoint before them from zero behind
// them. Once combined: the state that enters them and the adjoint that enters them from behind.
struct Segment { float decay, h, g; };

// A thread's steps of a round: what the recurrence needs.
template <bool SLOPE> struct Recurrence {
  float x[STEPS][VEC], a[STEPS][VEC], slope[SLOPE ? STEPS : 1][VEC];
  Link forth[VEC], back[VEC];   // (decay, h) and (decay, g) of the steps
  __device__ __forceinline__ void compute(const Steps<true>& raw, const float* B, const float* C, const float a2[VEC], const float bias[VEC]) {
#pragma unroll
    for (int v = 0; v < VEC; v++) forth[v].decay = forth[v].h = back[v].h = 0.f;
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float f[VEC];
      step_size<SLOPE>(raw.delta[j], bias, raw.has(j), x[j], slope[SLOPE ? j : 0]);
      unpack(raw.u[j], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        a[j][v] = decay_of(x[j][v], a2[v]);
        forth[v].decay += x[j][v];                                // the sum of Delta, until it is turned
        forth[v].h = a[j][v] * forth[v].h + x[j][v] * f[v] * B[j];
      }
    }
#pragma unroll
    for (int j = STEPS - 1; j >= 0; j--) {
      float g[VEC];
      unpack(raw.dy[j], g);
#pragma unroll
      for (int v = 0; v < VEC; v++) back[v].h = a[j][v] * (C[j] * g[v] + back[v].h);
    }
#pragma unroll
    for (int v = 0; v < VEC; v++) forth[v].decay = back[v].decay = decay_of(forth[v].decay, a2[v]);
  }
};

struct Backward {
  const TileArgs& p;
  const Seat at;
  Segment* segments;   // [rounds][WARPS][TILE_CHANNELS]
  float* scratch;      // [SCRATCH]: parts of segments, then sums of the parameters' gradients
  float* projections;  // [2 WARP_STEPS] of this warp
  Tile tile;
  Direction in;
  int k;
  int64 bk;
  float A[VEC], a2[VEC], bias[VEC], skip[VEC], dA[VEC], dskip[VEC], dbias[VEC];

  __device__ __forceinline__ Backward(const TileArgs& p) : p(p), at(p) {
    segments = (Segment*)dynamic_shared;
    scratch = dynamic_shared + 3 * p.rounds * WARPS * TILE_CHANNELS;
    projections = scratch + SCRATCH + at.warp * 2 * WARP_STEPS;
    tile.rows = scratch + SCRATCH + WARPS * 2 * WARP_STEPS;
  }
  __device__ __forceinline__ const float* B() const { return projections + at.lane / GROUPS * STEPS; }
  __device__ __forceinline__ const float* C() const { return B() + WARP_STEPS; }
  __device__ __forceinline__ Segment& segment(int round) const { return segments[(round * WARPS + at.warp) * TILE_CHANNELS + at.column]; }

  __device__ __forceinline__ void enter(int direction) {
    k = direction;
    bk = (int64)at.b * p.K + k;
    in.enter(p, at, k);
    load_columns(p.A, p, at, k, A);
    load_columns(p.bias, p, at, k, bias);
    load_columns(p.D, p, at, k, skip);
#pragma unroll
    for (int v = 0; v < VEC; v++) { a2[v] = A[v] * DECAY_SCALE; dA[v] = dskip[v] = dbias[v] = 0.f; }
  }

  // A round's inputs, in two turns: the tokens first.
  __device__ __forceinline__ void find_tokens(int round, int token[STEPS]) const { load_tokens(in.order, at.first_step(round), token); }
  __device__ __forceinline__ void find(int round, int token[STEPS], Projections& shared) const {
    find_tokens(round, token);
    shared.load_tokens(at, in.order, round);
  }
  __device__ __forceinline__ void load(int round, const int token[STEPS], Steps<true>& raw, Projections& shared) const {
    raw.load(p, in, at.first_step(round), token);
    shared.load(p, at, in, round);
  }
  // Channels and steps that do not exist have dy = 0.
  __device__ __forceinline__ void mask(Steps<true>& raw) const {
#pragma unroll
    for (int j = 0; j < STEPS; j++)
      if (!raw.has(j) || !at.ok) raw.dy[j] = raw_zero<VEC>();
  }

  // The last (in the lanes of the warp's last chunk) and the first (likewise) hold the warp's totals.
  __device__ __forceinline__ void leave_segment(int round, const Link forth[VEC], const Link back[VEC]) {
    const int place = at.lane / GROUPS;
    Segment* to = &segment(round);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      if (place == PER_WARP - 1) { to[v].decay = forth[v].decay; to[v].h = forth[v].h; }
      if (place == 0) to[v].g = back[v].h;
    }
  }

  // From each segment's own effect to the state and the adjoint that enter it.
  __device__ __forceinline__ void combine() {
    __syncthreads();
    const int column = threadIdx.x % TILE_CHANNELS, part = threadIdx.x / TILE_CHANNELS, channel = at.tile * TILE_CHANNELS + column;
    const int total = p.rounds * WARPS, length = (total + PARTS - 1) / PARTS;
    const int first = min(part * length, total), end = part < PARTS ? min(first + length, total) : first;
    const int64 index = bk * p.channels + channel;
    Segment* parts = (Segment*)scratch;
    Segment own;
    own.decay = 1.f; own.h = own.g = 0.f;
    for (int s = first; s < end; s++) {
      const Segment one = segments[s * TILE_CHANNELS + column];
      own.g += own.decay * one.g;
      own.h = one.decay * own.h + one.h;
      own.decay *= one.decay;
    }
    if (part < PARTS) parts[part * TILE_CHANNELS + column] = own;
    __syncthreads();
    float h = p.state_in != nullptr && channel < p.channels ? p.state_in[index] : 0.f;
    float g = p.dlast != nullptr && channel < p.channels ? p.dlast[index] : 0.f;
    for (int q = 0; q < part && q < PARTS; q++) { const Segment one = parts[q * TILE_CHANNELS + column]; h = one.decay * h + one.h; }
    for (int q = PARTS - 1; q > part; q--) { const Segment one = parts[q * TILE_CHANNELS + column]; g = one.decay * g + one.g; }
    for (int s = first; s < end; s++) {
      Segment& one = segments[s * TILE_CHANNELS + column];
      const float next = one.decay * h + one.h;
      one.h = h;
      h = next;
    }
    for (int s = end - 1; s >= first; s--) {
      Segment& one = segments[s * TILE_CHANNELS + column];
      const float next = one.decay * g + one.g;
      one.g = g;
      g = next;
    }
    if (part == 0 && p.dstate != nullptr && channel < p.channels) p.dstate[index] = g;
    __syncthreads();
  }

  // The second walk's round, from what enters the warp's steps.
  __device__ __forceinline__ void finish(int round, const Steps<true>& raw, Recurrence<true>& now, const Link before[VEC], const Link behind[VEC]) {
    float state[VEC], carried[VEC], h[STEPS][VEC];
    const Segment* enters = &segment(round);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      state[v] = before[v].decay * enters[v].h + before[v].h;
      carried[v] = behind[v].decay * enters[v].g + behind[v].h;
    }
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float f[VEC];
      unpack(raw.u[j], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        h[j][v] = state[v];  // the state before step j
        state[v] = now.a[j][v] * state[v] + now.x[j][v] * f[v] * B()[j];
      }
    }
    const int first = at.first_step(round), row = p.K * p.channels;
    const int64 image = ((int64)at.b * p.L * p.K + k) * p.channels + at.channel;
    delta_t* ddelta_k = p.ddelta + image;
    int token[STEPS];
    load_tokens(in.order, first, token);
    float shared_sums[2 * STEPS];  // dB and dC of each step, over this thread's channels
#if MERGE
    float sum[2][VEC];
    tile.read(at, token[STEPS - 1], sum[(STEPS - 1) & 1]);
#endif
#pragma unroll
    for (int j = STEPS - 1; j >= 0; j--) {
      float f[VEC], gy[VEC], du[VEC], ddelta[VEC];
      unpack(raw.u[j], f);
      unpack(raw.dy[j], gy);
      const float B_j = B()[j], C_j = C()[j];
      shared_sums[2 * j] = shared_sums[2 * j + 1] = 0.f;
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const float x = now.x[j][v];
        const float g = C_j * gy[v] + carried[v], through = g * B_j;  // g_t = C_t dy_t + a_{t+1} g_{t+1}
        carried[v] = g * now.a[j][v];
        const float r = carried[v] * h[j][v];                         // dL/d(Delta A)
        shared_sums[2 * j] += g * (x * f[v]);
        shared_sums[2 * j + 1] += gy[v] * state[v];
        state[v] = h[j][v];
        du[v] = through * x + skip[v] * gy[v];
        ddelta[v] = (r * A[v] + through * f[v]) * now.slope[j][v];
        dA[v] += r * x;
        dskip[v] += gy[v] * f[v];
        dbias[v] += ddelta[v];
      }
#if MERGE
      if (j > 0) tile.read(at, token[j - 1], sum[(j - 1) & 1]);
#pragma unroll
      for (int v = 0; v < VEC; v++) du[v] += sum[j & 1][v];
      tile.write(at, token[j], du);
#endif
      if (token[j] >= 0 && at.ok) {
        store_delta<VEC>(row_of(ddelta_k, row_read(token[j], first + j), row * (int)sizeof(delta_t)), ddelta);
#if !MERGE
        store_act<VEC>(row_of(p.du + image, token[j], row * (int)sizeof(act_t)), du);
#endif
      }
    }
    store_sums(first, shared_sums);
  }

  // dB and dC over the lanes that share these steps; each then writes its share of the sums.
  __device__ __forceinline__ void store_sums(int first, float sums[2 * STEPS]) {
    constexpr int LEFT = 2 * STEPS > GROUPS ? 2 * STEPS / GROUPS : 1, COPIES = GROUPS > 2 * STEPS ? GROUPS / (2 * STEPS) : 1;
    const int first_sum = reduce_over_lanes<2 * STEPS, GROUPS, 1>(sums, at.lane);
    float* dBC = p.dBC + (bk * p.tiles + at.tile) * p.L * 2;
    constexpr int TOGETHER = LEFT > 1 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < LEFT; i += TOGETHER) {
      const int s = first_sum + i, step = first + s / 2;
      const int row = row_read(in.order[step], step);
      if (row >= 0 && at.lane % COPIES == 0) store_floats<TOGETHER>(dBC + (int64)row * 2 + s % 2, sums + i);
    }
  }

  // The parameters' gradients of this direction, over the block's chunks.
  __device__ __forceinline__ void store_parameters() {
#pragma unroll
    for (int v = 0; v < VEC; v++) {
#pragma unroll
      for (int hop = GROUPS; hop < 32; hop *= 2) {
        dA[v] += __shfl_xor_sync(FULL_WARP, dA[v], hop);
        dskip[v] += __shfl_xor_sync(FULL_WARP, dskip[v], hop);
        dbias[v] += __shfl_xor_sync(FULL_WARP, dbias[v], hop);
      }
      if (at.lane < GROUPS) {
        float* to = scratch + at.warp * TILE_CHANNELS + at.column + v;
        to[0] = dA[v]; to[WARPS * TILE_CHANNELS] = dskip[v]; to[2 * WARPS * TILE_CHANNELS] = dbias[v];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * TILE_CHANNELS; i += THREADS) {
      const int which = i / TILE_CHANNELS, column = i % TILE_CHANNELS, channel = at.tile * TILE_CHANNELS + column;
      float total = 0.f;
      for (int w = 0; w < WARPS; w++) total += scratch[(which * WARPS + w) * TILE_CHANNELS + column];
      if (channel < p.channels) p.dparams[(((int64)at.b * 3 + which) * p.K + k) * p.channels + channel] = total;
    }
    __syncthreads();
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) tile_backward(const __grid_constant__ TileArgs p) {
  Backward block(p);
  const Seat& at = block.at;
  block.tile.clear(p);
  for (int k = 0; k < p.K; k++) {
    block.enter(k);
    Steps<true> raw, next;
    Projections shared;
    int token[STEPS];
    Link before[VEC], behind[VEC], total[VEC], total_back[VEC];
    block.find(0, token, shared);
    block.load(0, token, raw, shared);
    shared.stage(at, block.projections);
#if ONE_ROUND
    Recurrence<true> now;
    block.mask(raw);
    now.compute(raw, block.B(), block.C(), block.a2, block.bias);
    scan_warp<false>(at, now.forth, before, total);
    scan_warp<true>(at, now.back, behind, total_back);
    block.leave_segment(0, total, total_back);
    block.combine();
    block.finish(0, raw, now, before, behind);
#else
    block.find(min(1, p.rounds - 1), token, shared);
    const auto first_walk = [&](int round, Steps<true>& raw, Steps<true>& next) {
      block.load(min(round + 1, p.rounds - 1), token, next, shared);
      block.find_tokens(min(round + 2, p.rounds - 1), token);
      block.mask(raw);
      Recurrence<false> now;
      now.compute(raw, block.B(), block.C(), block.a2, block.bias);
      scan_warp<false>(at, now.forth, before, total);
      scan_warp<true>(at, now.back, behind, total_back);
      block.leave_segment(round, total, total_back);
      shared.stage(at, block.projections);
      shared.load_tokens(at, block.in.order, min(round + 2, p.rounds - 1));
    };
    for (int round = 0; round < p.rounds; round += 2) {
      first_walk(round, raw, next);
      if (round + 1 == p.rounds) break;
      first_walk(round + 1, next, raw);
    }
    // The last round's B and C are staged; its other inputs are wherever the first walk ended.
    block.find(p.rounds - 1, token, shared);
    block.load(p.rounds - 1, token, raw, shared);
    block.combine();
    for (int round = p.rounds - 1; round >= 0; round--) {
      Recurrence<true> now;
      block.mask(raw);
      if (round > 0) block.find(round - 1, token, shared);
      now.compute(raw, block.B(), block.C(), block.a2, block.bias);
      if (round > 0) block.load(round - 1, token, next, shared);
      scan_warp<false>(at, now.forth, before, total);
      scan_warp<true>(at, now.back, behind, total_back);
      block.finish(round, raw, now, before, behind);
      if (round > 0) {
        shared.stage(at, block.projections);
        raw = next;
      }
    }
#endif
    block.store_parameters();
  }
  if (MERGE) block.tile.store(p, at, p.du, false);
}
