// The scan's backward. See scan_shared.cuh.
#include "common.cuh"
#include "scan_shared.cuh"
#include "scan_carry.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32) scan_carry_adjoint(const __grid_constant__ ScanArgs p) { carry<true>(p); }

// Steps that are reduced over the channel lanes together, so that no lane idles in the exchange.
constexpr int BATCH_WANTED = CHANNEL_LANES / (2 * SPT) > 0 ? CHANNEL_LANES / (2 * SPT) : 1;
constexpr int BATCH = BATCH_WANTED < STEPS ? BATCH_WANTED : STEPS;

struct __align__(16) BackwardShared {
  float x[TILE_STEPS * CHANNELS], u[TILE_STEPS * CHANNELS], dy[TILE_STEPS * CHANNELS], slope[TILE_STEPS * CHANNELS];
#if GATE
  float y[TILE_STEPS * CHANNELS];
#endif
  float from_B[TILE_STEPS * CHANNELS], from_A[TILE_STEPS * CHANNELS], B[TILE_STEPS * N], C[TILE_STEPS * N];
};

__device__ __forceinline__ float* checkpoint(const ScanArgs& p, const Place& at, int group) {
  const int groups = (p.chunk_steps + TILE_STEPS - 1) / TILE_STEPS;
  return p.checkpoints + ((((int64)blockIdx.x * WARPS + at.warp) * groups + group) * (CPT * SPT)) * 32 + at.lane;
}

// One step of the recurrence, from shared memory. Optionally keeps the decays.
template <bool KEEP> __device__ __forceinline__ void advance(const BackwardShared& s, const Place& at, int t, const float a2[CPT][SPT], const float h[CPT][SPT], float next[CPT][SPT], float a[CPT][SPT]) {
  float x[CPT], f[CPT], b[SPT];
  load_floats<CPT>(s.x + t * CHANNELS + at.c * CPT, x);
  load_floats<CPT>(s.u + t * CHANNELS + at.c * CPT, f);
  load_floats<SPT>(s.B + t * N + at.q * SPT, b);
#pragma unroll
  for (int i = 0; i < CPT; i++) {
    const float xu = x[i] * f[i];
#pragma unroll
    for (int j = 0; j < SPT; j++) {
      const float decay = decay_of(x[i], a2[i][j]);
      if constexpr (KEEP) a[i][j] = decay;
      next[i][j] = decay * h[i][j] + xu * b[j];
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) scan_backward(const __grid_constant__ ScanArgs p) {
  __shared__ BackwardShared shared[WARPS];
  __shared__ float sums[2][WARPS][TILE_STEPS * 2 * N];
  const Place at(p);
  BackwardShared& s = shared[at.warp];
  const bool ok = at.in_range(p);
  const int channel = ok ? at.channel0 + at.column : 0;
  const act_t* u = p.u + at.b * p.u_b + (int64)at.k * p.u_k + channel;
  const delta_t* delta = p.delta + at.b * p.delta_b + (int64)at.k * p.delta_k + channel;
  const act_t* dy = p.dy + at.b * p.dy_b + (int64)at.k * p.dy_k + channel;
  const act_t* B = p.B + at.b * p.B_b + (int64)at.k * p.B_k;
  const act_t* C = p.C + at.b * p.C_b + (int64)at.k * p.C_k;
  const int64 y_offset = at.b * p.y_b + (int64)at.k * p.y_k + channel;
  const int64 du_offset = at.b * p.du_b + (int64)at.k * p.du_k + channel;
  delta_t* ddelta = p.ddelta + ((int64)at.b * p.L * p.K + at.k) * p.D_ + channel;
  float* dBC = p.dBC + (((int64)at.b * p.K + at.k) * p.tiles + at.tile) * p.L * (2 * D_STATE);
  float a2[CPT][SPT], bias[VEC], skip[VEC];
  load_decay(p, at, a2);
  load_columns(p.bias, p, at, bias);
  load_columns(p.D, p, at, skip);
  if (N != D_STATE)
    for (int i = at.lane; i < TILE_STEPS * N; i += 32) s.B[i] = s.C[i] = 0.f;
  const int groups = (at.end_step - at.first_step + TILE_STEPS - 1) / TILE_STEPS;

  Rows raw_u, raw_dy;
  DeltaRows raw_delta;
#if GATE
  const act_t* z = p.z + at.b * p.z_b + (int64)at.k * p.z_k + channel;
  Rows raw_z;
#endif
  Projection raw_B, raw_C;
  float h[CPT][SPT];
  load_state(p, at, p.state_in, at.bkc, h);

  // Forward walk: checkpoint the state before each group. The last group's own states are not needed here.
  int tokens = load_tokens(p, at, at.first_step), next_tokens = load_tokens(p, at, at.first_step + TILE_STEPS);
  auto load_forward = [&](int first) {
    raw_u.load(u, p.u_l, at, tokens, false, first);
    raw_delta.load(delta, p.delta_l, at, tokens, STEP_ORDER, first);
    raw_B.load(B, p.B_l, at, tokens, STEP_ORDER, first);
  };
  if (groups > 1) load_forward(at.first_step);
  for (int group = 0; group < groups - 1; group++) {
    const int first = at.first_step + group * TILE_STEPS;
    float* to = checkpoint(p, at, group);
#pragma unroll
    for (int i = 0; i < CPT; i++)
#pragma unroll
      for (int j = 0; j < SPT; j++) to[(i * SPT + j) * 32] = h[i][j];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int t = at.staged_step(i);
      const bool valid = __shfl_sync(FULL_WARP, tokens, t) >= 0;
      float f[VEC], x[VEC];
      unpack(raw_delta.value[i], x);
      unpack(raw_u.value[i], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) x[v] = step_size(x[v] + bias[v], valid && ok);
      store_floats<VEC>(s.x + t * CHANNELS + at.column, x);
      store_floats<VEC>(s.u + t * CHANNELS + at.column, f);
    }
    raw_B.stage(s.B, at);
    __syncwarp();
    tokens = next_tokens;
    next_tokens = load_tokens(p, at, first + 2 * TILE_STEPS);
    if (group + 1 < groups - 1) load_forward(first + TILE_STEPS);
#pragma unroll
    for (int t = 0; t < TILE_STEPS; t++) advance<false>(s, at, t, a2, h, h, nullptr);
    __syncwarp();
  }

  // Backward walk, a group at a time; `carried` is a_{t+1} g_{t+1}, the adjoint that enters a step from the next one.
  float carried[CPT][SPT], dA[CPT][SPT], dskip[VEC], dbias[VEC];
  load_state(p, at, p.adjoint_in, at.bkc, carried);
#pragma unroll
  for (int i = 0; i < CPT; i++)
#pragma unroll
    for (int j = 0; j < SPT; j++) dA[i][j] = 0.f;
#pragma unroll
  for (int v = 0; v < VEC; v++) dskip[v] = dbias[v] = 0.f;

  auto load_backward = [&](int first) {
    raw_u.load(u, p.u_l, at, tokens, false, first);
    raw_delta.load(delta, p.delta_l, at, tokens, STEP_ORDER, first);
    raw_dy.load(dy, p.dy_l, at, tokens, false, first);
#if GATE
    raw_z.load(z, p.z_l, at, tokens, false, first);
#endif
    raw_B.load(B, p.B_l, at, tokens, STEP_ORDER, first);
    raw_C.load(C, p.C_l, at, tokens, STEP_ORDER, first);
  };
  const int last_first = at.first_step + (groups - 1) * TILE_STEPS;
  tokens = load_tokens(p, at, last_first);
  next_tokens = load_tokens(p, at, last_first - TILE_STEPS);
  load_backward(last_first);
  for (int group = groups - 1; group >= 0; group--) {
    const int first = at.first_step + group * TILE_STEPS, current = tokens;
    float (*block_sums)[TILE_STEPS * 2 * N] = sums[group & 1];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int t = at.staged_step(i);
      const bool valid = __shfl_sync(FULL_WARP, current, t) >= 0 && ok;
      float f[VEC], x[VEC], g[VEC], slope[VEC];
      unpack(raw_delta.value[i], x);
      unpack(raw_u.value[i], f);
      unpack(raw_dy.value[i], g);
#if GATE
      float gate[VEC];
      unpack(raw_z.value[i], gate);
#pragma unroll
      for (int v = 0; v < VEC; v++) g[v] *= silu(gate[v]);
#endif
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        slope[v] = 1.f;
        x[v] += bias[v];
        if (SOFTPLUS) x[v] = softplus(x[v], slope[v]);
        x[v] = valid ? x[v] : 0.f;
        g[v] = valid ? g[v] : 0.f;
        dskip[v] += g[v] * f[v];
      }
      store_floats<VEC>(s.x + t * CHANNELS + at.column, x);
      store_floats<VEC>(s.u + t * CHANNELS + at.column, f);
      store_floats<VEC>(s.dy + t * CHANNELS + at.column, g);
      store_floats<VEC>(s.slope + t * CHANNELS + at.column, slope);
    }
    raw_B.stage(s.B, at);
    raw_C.stage(s.C, at);
    if (group < groups - 1) {
      const float* from = checkpoint(p, at, group);
#pragma unroll
      for (int i = 0; i < CPT; i++)
#pragma unroll
        for (int j = 0; j < SPT; j++) h[i][j] = from[(i * SPT + j) * 32];
    }
    __syncwarp();
    tokens = next_tokens;
    next_tokens = load_tokens(p, at, first - 2 * TILE_STEPS);
    if (group > 0) load_backward(first - TILE_STEPS);

    // The state before each window of the group; the last window's states are recomputed first.
    float starts[WINDOWS][CPT][SPT];
#pragma unroll
    for (int w = 0; w < WINDOWS; w++) {
#pragma unroll
      for (int i = 0; i < CPT; i++)
#pragma unroll
        for (int j = 0; j < SPT; j++) starts[w][i][j] = h[i][j];
      if (w + 1 < WINDOWS)
#pragma unroll
        for (int t = 0; t < STEPS; t++) advance<false>(s, at, w * STEPS + t, a2, h, h, nullptr);
    }
#pragma unroll
    for (int w = WINDOWS - 1; w >= 0; w--) {
      float states[STEPS + 1][CPT][SPT], a[STEPS][CPT][SPT];
#pragma unroll
      for (int i = 0; i < CPT; i++)
#pragma unroll
        for (int j = 0; j < SPT; j++) states[0][i][j] = starts[w][i][j];
#pragma unroll
      for (int t = 0; t < STEPS; t++) advance<true>(s, at, w * STEPS + t, a2, states[t], states[t + 1], a[t]);
      float shared_sums[BATCH * 2 * SPT];  // dB and dC of BATCH steps, of this lane's channels
#pragma unroll
      for (int t = STEPS - 1; t >= 0; t--) {
        const int step = w * STEPS + t;
        float x[CPT], f[CPT], gy[CPT], b[SPT], cc[SPT], through[2 * CPT];
        load_floats<CPT>(s.x + step * CHANNELS + at.c * CPT, x);
        load_floats<CPT>(s.u + step * CHANNELS + at.c * CPT, f);
        load_floats<CPT>(s.dy + step * CHANNELS + at.c * CPT, gy);
        load_floats<SPT>(s.B + step * N + at.q * SPT, b);
        load_floats<SPT>(s.C + step * N + at.q * SPT, cc);
        float* sum_B = shared_sums + (t % BATCH) * 2 * SPT;
        float* sum_C = sum_B + SPT;
#pragma unroll
        for (int j = 0; j < SPT; j++) sum_B[j] = sum_C[j] = 0.f;
#pragma unroll
        for (int i = 0; i < CPT; i++) {
          const float xu = x[i] * f[i];
          through[i] = through[CPT + i] = 0.f;
#pragma unroll
          for (int j = 0; j < SPT; j++) {
            const float g = cc[j] * gy[i] + carried[i][j];           // g_t = C_t dy_t + a_{t+1} g_{t+1}
            sum_C[j] += gy[i] * states[t + 1][i][j];                 // dC_t = sum_d dy_t h_t
            sum_B[j] += g * xu;                                      // dB_t = sum_d g_t Delta_t u_t
            through[i] += g * b[j];                                  // dL/d(Delta u)
            carried[i][j] = g * a[t][i][j];
            const float r = carried[i][j] * states[t][i][j];         // dL/d(Delta A)
            through[CPT + i] += r * a2[i][j];
            dA[i][j] += r * x[i];
          }
        }
#if GATE
        float y[CPT];  // the ungated output, for the gate's gradient
#pragma unroll
        for (int i = 0; i < CPT; i++) {
          y[i] = 0.f;
#pragma unroll
          for (int j = 0; j < SPT; j++) y[i] += cc[j] * states[t + 1][i][j];
        }
        store_output(s.y, at, step, y);
#endif
        const int kept = reduce_over_lanes<2 * CPT, STATE_LANES, CHANNEL_LANES>(through, at.lane);
        constexpr int KEPT = 2 * CPT > STATE_LANES ? 2 * CPT / STATE_LANES : 1, COPIES = STATE_LANES > 2 * CPT ? STATE_LANES / (2 * CPT) : 1;
        if (at.q % COPIES == 0) {
#pragma unroll
          for (int i = 0; i < KEPT; i++) {
            const int v = kept + i;
            (v < CPT ? s.from_B : s.from_A)[step * CHANNELS + at.c * CPT + v % CPT] = through[i];
          }
        }
        if (t % BATCH == 0) {
          constexpr int M = BATCH * 2 * SPT, LEFT = M > CHANNEL_LANES ? M / CHANNEL_LANES : 1, REPEATS = CHANNEL_LANES > M ? CHANNEL_LANES / M : 1;
          const int first_sum = reduce_over_lanes<M, CHANNEL_LANES, 1>(shared_sums, at.lane);
          if (at.c % REPEATS == 0) {
#pragma unroll
            for (int i = 0; i < LEFT; i++) {
              const int v = first_sum + i, batch_step = v / (2 * SPT), which = v / SPT % 2, j = v % SPT;
              block_sums[at.warp][(step + batch_step) * 2 * N + which * N + at.q * SPT + j] = shared_sums[i];
            }
          }
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int t = at.staged_step(i), token = __shfl_sync(FULL_WARP, current, t), at_shared = t * CHANNELS + at.column;
      float x[VEC], f[VEC], g[VEC], slope[VEC], from_B[VEC], from_A[VEC];
      load_floats<VEC>(s.x + at_shared, x);
      load_floats<VEC>(s.u + at_shared, f);
      load_floats<VEC>(s.dy + at_shared, g);
      load_floats<VEC>(s.slope + at_shared, slope);
      load_floats<VEC>(s.from_B + at_shared, from_B);
      load_floats<VEC>(s.from_A + at_shared, from_A);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const float ddelta_v = (DECAY_UNSCALE * from_A[v] + from_B[v] * f[v]) * slope[v];
        g[v] = from_B[v] * x[v] + skip[v] * g[v];
        f[v] = ddelta_v;
        if (token >= 0) dbias[v] += ddelta_v;
      }
#if GATE
      float y[VEC], raw[VEC];
      load_floats<VEC>(s.y + at_shared, y);
      load_floats<VEC>(s.u + at_shared, raw);
#pragma unroll
      for (int v = 0; v < VEC; v++) y[v] += skip[v] * raw[v];
      if (ok && token >= 0) store_floats<VEC>(row_of((float*)p.y + y_offset, token, p.y_l), y);
#endif
      if (ok && token >= 0) {
#if PARTIAL
        store_floats<VEC>(row_of((float*)p.du + du_offset, token, p.du_l), g);
#else
        store_act<VEC>(row_of((act_t*)p.du + du_offset, token, p.du_l), g);
#endif
        store_delta<VEC>(row_of(ddelta, STEP_ORDER ? first + t : token, p.K * p.D_ * (int)sizeof(delta_t)), f);
      }
    }
    // dB and dC over the block's warps, in a fixed order.
    if (WARPS > 1) __syncthreads();
    constexpr int ENTRIES = TILE_STEPS * 2 * N;
#pragma unroll
    for (int i = 0; i < (ENTRIES + WARPS * 32 - 1) / (WARPS * 32); i++) {
      const int e = i * WARPS * 32 + threadIdx.x, t = e / (2 * N), n = e % (2 * N), token = __shfl_sync(FULL_WARP, current, t & 31);
      if (e < ENTRIES && token >= 0 && (n < D_STATE || (n >= N && n < N + D_STATE))) {
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += block_sums[w][e];
        dBC[(int64)(STEP_ORDER ? first + t : token) * (2 * D_STATE) + (n < D_STATE ? n : n - N + D_STATE)] = total;
      }
    }
    __syncwarp();
  }

  if (at.chunk == 0 && p.dstate != nullptr) store_state(p, at, p.dstate, (int64)at.b * p.K + at.k, carried);
  const int64 KD = (int64)p.K * p.D_;
  float* dparams = p.dparams + ((int64)at.b * p.chunks + at.chunk) * KD * (D_STATE + 2);
  store_state(p, at, dparams, at.k, dA);
#pragma unroll
  for (int v = 0; v < VEC; v++) {
#pragma unroll
    for (int lanes = ROW_LANES; lanes < 32; lanes *= 2) {
      dskip[v] += __shfl_xor_sync(FULL_WARP, dskip[v], lanes);
      dbias[v] += __shfl_xor_sync(FULL_WARP, dbias[v], lanes);
    }
    if (ok && at.lane < ROW_LANES) {
      dparams[KD * D_STATE + (int64)at.k * p.D_ + channel + v] = dskip[v];
      dparams[KD * (D_STATE + 1) + (int64)at.k * p.D_ + channel + v] = dbias[v];
    }
  }
}
