// The scan's backward. See scan_shared.cuh.
#include "common.cuh"
#include "scan_shared.cuh"
#include "scan_carry.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32) scan_carry_adjoint(const __grid_constant__ ScanArgs p) { carry<true>(p); }

// Steps that are reduced over the channel lanes together, so that no lane idles in the exchange.
constexpr int BATCH_WANTED = CHANNEL_LANES / (2 * SPT) > 0 ? CHANNEL_LANES / (2 * SPT) : 1;
constexpr int BATCH = BATCH_WANTED < STEPS ? BATCH_WANTED : STEPS;
constexpr int HELD = CPT * SPT;                          // states of a lane
constexpr bool EVERY_WINDOW = CHECKPOINTS == WINDOWS;    // a checkpoint before every window, or only before every group
static_assert(EVERY_WINDOW || CHECKPOINTS == 1, "checkpoints are of windows or of groups");

// GATE 1: directions share the gates, and the parts of their gradient are float32 and merged by a second kernel; 2: a gate
// has one direction, whose gradient is written here. The struct itself is aligned to 4 bytes: lanes see it from an offset.
//
// A sum over a channel's states is left by the lanes that share them, each in a plane of its own (with a row to spare, which
// puts two planes on different banks), and added up in the staging layout: cheaper than exchanges among lanes. A group's are
// added up together; with a gate, whose planes would take the room of the first-level cache, a window's, if it has work for
// every lane.
constexpr int FINISHED = GATE && STEPS * ROW_LANES % 32 == 0 ? 1 : WINDOWS;  // windows that are finished together
constexpr int PLANE = (FINISHED * STEPS + 1) * CHANNELS;
struct BackwardShared {
  float x[TILE_STEPS * CHANNELS], u[TILE_STEPS * CHANNELS], dy[TILE_STEPS * CHANNELS], slope[TILE_STEPS * CHANNELS];
#if GATE
  float y[STATE_LANES * PLANE], dgate[TILE_STEPS * CHANNELS];  // the ungated output; the output's gradient times silu'(z)
#endif
  float from_B[STATE_LANES * PLANE], from_A[STATE_LANES * PLANE], B[TILE_STEPS * N], C[TILE_STEPS * N];
};

// A value of the staging layout, from the planes of the lanes that share it.
__device__ __forceinline__ void add_planes(const float* from, float total[VEC]) {
  load_floats<VEC>(from, total);
#pragma unroll
  for (int q = 1; q < STATE_LANES; q++) {
    float part[VEC];
    load_floats<VEC>(from + q * PLANE, part);
#pragma unroll
    for (int v = 0; v < VEC; v++) total[v] += part[v];
  }
}

// Hides from the compiler where a value comes from, so that it keeps it in a register instead of computing it again.
__device__ __forceinline__ void keep_in_register(int& value) {
#ifndef VM_EMULATE
  asm volatile("" : "+r"(value));
#endif
}

// Shared memory as a lane sees it: `offset` bytes further, which it computes once.
__device__ __forceinline__ BackwardShared& seen_from(BackwardShared* shared, int offset) {
  keep_in_register(offset);
  return *reinterpret_cast<BackwardShared*>(reinterpret_cast<char*>(shared) + offset);
}

// Checkpoints are scratch of a lane: as wide accesses as its states allow, the lanes side by side.
__device__ __forceinline__ void save(float* to, const float h[CPT][SPT]) {
  constexpr int V = HELD < 4 ? HELD : 4;
#pragma unroll
  for (int i = 0; i < HELD; i += V) store_floats<V>(to + i * 32, &h[0][0] + i);
}
__device__ __forceinline__ void restore(const float* from, float h[CPT][SPT]) {
  constexpr int V = HELD < 4 ? HELD : 4;
#pragma unroll
  for (int i = 0; i < HELD; i += V) load_floats<V>(from + i * 32, &h[0][0] + i);
}

// One step of the recurrence, from shared memory. Optionally keeps the decays.
template <bool KEEP> __device__ __forceinline__ void advance(const BackwardShared& channels, const BackwardShared& states, int t, const float a2[CPT][SPT], const float h[CPT][SPT], float next[CPT][SPT], float a[CPT][SPT]) {
  float x[CPT], f[CPT], b[SPT];
  load_floats<CPT>(channels.x + t * CHANNELS, x);
  load_floats<CPT>(channels.u + t * CHANNELS, f);
  load_floats<SPT>(states.B + t * N, b);
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
  static_assert(sizeof(BackwardShared) % 16 == 0, "a warp's rows are read four floats at a time");
  __align__(16) __shared__ BackwardShared shared[WARPS];
  __shared__ float sums[2][WARPS][TILE_STEPS * 2 * N];
  const Place at(p);
  BackwardShared& s = shared[at.warp];
  const bool ok = at.in_range(p);
  const int channel = ok ? at.channel0 + at.column : 0, base = at.warp * (int)sizeof(BackwardShared);
  BackwardShared& channels = seen_from(shared, base + 4 * at.c * CPT);       // of the compute layout
  BackwardShared& states = seen_from(shared, base + 4 * at.q * SPT);         // likewise: B and C
  BackwardShared& staged = seen_from(shared, base + 4 * (at.staged_step(0) * CHANNELS + at.column));
  const act_t* dy = p.dy + at.b * p.dy_b + (int64)at.k * p.dy_k + channel;
  const int64 du_offset = at.b * p.du_b + (int64)at.k * p.du_k + channel;
  delta_t* ddelta = p.ddelta + ((int64)at.b * p.L * p.K + at.k) * p.D_ + channel;
  float* dBC = p.dBC + (((int64)at.b * p.K + at.k) * p.tiles + at.tile) * p.L * (2 * D_STATE);
  float a2[CPT][SPT], skip[VEC];
  load_decay(p, at, a2);
  load_columns(p.D, p, at, skip);
  clear_padding(s, at);
  const int groups = (at.end_step - at.first_step + TILE_STEPS - 1) / TILE_STEPS;
  const int saved_groups = (p.chunk_steps + TILE_STEPS - 1) / TILE_STEPS;
  float* checkpoints = p.checkpoints + ((int64)blockIdx.x * WARPS + at.warp) * saved_groups * (CHECKPOINTS * HELD * 32) + at.lane * (HELD < 4 ? HELD : 4);
  constexpr int SAVED = HELD * 32;  // floats of a checkpoint

  Inputs in(p, at);
  Rows raw_dy;
#if GATE
  const act_t* z = p.z + at.b * p.z_b + (int64)at.k * p.z_k + channel;
  const int64 dz_offset = at.b * p.y_b + (int64)at.k * p.y_k + channel;
  Rows raw_z;
#endif
  float starts[WINDOWS][CPT][SPT], (&h)[CPT][SPT] = starts[0];  // the state before each window of a group
  load_state(p, at, p.state_in, at.bkc, h);

  // Forward walk: checkpoints. The last group's are not needed where its own start is all that is kept of it.
  const int walked = EVERY_WINDOW ? groups : groups - 1;
  int tokens = load_tokens(p, at, at.first_step), next_tokens = load_tokens(p, at, at.first_step + TILE_STEPS);
  if (walked > 0) in.load<false>(p, at, GroupRows(at, tokens, at.first_step));
  for (int group = 0; group < walked; group++) {
    const int first = at.first_step + group * TILE_STEPS;
    in.stage<false>(s, p, at, tokens);
    __syncwarp();
    tokens = next_tokens;
    next_tokens = load_tokens(p, at, first + 2 * TILE_STEPS);
    if (group + 1 < walked) in.load<false>(p, at, GroupRows(at, tokens, first + TILE_STEPS));
#pragma unroll
    for (int t = 0; t < TILE_STEPS; t++) {
      if (t % (TILE_STEPS / CHECKPOINTS) == 0) save(checkpoints + (t / (TILE_STEPS / CHECKPOINTS)) * SAVED, h);
      advance<false>(channels, states, t, a2, h, h, nullptr);
    }
    checkpoints += CHECKPOINTS * SAVED;
    __syncwarp();
  }

  // Backward walk, a group at a time; `carried` is a_{t+1} g_{t+1}, the adjoint that enters a step from the next one.
  float carried[CPT][SPT], dA[CPT][SPT], dA_lost[CPT][SPT], dskip[VEC], dbias[VEC];
  load_state(p, at, p.adjoint_in, at.bkc, carried);
  auto restore_group = [&] {
    checkpoints -= CHECKPOINTS * SAVED;
#pragma unroll
    for (int w = 0; w < CHECKPOINTS; w++) restore(checkpoints + w * SAVED, starts[w]);
  };
  if (EVERY_WINDOW) restore_group();
#pragma unroll
  for (int i = 0; i < CPT; i++)
#pragma unroll
    for (int j = 0; j < SPT; j++) dA[i][j] = dA_lost[i][j] = 0.f;
#pragma unroll
  for (int v = 0; v < VEC; v++) dskip[v] = dbias[v] = 0.f;

  auto load = [&](int tokens, int first) {
    const GroupRows rows(at, tokens, first);
    in.load<true>(p, at, rows);
    raw_dy.load(dy, p.dy_l, at, rows);
#if GATE
    raw_z.load(z, p.z_l, at, rows);
#endif
  };
  // Where a lane leaves its sums: those over states, and dB and dC of BATCH steps.
  BackwardShared& left = seen_from(shared, base + 4 * (at.q * PLANE + at.c * CPT));
  constexpr int M = BATCH * 2 * SPT, LEFT = M > CHANNEL_LANES ? M / CHANNEL_LANES : 1, REPEATS = CHANNEL_LANES > M ? CHANNEL_LANES / M : 1;
  const int first_sum = kept_by<M, CHANNEL_LANES, 1>(at.lane);
  int sums_at = at.warp * (TILE_STEPS * 2 * N) + first_sum / SPT * N + at.q * SPT + first_sum % SPT;
  keep_in_register(sums_at);

  const int last_first = at.first_step + (groups - 1) * TILE_STEPS;
  tokens = load_tokens(p, at, last_first);
  next_tokens = load_tokens(p, at, last_first - TILE_STEPS);
  load(tokens, last_first);
  for (int group = groups - 1; group >= 0; group--) {
    const int first = at.first_step + group * TILE_STEPS, current = tokens;
    float* block_sums = sums[group & 1][0];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int to = i * (32 / ROW_LANES) * CHANNELS;
      const bool valid = __shfl_sync(FULL_WARP, current, at.staged_step(i)) >= 0 && ok;
      float f[VEC], x[VEC], g[VEC], slope[VEC];
      unpack(in.raw_delta.value[i], x);
      unpack(in.raw_u.value[i], f);
      unpack(raw_dy.value[i], g);
#if GATE
      float gate[VEC];
      unpack(raw_z.value[i], gate);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const float sigma = sigmoid(gate[v]), out = g[v];
        g[v] = out * (gate[v] * sigma);
        gate[v] = out * (sigma * (1.f + gate[v] * (1.f - sigma)));
      }
      store_floats<VEC>(staged.dgate + to, gate);
#endif
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        slope[v] = 1.f;
        x[v] += in.bias[v];
        if (SOFTPLUS) x[v] = softplus(x[v], slope[v]);
        x[v] = valid ? x[v] : 0.f;
        g[v] = valid ? g[v] : 0.f;
        dskip[v] += g[v] * f[v];
      }
      store_floats<VEC>(staged.x + to, x);
      store_floats<VEC>(staged.u + to, f);
      store_floats<VEC>(staged.dy + to, g);
      store_floats<VEC>(staged.slope + to, slope);
    }
    in.raw_B.stage(s.B, at);
    in.raw_C.stage(s.C, at);
    __syncwarp();
    tokens = next_tokens;
    next_tokens = load_tokens(p, at, first - 2 * TILE_STEPS);
    if (group > 0) load(tokens, first - TILE_STEPS);

    if constexpr (!EVERY_WINDOW) {
#pragma unroll
      for (int w = 0; w + 1 < WINDOWS; w++) {
        advance<false>(channels, states, w * STEPS, a2, starts[w], starts[w + 1], nullptr);
#pragma unroll
        for (int t = 1; t < STEPS; t++) advance<false>(channels, states, w * STEPS + t, a2, starts[w + 1], starts[w + 1], nullptr);
      }
    }
    // Row i of a lane, once all lanes have left their sums.
    auto finish = [&](int i) {
      const int t = at.staged_step(i), token = __shfl_sync(FULL_WARP, current, t), from = i * (32 / ROW_LANES) * CHANNELS;
      const int plane = from % (FINISHED * STEPS * CHANNELS);
      const bool valid = ok && token >= 0;
      float x[VEC], f[VEC], g[VEC], slope[VEC], from_B[VEC], from_A[VEC];
      load_floats<VEC>(staged.x + from, x);
      load_floats<VEC>(staged.u + from, f);
      load_floats<VEC>(staged.dy + from, g);
      load_floats<VEC>(staged.slope + from, slope);
      add_planes(staged.from_B + plane, from_B);
      add_planes(staged.from_A + plane, from_A);
#if GATE
      float y[VEC], dz[VEC];
      add_planes(staged.y + plane, y);
      load_floats<VEC>(staged.dgate + from, dz);
#pragma unroll
      for (int v = 0; v < VEC; v++) dz[v] *= y[v] + skip[v] * f[v];
#if GATE == 2
      if (valid) store_act<VEC>(row_of((act_t*)p.y + dz_offset, token, p.y_l), dz);
#else
      if (valid) store_floats<VEC>(row_of((float*)p.y + dz_offset, token, p.y_l), dz);
#endif
#endif
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        f[v] = (DECAY_UNSCALE * from_A[v] + from_B[v] * f[v]) * slope[v];
        g[v] = from_B[v] * x[v] + skip[v] * g[v];
        if (token >= 0) dbias[v] += f[v];
      }
      if (valid) {
#if PARTIAL
        store_floats<VEC>(row_of((float*)p.du + du_offset, token, p.du_l), g);
#else
        store_act<VEC>(row_of((act_t*)p.du + du_offset, token, p.du_l), g);
#endif
        store_delta<VEC>(row_of(ddelta, STEP_ORDER ? first + t : token, p.K * p.D_ * (int)sizeof(delta_t)), f);
      }
    };
#pragma unroll
    for (int w = WINDOWS - 1; w >= 0; w--) {
      float visited[STEPS + 1][CPT][SPT], a[STEPS][CPT][SPT];  // the states of the window, and its decays
#pragma unroll
      for (int i = 0; i < CPT; i++)
#pragma unroll
        for (int j = 0; j < SPT; j++) visited[0][i][j] = starts[w][i][j];
#pragma unroll
      for (int t = 0; t < STEPS; t++) advance<true>(channels, states, w * STEPS + t, a2, visited[t], visited[t + 1], a[t]);
      float shared_sums[M];  // dB and dC of BATCH steps, of this lane's channels
      if (w + 1 < WINDOWS && (w + 1) % FINISHED == 0) __syncwarp();  // the sums of the window after are taken
#pragma unroll
      for (int t = STEPS - 1; t >= 0; t--) {
        const int step = w * STEPS + t;
        float x[CPT], f[CPT], gy[CPT], b[SPT], cc[SPT], through[2 * CPT];
        load_floats<CPT>(channels.x + step * CHANNELS, x);
        load_floats<CPT>(channels.u + step * CHANNELS, f);
        load_floats<CPT>(channels.dy + step * CHANNELS, gy);
        load_floats<SPT>(states.B + step * N, b);
        load_floats<SPT>(states.C + step * N, cc);
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
            sum_C[j] += gy[i] * visited[t + 1][i][j];                 // dC_t = sum_d dy_t h_t
            sum_B[j] += g * xu;                                      // dB_t = sum_d g_t Delta_t u_t
            through[i] += g * b[j];                                  // dL/d(Delta u)
            carried[i][j] = g * a[t][i][j];
            const float r = carried[i][j] * visited[t][i][j];         // dL/d(Delta A)
            through[CPT + i] += r * a2[i][j];
            accumulate(dA[i][j], dA_lost[i][j], r, x[i]);
          }
        }
#if GATE
        float y[CPT];  // the ungated output, for the gate's gradient
#pragma unroll
        for (int i = 0; i < CPT; i++) {
          y[i] = 0.f;
#pragma unroll
          for (int j = 0; j < SPT; j++) y[i] += cc[j] * visited[t + 1][i][j];
        }
        store_floats<CPT>(left.y + step % (FINISHED * STEPS) * CHANNELS, y);
#endif
        store_floats<CPT>(left.from_B + step % (FINISHED * STEPS) * CHANNELS, through);
        store_floats<CPT>(left.from_A + step % (FINISHED * STEPS) * CHANNELS, through + CPT);
        if (t % BATCH == 0) {
          reduce_over_lanes<M, CHANNEL_LANES, 1>(shared_sums, at.lane);
          if (at.c % REPEATS == 0) {
#pragma unroll
            for (int i = 0; i < LEFT; i++) block_sums[sums_at + step * 2 * N + i / SPT * N + i % SPT] = shared_sums[i];
          }
        }
      }
      if (w == 0 && group > 0) restore_group();  // long before it is needed
      if (w % FINISHED == 0) {
        __syncwarp();
#pragma unroll
        for (int i = w * PER_LANE / WINDOWS; i < (w + FINISHED) * PER_LANE / WINDOWS; i++) finish(i);
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
        for (int w = 0; w < WARPS; w++) total += block_sums[w * ENTRIES + e];
        row_of(dBC, STEP_ORDER ? first + t : token, 2 * D_STATE * (int)sizeof(float))[n < D_STATE ? n : n - N + D_STATE] = total;
      }
    }
    __syncwarp();
  }

  if (at.chunk == 0 && p.dstate != nullptr) store_state(p, at, p.dstate, (int64)at.b * p.K + at.k, carried);
  const int64 KD = (int64)p.K * p.D_;
  float* dparams = p.dparams + ((int64)at.b * p.chunks + at.chunk) * PARAMETER_ROWS * KD * (D_STATE + 2);
  store_state(p, at, dparams, at.k, dA);
  if (PARAMETER_ROWS > 1) store_state(p, at, dparams + KD * (D_STATE + 2), at.k, dA_lost);
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
      if (PARAMETER_ROWS > 1) dparams[KD * (2 * D_STATE + 2) + (int64)at.k * p.D_ + channel + v] = dparams[KD * (2 * D_STATE + 3) + (int64)at.k * p.D_ + channel + v] = 0.f;
    }
  }
}
