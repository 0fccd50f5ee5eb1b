// The backward of the scan with one state a channel. See tile_walk.cuh and kernels/README.md.
//
// A direction takes two walks over its pieces. The first leaves what each does to the state and to the adjoint, from zero;
// combining these gives what enters each. The second needs no other piece's results then.
#include "common.cuh"
#include "tile_walk.cuh"

constexpr int ROOM = STEPS <= 1 ? 1 : STEPS <= 2 ? 2 : STEPS <= 4 ? 4 : STEPS <= 8 ? 8 : 16;  // a power of two

// A piece of direction k on the way forth or back.
struct Visit {
  int k, i;
  bool back;
  __device__ __forceinline__ Visit(int warp) : k(0), i(warp), back(false) {}
  __device__ __forceinline__ void advance(const TileArgs& p, int warp) {
    if (!back) {
      if (i + WARPS < p.pieces) i += WARPS; else back = true;
    } else {
      if (i >= WARPS) i -= WARPS; else { k++; back = false; i = warp; }
    }
  }
  __device__ __forceinline__ Place place() const { Place r; r.k = k; r.i = i; return r; }
};

constexpr int PARTS = THREADS > TILE_CHANNELS ? THREADS / TILE_CHANNELS : 1;
constexpr int SUMS = 2 + PARAMETER_ROWS;        // dA, dD, dbias and what rounding took from dA
constexpr int SCRATCH = (SUMS * WARPS > 3 * PARTS ? SUMS * WARPS : 3 * PARTS) * TILE_CHANNELS;

struct Segment { float decay, h, g; };

struct Backward : Walk {
  float* scratch;     // [SCRATCH]: the parameters' gradients of each warp; parts of segments
  float* segments;    // [3][pieces][TILE_CHANNELS]: what pieces do (decay, state, adjoint); once combined, what enters them
  float dA[VEC], dA_lost[VEC], dskip[VEC], dbias[VEC];

  __device__ __forceinline__ Backward(const TileArgs& p) : Walk(p) {
    parameters = dynamic_shared;
    scratch = parameters + 3 * DIRECTIONS * TILE_CHANNELS;
    common.enter(p, at, scratch + SCRATCH);
    bases.enter(p, at);
    tile.enter(at, scratch + SCRATCH + WARPS * WARP_WORDS);
    segments = tile.rows + (MERGE ? p.L * TILE_CHANNELS : 0);
    clear_sums();
  }
  __device__ __forceinline__ float* segment(int which, int i) const { return segments + (which * p.pieces + i) * TILE_CHANNELS; }
  __device__ __forceinline__ bool skips(int k) const { return !ONE_SKIP || k == 0; }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int v = 0; v < VEC; v++) dA[v] = dA_lost[v] = dskip[v] = dbias[v] = 0.f;
  }

  // Bring the last piece's B and C and the next one's tokens to shared memory, and read the next one's inputs.
  __device__ __forceinline__ void prepare(Visit next, Inputs<true>& inputs, int turn) {
    __syncwarp();
    common.leave_projections(at);
    common.leave_tokens(at, turn ^ 1);
    __syncwarp();
    if (next.k >= p.K) return;
    int token[SLOTS];
    common.tokens(at, turn ^ 1, token);
    inputs.load(p, at, bases, next.place(), token);
    common.load(p, at, next.place());
    next.advance(p, at.warp);
    if (next.k < p.K) common.load_tokens(p, at, next.place());
  }

  // A step's dy; 0 where there is no such step or channel.
  __device__ __forceinline__ void mask(const int token[SLOTS], Inputs<true>& inputs) const {
#pragma unroll
    for (int j = 0; j < STEPS; j++)
      if (!FULL && (token[j] < 0 || !at.ok)) inputs.dy[j] = raw_zero<VEC>();
  }

  __device__ __forceinline__ void walk_forth(Visit now, Inputs<true>& inputs, int turn) {
    float A[VEC], bias[VEC], B[SLOTS], C[SLOTS], a[STEPS][VEC];
    int token[SLOTS];
    Link forth[VEC], back[VEC], before[VEC], total[VEC];
    parameter(0, now.k, A);
    parameter(1, now.k, bias);
    common.read_B(at, B);
    common.tokens(at, turn, token);
    mask(token, inputs);
#pragma unroll
    for (int v = 0; v < VEC; v++) forth[v].decay = forth[v].h = back[v].h = 0.f;
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float x[VEC], f[VEC];
      step_size<false>(inputs.delta[j], bias, token[j] >= 0, x, nullptr);
      unpack(inputs.u[j], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        a[j][v] = decay_of(x[v], A[v]);
        forth[v].h = a[j][v] * forth[v].h + x[v] * f[v] * B[j];
        forth[v].decay += x[v];
      }
    }
    common.read_C(at, C);
#pragma unroll
    for (int j = STEPS - 1; j >= 0; j--) {
      float g[VEC];
      unpack(inputs.dy[j], g);
#pragma unroll
      for (int v = 0; v < VEC; v++) back[v].h = a[j][v] * (C[j] * g[v] + back[v].h);
    }
#pragma unroll
    for (int v = 0; v < VEC; v++) forth[v].decay = back[v].decay = decay_of(forth[v].decay, A[v]);
    scan_warp<false>(at, forth, before, total);
    float parts[3][VEC];
#pragma unroll
    for (int v = 0; v < VEC; v++) { parts[0][v] = total[v].decay; parts[1][v] = total[v].h; }
    scan_warp<true>(at, back, before, total);
#pragma unroll
    for (int v = 0; v < VEC; v++) parts[2][v] = total[v].h;
    if (at.chunk == CHUNKS - 1) {
      store_floats<VEC>(segment(0, now.i) + at.column, parts[0]);
      store_floats<VEC>(segment(1, now.i) + at.column, parts[1]);
    }
    if (at.chunk == 0) store_floats<VEC>(segment(2, now.i) + at.column, parts[2]);
  }

  // From each piece's own effect to the state and the adjoint that enter it; the last direction's parameters.
  __device__ __forceinline__ void turn_around(int k) {
    __syncthreads();
    if (k > 0) { store_parameters(k - 1); __syncthreads(); }
    const int part = threadIdx.x / TILE_CHANNELS, length = (p.pieces + PARTS - 1) / PARTS;
    const int first = min(part * length, p.pieces), end = part < PARTS ? min(first + length, p.pieces) : first;
    Segment* parts = (Segment*)scratch;
    if (PARTS > 1) {
      const int column = threadIdx.x % TILE_CHANNELS;
      Segment own;
      own.decay = 1.f; own.h = own.g = 0.f;
      for (int i = first; i < end; i++) {
        const float decay = segment(0, i)[column];
        own.g += own.decay * segment(2, i)[column];
        own.h = decay * own.h + segment(1, i)[column];
        own.decay *= decay;
      }
      if (part < PARTS) parts[part * TILE_CHANNELS + column] = own;
      __syncthreads();
    }
    for (int column = threadIdx.x % TILE_CHANNELS; column < TILE_CHANNELS; column += THREADS) {
      const int channel = at.tile * TILE_CHANNELS + column;
      const int64 index = ((int64)at.b * p.K + k) * p.channels + channel;
      const bool ok = part < PARTS && channel < p.channels;
      float h = ok && p.state_in != nullptr ? p.state_in[index] : 0.f, g = ok && p.dlast != nullptr ? p.dlast[index] : 0.f;
      for (int q = 0; q < part && q < PARTS; q++) { const Segment one = parts[q * TILE_CHANNELS + column]; h = one.decay * h + one.h; }
      for (int q = PARTS - 1; q > part; q--) { const Segment one = parts[q * TILE_CHANNELS + column]; g = one.decay * g + one.g; }
      for (int i = first; i < end; i++) {
        float* to = segment(1, i) + column;
        const float next = segment(0, i)[column] * h + *to;
        *to = h;
        h = next;
      }
      for (int i = end - 1; i >= first; i--) {
        float* to = segment(2, i) + column;
        const float next = segment(0, i)[column] * g + *to;
        *to = g;
        g = next;
      }
      if (part == 0 && ok && p.dstate != nullptr) p.dstate[index] = g;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void walk_back(Visit now, Inputs<true>& inputs, int turn) {
    float x[STEPS][VEC], a[STEPS][VEC], slope[STEPS][VEC], h[STEPS][VEC], sum[STEPS][VEC];
    float A[VEC], bias[VEC], B[SLOTS], C[SLOTS], state[VEC], carried[VEC];
    int token[SLOTS];
    Link forth[VEC], back[VEC], before[VEC], behind[VEC], total[VEC];
    parameter(0, now.k, A);
    parameter(1, now.k, bias);
    common.read_B(at, B);
    common.read_C(at, C);
    common.tokens(at, turn, token);
    mask(token, inputs);
#pragma unroll
    for (int v = 0; v < VEC; v++) { forth[v].decay = forth[v].h = back[v].h = 0.f; }
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float f[VEC];
      step_size<true>(inputs.delta[j], bias, token[j] >= 0, x[j], slope[j]);
      unpack(inputs.u[j], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        a[j][v] = decay_of(x[j][v], A[v]);
        forth[v].decay += x[j][v];
        forth[v].h = a[j][v] * forth[v].h + x[j][v] * f[v] * B[j];
      }
    }
#pragma unroll
    for (int j = STEPS - 1; j >= 0; j--) {
      float g[VEC];
      unpack(inputs.dy[j], g);
#pragma unroll
      for (int v = 0; v < VEC; v++) back[v].h = a[j][v] * (C[j] * g[v] + back[v].h);
    }
#pragma unroll
    for (int v = 0; v < VEC; v++) forth[v].decay = back[v].decay = decay_of(forth[v].decay, A[v]);
    scan_warp<false>(at, forth, before, total);
    scan_warp<true>(at, back, behind, total);
    load_floats<VEC>(segment(1, now.i) + at.column, state);
    load_floats<VEC>(segment(2, now.i) + at.column, carried);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      state[v] = before[v].decay * state[v] + before[v].h;
      carried[v] = behind[v].decay * carried[v] + behind[v].h;
    }
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
#pragma unroll
      for (int v = 0; v < VEC; v++) sum[j][v] = 0.f;
      if (!sets(now.k)) tile.read(token[j], sum[j]);
    }
    if (skips(now.k)) {
      float skip[VEC];
      parameter(2, now.k, skip);
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
        float f[VEC], g[VEC];
        unpack(inputs.u[j], f);
        unpack(inputs.dy[j], g);
#pragma unroll
        for (int v = 0; v < VEC; v++) { sum[j][v] += skip[v] * g[v]; dskip[v] += g[v] * f[v]; }
      }
    }
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float f[VEC];
      unpack(inputs.u[j], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        h[j][v] = state[v];  // the state before step j
        state[v] = a[j][v] * state[v] + x[j][v] * f[v] * B[j];
      }
    }
    const int first = now.i * PIECE + at.chunk * STEPS;
    delta_t* ddelta_k = p.ddelta + ((int64)at.b * p.L * p.K + now.k) * p.channels + at.channel;
    float shared_sums[2 * ROOM];  // dB and dC of each step, over this thread's channels
#pragma unroll
    for (int j = 2 * STEPS; j < 2 * ROOM; j++) shared_sums[j] = 0.f;
#pragma unroll
    for (int j = STEPS - 1; j >= 0; j--) {
      float f[VEC], gy[VEC], ddelta[VEC];
      unpack(inputs.u[j], f);
      unpack(inputs.dy[j], gy);
      shared_sums[2 * j] = shared_sums[2 * j + 1] = 0.f;
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const float g = C[j] * gy[v] + carried[v], through = g * B[j];  // g_t = C_t dy_t + a_{t+1} g_{t+1}
        carried[v] = g * a[j][v];
        const float r = carried[v] * h[j][v];                           // dL/d(Delta A)
        shared_sums[2 * j] += g * (x[j][v] * f[v]);
        shared_sums[2 * j + 1] += gy[v] * state[v];
        state[v] = h[j][v];
        sum[j][v] += through * x[j][v];
        ddelta[v] = (r * (A[v] * DECAY_UNSCALE) + through * f[v]) * slope[j][v];
        accumulate(dA[v], dA_lost[v], r, x[j][v]);
        dbias[v] += ddelta[v];
      }
      if (FULL || (token[j] >= 0 && at.ok))
        store_delta<VEC>(row_of(ddelta_k, row_read(token[j], first + j), p.K * p.channels * (int)sizeof(delta_t)), ddelta);
    }
    if (writes(now.k)) {
#pragma unroll
      for (int j = 0; j < STEPS; j++) store_du(now.k, token[j], sum[j]);
    } else {
#pragma unroll
      for (int j = 0; j < STEPS; j++) tile.write(token[j], sum[j]);
    }
    store_projections(now, turn, shared_sums);
    if (now.i < WARPS) leave_sums();
  }

  __device__ __forceinline__ void store_du(int k, int token, const float du[VEC]) const {
    if (!FULL && (!at.ok || token < 0)) return;
    const int directions = MERGE ? 1 : p.K, row = directions * p.channels * (int)sizeof(act_t);
    act_t* du_k = p.du + ((int64)at.b * p.L * directions + (MERGE ? 0 : k)) * p.channels + at.channel;
    store_act<VEC>(row_of(du_k, token, row), du);
  }

  // dB and dC over the lanes that share these steps; each then writes its share of the sums.
  __device__ __forceinline__ void store_projections(Visit now, int turn, float values[2 * ROOM]) const {
    constexpr int LEFT = 2 * ROOM > LANES ? 2 * ROOM / LANES : 1, COPIES = LANES > 2 * ROOM ? LANES / (2 * ROOM) : 1;
    constexpr int TOGETHER = LEFT > 1 ? 2 : 1;
    const int first_sum = reduce_over_lanes<2 * ROOM, LANES, 1>(values, at.lane);
    float* dBC = p.dBC + (((int64)at.b * p.K + now.k) * p.tiles + at.tile) * p.L * 2;
#pragma unroll
    for (int i = 0; i < LEFT; i += TOGETHER) {
      const int s = first_sum + i, j = s / 2;
      if (j >= STEPS || at.lane % COPIES != 0) continue;
      const int token = common.token_of(at, turn, j);
      if (s % 2 == 0) values[i] *= DECAY_UNSCALE;
      if (FULL || token >= 0) store_floats<TOGETHER>(dBC + (int64)row_read(token, now.i * PIECE + at.chunk * STEPS + j) * 2 + s % 2, values + i);
    }
  }

  // The parameters' gradients of this warp, at the end of a direction; the block's, once all warps have left theirs.
  __device__ __forceinline__ float* sums_of(int which, int warp) const { return scratch + (which * WARPS + warp) * TILE_CHANNELS; }
  __device__ __forceinline__ void leave_sums() {
#pragma unroll
    for (int v = 0; v < VEC; v++) {
#pragma unroll
      for (int hop = LANES; hop < 32; hop *= 2) {
        if constexpr (PARAMETER_ROWS > 1) {
          dA_lost[v] += __shfl_xor_sync(FULL_WARP, dA_lost[v], hop);
          add_exactly(dA[v], dA_lost[v], __shfl_xor_sync(FULL_WARP, dA[v], hop));
        } else {
          dA[v] += __shfl_xor_sync(FULL_WARP, dA[v], hop);
        }
        dskip[v] += __shfl_xor_sync(FULL_WARP, dskip[v], hop);
        dbias[v] += __shfl_xor_sync(FULL_WARP, dbias[v], hop);
      }
      if (at.chunk == 0) {
        sums_of(0, at.warp)[at.column + v] = dA[v];
        sums_of(1, at.warp)[at.column + v] = dskip[v];
        sums_of(2, at.warp)[at.column + v] = dbias[v];
        if constexpr (PARAMETER_ROWS > 1) sums_of(3, at.warp)[at.column + v] = dA_lost[v];
      }
    }
    clear_sums();
  }
  __device__ __forceinline__ void store_parameters(int k) {
    for (int i = threadIdx.x; i < 3 * TILE_CHANNELS; i += THREADS) {
      const int which = i / TILE_CHANNELS, column = i % TILE_CHANNELS, channel = at.tile * TILE_CHANNELS + column;
      if (channel >= p.channels || (which == 1 && !skips(k))) continue;
      const int row = 3 * p.K * p.channels;
      float total = 0.f, lost = 0.f;
      for (int w = 0; w < WARPS; w++) {
        if constexpr (PARAMETER_ROWS > 1) add_exactly(total, lost, sums_of(which, w)[column]), lost += which == 0 ? sums_of(3, w)[column] : 0.f;
        else total += sums_of(which, w)[column];
      }
      if (which == 0) total *= DECAY_UNSCALE;
      float* to = p.dparams + (int64)at.b * PARAMETER_ROWS * row + which * p.K * p.channels + channel;
      for (int same = k; same < (which == 1 && ONE_SKIP ? p.K : k + 1); same++) {
        to[same * p.channels] = total;
        if constexpr (PARAMETER_ROWS > 1) to[row + same * p.channels] = lost;
      }
    }
  }

  __device__ __forceinline__ void finish() {
    __syncthreads();
    store_parameters(p.K - 1);
    if (MERGE && !COMPLETE)
      for (int l = threadIdx.x / LANES; l < p.L; l += THREADS / LANES) {
        float du[VEC];
        load_floats<VEC>(tile.rows + l * TILE_CHANNELS + at.column, du);
        if (at.ok) store_act<VEC>(p.du + ((int64)at.b * p.L + l) * p.channels + at.channel, du);
      }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) tile_backward(const __grid_constant__ TileArgs p) {
  Backward block(p);
  Visit now(block.at.warp), next = now;
  Inputs<true> inputs, coming;
  int token[SLOTS];
  block.common.load_tokens(p, block.at, now.place());
  block.common.leave_tokens(block.at, 0);
  __syncwarp();
  block.common.tokens(block.at, 0, token);
  inputs.load(p, block.at, block.bases, now.place(), token);
  block.common.load(p, block.at, now.place());
  next.advance(p, block.at.warp);
  block.common.load_tokens(p, block.at, next.place());
  block.stage_parameters();
  int turned = 0;  // directions that have been walked forth
  for (int turn = 0; now.k < p.K; turn ^= 1) {
    block.prepare(next, coming, turn);
    if (!now.back) {
      block.walk_forth(now, inputs, turn);
    } else {
      if (turned == now.k) block.turn_around(turned++);
      block.walk_back(now, inputs, turn);
    }
    now = next;
    next.advance(p, block.at.warp);
    inputs = coming;
  }
  block.finish();
}
