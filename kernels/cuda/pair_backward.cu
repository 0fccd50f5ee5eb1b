// The backward of the scan with one state a channel, a direction and its reverse at a time. See pair_walk.cuh and
// kernels/README.md.
//
// What enters each piece is known from pair_links.cu, so that all pieces are walked at once. u and dy are read once for both
// directions, whose du is summed in registers; the pairs of a path follow one another, in a fixed order.
#include "common.cuh"
#include "pair_walk.cuh"

// The lanes' sums of dB and dC: SUM_ROW words a lane, apart from the other chunk's by 16 banks.
constexpr int SUMS = 16, SUM_ROW = SUMS + 4, SUM_WORDS = 32 * SUM_ROW + CHUNKS * 16;
constexpr int GRADIENT_WORDS = 2 * 32 * 2 * VEC;  // dA and dbias of a lane, of both directions
constexpr int LINKS_AT = COPIED, BEFORE_AT = LINKS_AT + 2 * TILE_CHANNELS * 8;
constexpr int MAIN_BUFFER = BEFORE_AT + (FIRST ? 0 : PIECE * TILE_CHANNELS * 4);
constexpr int MAIN_BYTES = COMMON_BYTES + 2 * MAIN_BUFFER + 4 * (SUM_WORDS + GRADIENT_WORDS);

struct Backward : Walk {
  float skip[VEC], dskip[VEC], du[STEPS][VEC];
  float *sums, *gradients;   // of the warp; of the lane: [2][2][VEC] with 64 VEC words between directions
  const float *parameters, *links, *before_rows;
  delta_t* ddelta_0[2];
  float *dBC_0[2], *before_0;
  act_t* du_0;

  __device__ __forceinline__ Backward(const PairArgs& p, const float* shared_parameters) : Walk(p, MAIN_BYTES) {
    sums = (float*)(buffers + 2 * MAIN_BUFFER);
    gradients = sums + SUM_WORDS + at.lane * (2 * VEC);
    parameters = shared_parameters + at.column;
    const int64 first_row = (int64)at.b * p.L;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int k = at.direction(p, r);
      ddelta_0[r] = kept(p.ddelta + (first_row * p.K + k) * p.channels + at.channel);
      dBC_0[r] = kept(p.dBC + (((int64)at.b * p.K + k) * p.tiles + at.tile) * p.L * 2 + at.lane % 2);
    }
    // Half of the lanes copy what enters one direction's pieces, the others the other direction's: two channels each.
    links = kept(p.links + 2 * (first_link(at.chunk) + at.channel));
    before_rows = kept(p.du_before + first_row * p.channels + Rows<float>::channel(p, at));
    before_0 = kept(p.du_before + first_row * p.channels + at.channel);
    du_0 = kept(p.du + first_row * p.channels + at.channel);
    clear();
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int v = 0; v < VEC; v++) skip[v] = dskip[v] = 0.f;
#pragma unroll
    for (int i = 0; i < 4 * VEC; i++) gradients[i / (2 * VEC) * (64 * VEC) + i % (2 * VEC)] = 0.f;
    if (!FIRST || p.D == nullptr || !at.ok) return;
    for (int k = 0; k < p.K; k++)
#pragma unroll
      for (int v = 0; v < VEC; v++) skip[v] += p.D[k * p.channels + at.channel + v];
  }
  __device__ __forceinline__ void begin(int piece, int turn) const {
    char* to = buffers + turn * MAIN_BUFFER;
    if (at.ok) copy_16(to + LINKS_AT + at.lane * 16, row_of(links, piece, p.channels * 8));
    if (!FIRST && Rows<float>::present(p, at)) Rows<float>(at, common.tokens_of(turn)).copy(at, to + BEFORE_AT, before_rows, p.channels * 4, true);
  }

  // The state (times DECAY_SCALE) before a lane's steps and the adjoint behind them: the second chunk takes the state from the
  // first one's steps, the first one takes the adjoint from the second's.
  __device__ __forceinline__ void enter(bool reverse, const Link own[VEC], const float A[VEC], float state[VEC], float carried[VEC]) const {
    const bool first = is_first(reverse);
    float entering[2 * VEC];
    load_floats<2 * VEC>((const float*)(copied + LINKS_AT) + 2 * (reverse * TILE_CHANNELS + at.column), entering);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      state[v] = at.ok ? entering[2 * v] : 0.f;
      carried[v] = at.ok ? entering[2 * v + 1] : 0.f;
      const float other = __shfl_xor_sync(FULL_WARP, choose(first, own[v].h, own[v].g), LANES);
      const float decay = decay_of(__shfl_xor_sync(FULL_WARP, own[v].x, LANES), A[v]);
      const float next = decay * choose(first, carried[v], state[v]) + other;
      carried[v] = choose(first, next, carried[v]);
      state[v] = choose(first, state[v], next);
    }
  }

  template <bool REVERSE> __device__ __forceinline__ void walk(int turn) {
    float A[VEC], bias[VEC], x[STEPS][VEC], a[STEPS][VEC], slope[STEPS][VEC], h[STEPS][VEC], B[SLOTS], C[SLOTS];
    float state[VEC], carried[VEC], sum[4 * VEC];
    Link own[VEC];
    load_floats<VEC>(parameters + REVERSE * TILE_CHANNELS, A);
    load_floats<VEC>(parameters + (2 + REVERSE) * TILE_CHANNELS, bias);
    common.read_B(at, REVERSE, B);
    common.read_C(at, REVERSE, C);
#pragma unroll
    for (int v = 0; v < VEC; v++) own[v].x = own[v].h = own[v].g = 0.f;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const int j = REVERSE ? STEPS - 1 - i : i;
      float f[VEC];
      step_size<true>(REVERSE, j, bias, x[i], slope[i]);
      unpack(u[j], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        a[i][v] = decay_of(x[i][v], A[v]);
        own[v].h = a[i][v] * own[v].h + x[i][v] * f[v] * B[j];
        own[v].x += x[i][v];
      }
    }
#pragma unroll
    for (int i = STEPS - 1; i >= 0; i--) {
      const int j = REVERSE ? STEPS - 1 - i : i;
      float g[VEC];
      unpack(dy[j], g);
#pragma unroll
      for (int v = 0; v < VEC; v++) own[v].g = a[i][v] * (C[j] * g[v] + own[v].g);
    }
    enter(REVERSE, own, A, state, carried);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const int j = REVERSE ? STEPS - 1 - i : i;
      float f[VEC];
      unpack(u[j], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        h[i][v] = state[v];  // before step i
        state[v] = a[i][v] * state[v] + x[i][v] * f[v] * B[j];
      }
    }
    float* to = gradients + REVERSE * (64 * VEC);
    float shared_sums[SUMS];  // dB and dC of each token, over this lane's channels
    load_floats<2 * VEC>(to, sum);
#pragma unroll
    for (int j = 2 * STEPS; j < SUMS; j++) shared_sums[j] = 0.f;
#pragma unroll
    for (int i = STEPS - 1; i >= 0; i--) {
      const int j = REVERSE ? STEPS - 1 - i : i;
      float f[VEC], gy[VEC], ddelta[VEC];
      unpack(u[j], f);
      unpack(dy[j], gy);
      shared_sums[2 * j] = shared_sums[2 * j + 1] = 0.f;
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const float g = C[j] * gy[v] + carried[v], through = g * B[j];  // g_t = C_t dy_t + a_{t+1} g_{t+1}
        carried[v] = g * a[i][v];
        const float r = carried[v] * h[i][v];                           // dL/d(Delta A), times DECAY_SCALE
        shared_sums[2 * j] += g * (x[i][v] * f[v]);
        shared_sums[2 * j + 1] += gy[v] * state[v];
        state[v] = h[i][v];
        du[j][v] = REVERSE ? through * x[i][v] + du[j][v] : through * x[i][v];
        ddelta[v] = (r * (A[v] * DECAY_UNSCALE) + through * f[v]) * slope[i][v];
        sum[v] += r * x[i][v];
        sum[VEC + v] += ddelta[v];
      }
      if (valid(j)) store_delta<VEC>(row_of(ddelta_0[REVERSE], token[j], p.K * p.channels * (int)sizeof(delta_t)), ddelta);
    }
    store_floats<2 * VEC>(to, sum);
    store_projections(dBC_0[REVERSE], turn, shared_sums);
  }

  // dB and dC over the lanes that share a token: through shared memory, where a lane then sums one value.
  __device__ __forceinline__ void store_projections(float* dBC, int turn, const float values[SUMS]) const {
    const int which = at.lane % LANES;
    __syncwarp();
    store_floats<SUMS>(sums + at.lane * SUM_ROW + at.chunk * 16, values);
    __syncwarp();
    const float* from = sums + at.chunk * (LANES * SUM_ROW + 16) + which;
    float total = 0.f;
#pragma unroll
    for (int q = 0; q < LANES; q++) total += from[q * SUM_ROW];
    if (which >= 2 * STEPS) return;
    const int row = common.tokens_of(turn)[at.chunk * SLOTS + which / 2];
    if (FULL || row >= 0) *row_of(dBC, row, 8) = total * DECAY_UNSCALE;
  }

  // du of both directions with the skip's, or with that of the pairs before.
  __device__ __forceinline__ void store_du() {
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      float f[VEC], g[VEC], before[VEC];
      if (FIRST) {
        unpack(dy[j], g);
        unpack(u[j], f);
      } else {
        load_floats<VEC>((const float*)(copied + BEFORE_AT) + row(j) * TILE_CHANNELS + at.column, before);
      }
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        if (FIRST) { before[v] = skip[v] * g[v]; dskip[v] += g[v] * f[v]; }
        du[j][v] = du[j][v] * DECAY_UNSCALE + before[v];
      }
      if (!valid(j)) continue;
      if (LAST) store_act<VEC>(row_of(du_0, token[j], p.channels * (int)sizeof(act_t)), du[j]);
      else store_floats<VEC>(row_of(before_0, token[j], p.channels * 4), du[j]);
    }
  }

  // The parameters' gradients over a warp's chunks, then over the block's warps.
  __device__ __forceinline__ void store_parameters() {
    float found[5][VEC];  // dA ahead, dA back, dbias ahead, dbias back, dD
#pragma unroll
    for (int v = 0; v < VEC; v++) {
#pragma unroll
      for (int i = 0; i < 4; i++) found[i][v] = gradients[i % 2 * (64 * VEC) + i / 2 * VEC + v];
      found[4][v] = dskip[v];
#pragma unroll
      for (int i = 0; i < 5; i++) found[i][v] += __shfl_xor_sync(FULL_WARP, found[i][v], LANES);
    }
    __syncwarp();
    if (at.chunk == 0)
#pragma unroll
      for (int i = 0; i < 5; i++) store_floats<VEC>(sums + i * TILE_CHANNELS + at.column, found[i]);
    __syncthreads();
    const float* first = sums - at.warp * (MAIN_BYTES / 4);
    float* dparams = p.dparams + ((int64)at.b * p.groups + at.group) * (3 * p.K * p.channels);
    for (int i = threadIdx.x; i < (FIRST ? 5 : 4) * TILE_CHANNELS; i += THREADS) {
      const int which = i / TILE_CHANNELS, channel = at.tile * TILE_CHANNELS + i % TILE_CHANNELS, k = at.direction(p, which % 2);
      if (channel >= p.channels) continue;
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) total += first[w * (MAIN_BYTES / 4) + i];
      if (which < 2) dparams[k * p.channels + channel] = total * (DECAY_UNSCALE * DECAY_UNSCALE);
      else if (which < 4) dparams[(2 * p.K + k) * p.channels + channel] = total;
      else
        for (int same = 0; same < p.K; same++) dparams[(p.K + same) * p.channels + channel] = total;
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) pair_backward(const __grid_constant__ PairArgs p) {
  float* parameters = dynamic_shared + WARPS * (MAIN_BYTES / 4);
  Backward block(p, parameters);
  stage_parameter(p, block.at, p.A, 1.f, parameters);
  stage_parameter(p, block.at, p.bias, DECAY_SCALE, parameters + 2 * TILE_CHANNELS);
  __syncthreads();
  for_each_piece(block, MAIN_BUFFER, [&](int piece, int turn) { block.begin(piece, turn); }, [&](int, int turn) {
    block.walk<false>(turn);
    block.walk<true>(turn);
    block.store_du();
  });
  block.store_parameters();
}
