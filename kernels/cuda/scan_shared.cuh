// Selective scan along a path, any number of states: what the forward and the backward share. See kernels/README.md.
//
// A warp owns CHANNELS neighbouring channels of one image (row of the batch) and one direction, and walks a chunk of the
// path. Memory is channels-last, so the lanes' accesses are coalesced whatever the order of the tokens. It works on
// groups of TILE_STEPS steps, in two layouts that meet in shared memory:
//   staging: a lane holds VEC neighbouring channels of several steps: loads, softplus, epilogue, once an element;
//   compute: a lane holds CPT channels x SPT states and walks the steps: the recurrence, once a (channel, state).
// The next group's loads are in flight while a group is computed. Warps share nothing but the sums of dB and dC.
//
// Macros: ACT, D_STATE, SPT, CPT, STEPS (register window of the backward), WINDOWS (windows a group), WARPS, VEC,
// MIN_BLOCKS, CHECKPOINTS (of the backward, a group), DELTA_FLOAT (delta and its gradient in float32), SOFTPLUS, STEP_ORDER (step t reads row t of delta, B and
// C), GATE (multiply by silu(z)), PARTIAL (write float32 partial results that a second kernel merges).
#pragma once

__device__ constexpr int next_power_of_two(int n) { int p = 1; while (p < n) p *= 2; return p; }

constexpr int N = next_power_of_two(D_STATE);
constexpr int STATE_LANES = N / SPT;
constexpr int CHANNEL_LANES = 32 / STATE_LANES;
constexpr int CHANNELS = CHANNEL_LANES * CPT;
constexpr int TILE_STEPS = STEPS * WINDOWS;
constexpr int ROW_LANES = CHANNELS / VEC;
constexpr int PER_LANE = TILE_STEPS * ROW_LANES / 32;
constexpr int BC_VEC = D_STATE % VEC == 0 ? VEC : 1;
constexpr int BC_ROW = D_STATE / BC_VEC;
constexpr int BC_PER_LANE = (TILE_STEPS * BC_ROW + 31) / 32;
static_assert(SPT * STATE_LANES == N && STATE_LANES <= 32, "SPT does not fit D_STATE");
static_assert(ROW_LANES <= 32 && PER_LANE * 32 == TILE_STEPS * ROW_LANES && TILE_STEPS <= 32, "tile does not fit a warp");

struct ScanArgs {
  const act_t* u;
  const delta_t* delta;
  const act_t *B, *C, *z, *dy;
  const float *A, *D, *bias;      // (K, D, N), (K, D), (K, D); D and bias may be null
  const int* order;               // (K, P)
  const float *state_in;          // (B, K, chunks, D, N) state before each chunk, or null for zero
  const float *adjoint_in;        // the same for the adjoint that enters at each chunk's end
  void* y;                        // act_t, or float with PARTIAL; the backward's dL/dz, act_t or float: see GATE there
  float* last_state;              // (B, K, D, N)
  float *carry_state, *carry_adjoint, *carry_delta;  // (B, K, chunks, D, N) twice, (B, K, chunks, D)
  void* du;                       // act_t, or float with PARTIAL
  delta_t* ddelta;                // (B, L, K, D)
  float* dBC;                     // (B, K, tiles, L, 2 N): dB and dC summed over a block's channels
  float* dparams;                 // (B chunks, 1 or 2, K D (N + 2)): dA, dD, dbias of a chunk, and what rounding took from them
  float* dstate;                  // (B, K, D, N) gradient of the initial state, or null
  float* checkpoints;             // scratch
  int64 u_b, delta_b, B_b, C_b, z_b, dy_b, y_b, du_b;  // strides: _b and _k in elements, _l in bytes
  int u_l, u_k, delta_l, delta_k, B_l, B_k, C_l, C_k, z_l, z_k, dy_l, dy_k, y_l, y_k, du_l, du_k;
  int L, P, D_, K, chunks, chunk_steps, tiles, pad;
};

// Where this warp works.
struct Place {
  int b, k, chunk, tile, first_step, end_step, lane, warp;
  int channel0;                   // first channel of the warp
  int c, q;                       // compute layout: channel lane and state lane
  int column;                     // staging layout: first channel, relative to channel0
  int64 bkc;                      // (b K + k) chunks + chunk
  __device__ __forceinline__ Place(const ScanArgs& p) {
    int64 block = blockIdx.x;
    tile = (int)(block % p.tiles); block /= p.tiles;
#ifdef PAIRED
    k = threadIdx.x >> 5;
#else
    k = (int)(block % p.K); block /= p.K;
#endif
    chunk = (int)(block % p.chunks);
    b = (int)(block / p.chunks);
    lane = threadIdx.x & 31; warp = threadIdx.x >> 5;
#ifdef PAIRED
    channel0 = tile * CHANNELS;
#else
    channel0 = (tile * WARPS + warp) * CHANNELS;
#endif
    c = lane % CHANNEL_LANES; q = lane / CHANNEL_LANES;
    column = (lane % ROW_LANES) * VEC;
    first_step = chunk * p.chunk_steps;
    end_step = min(p.P, first_step + p.chunk_steps);
    bkc = ((int64)b * p.K + k) * p.chunks + chunk;
  }
  __device__ __forceinline__ bool in_range(const ScanArgs& p) const { return channel0 + column < p.D_; }
  __device__ __forceinline__ int staged_step(int i) const { return lane / ROW_LANES + i * (32 / ROW_LANES); }
  __device__ __forceinline__ int channel(int i) const { return channel0 + c * CPT + i; }
  // Index of a state of this thread in a (..., D, N) array whose leading index is `lead`.
  __device__ __forceinline__ int64 state(const ScanArgs& p, int64 lead, int i) const {
    return (lead * p.D_ + channel(i)) * D_STATE + q * SPT;
  }
};

// The tokens of a group of steps: lane t holds that of step first + t, -1 where there is none.
__device__ __forceinline__ int load_tokens(const ScanArgs& p, const Place& at, int first) {
  int t = first + at.lane;
  return at.lane < TILE_STEPS && t >= at.first_step && t < at.end_step ? p.order[(int64)at.k * p.P + t] : -1;
}

// The tokens of the rows that a lane loads of a group. Where there is none, row 0 is read, or zeros of B and C: Delta, C
// and dy are set to zero there.
struct GroupRows {
  int token[PER_LANE], projection_token[BC_PER_LANE], first;
  __device__ __forceinline__ GroupRows(const Place& at, int tokens, int first_step) : first(first_step) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) token[i] = __shfl_sync(FULL_WARP, tokens, at.staged_step(i));
#pragma unroll
    for (int i = 0; i < BC_PER_LANE; i++) projection_token[i] = __shfl_sync(FULL_WARP, tokens, (at.lane + 32 * i) / BC_ROW & 31);
  }
};

// One activation (u, delta, dy, z) of a group of steps, as loaded, in the staging layout.
template <class T, class R, bool BY_STEP> struct RowsOf {
  R value[PER_LANE];
  __device__ __forceinline__ void load(const T* base, int stride, const Place& at, const GroupRows& rows) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int row = BY_STEP ? (rows.token[i] >= 0 ? rows.first + at.staged_step(i) : 0) : max(rows.token[i], 0);
      value[i] = *reinterpret_cast<const R*>(row_of(base, row, stride));
    }
  }
};
typedef RowsOf<act_t, Raw<VEC>, false> Rows;
typedef RowsOf<delta_t, RawDelta<VEC>, STEP_ORDER> DeltaRows;

// B or C of a group of steps: rows of D_STATE values that all lanes of a warp share.
struct Projection {
  Raw<BC_VEC> value[BC_PER_LANE];
  __device__ __forceinline__ void load(const act_t* base, int stride, const Place& at, const GroupRows& rows) {
#pragma unroll
    for (int i = 0; i < BC_PER_LANE; i++) {
      const int e = at.lane + 32 * i, t = e / BC_ROW, n = (e % BC_ROW) * BC_VEC, token = rows.projection_token[i];
      const bool ok = (TILE_STEPS * BC_ROW % 32 == 0 || t < TILE_STEPS) && token >= 0;
      value[i] = ok ? load_raw<BC_VEC>(row_of(base, STEP_ORDER ? rows.first + t : token, stride) + n) : raw_zero<BC_VEC>();
    }
  }
  __device__ __forceinline__ void stage(float* shared, const Place& at) const {
#pragma unroll
    for (int i = 0; i < BC_PER_LANE; i++) {
      const int e = at.lane + 32 * i, t = e / BC_ROW, n = (e % BC_ROW) * BC_VEC;
      float f[BC_VEC];
      unpack(value[i], f);
      if (TILE_STEPS * BC_ROW % 32 == 0 || t < TILE_STEPS) store_floats<BC_VEC>(shared + t * N + n, f);
    }
  }
};

// The per-channel parameters of a lane's columns in the staging layout.
__device__ __forceinline__ void load_columns(const float* from, const ScanArgs& p, const Place& at, float f[VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; v++) f[v] = from != nullptr && at.in_range(p) ? from[(int64)at.k * p.D_ + at.channel0 + at.column + v] : 0.f;
}

// B and C of the states that only fill up a power of two stay zero.
template <class S> __device__ __forceinline__ void clear_padding(S& s, const Place& at) {
  if (N == D_STATE) return;
  for (int i = at.lane; i < TILE_STEPS * N; i += 32) s.B[i] = s.C[i] = 0.f;
  __syncwarp();
}

// What every walk reads: u, Delta and B, and C where it is asked for. A group's loads are in flight while the one before
// it is computed.
struct Inputs {
  const act_t *u, *B, *C;
  const delta_t* delta;
  float bias[VEC];
  Rows raw_u;
  DeltaRows raw_delta;
  Projection raw_B, raw_C;
  __device__ __forceinline__ Inputs(const ScanArgs& p, const Place& at) {
    const int channel = at.in_range(p) ? at.channel0 + at.column : 0;
    u = p.u + at.b * p.u_b + (int64)at.k * p.u_k + channel;
    delta = p.delta + at.b * p.delta_b + (int64)at.k * p.delta_k + channel;
    B = p.B + at.b * p.B_b + (int64)at.k * p.B_k;
    C = p.C + at.b * p.C_b + (int64)at.k * p.C_k;
    load_columns(p.bias, p, at, bias);
  }
  template <bool WITH_C> __device__ __forceinline__ void load(const ScanArgs& p, const Place& at, const GroupRows& rows) {
    raw_u.load(u, p.u_l, at, rows);
    raw_delta.load(delta, p.delta_l, at, rows);
    raw_B.load(B, p.B_l, at, rows);
    if constexpr (WITH_C) raw_C.load(C, p.C_l, at, rows);
  }
  // Stages Delta, u, B and C in shared memory. Without a step Delta is 0, which leaves the state as it is.
  template <bool WITH_C, class S> __device__ __forceinline__ void stage(S& s, const ScanArgs& p, const Place& at, int tokens) const {
    const bool ok = at.in_range(p);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int to = at.staged_step(i) * CHANNELS + at.column;
      const bool valid = __shfl_sync(FULL_WARP, tokens, at.staged_step(i)) >= 0 && ok;
      float f[VEC], x[VEC];
      unpack(raw_delta.value[i], x);
      unpack(raw_u.value[i], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        x[v] += bias[v];
        if (SOFTPLUS) x[v] = softplus(x[v]);
        x[v] = valid ? x[v] : 0.f;
      }
      store_floats<VEC>(s.x + to, x);
      store_floats<VEC>(s.u + to, f);
    }
    raw_B.stage(s.B, at);
    if constexpr (WITH_C) raw_C.stage(s.C, at);
  }
};

// A (K, D, N) in the compute layout, scaled as decay_of wants it.
__device__ __forceinline__ void load_decay(const ScanArgs& p, const Place& at, float a2[CPT][SPT]) {
#pragma unroll
  for (int i = 0; i < CPT; i++)
#pragma unroll
    for (int j = 0; j < SPT; j++) {
      bool ok = at.channel(i) < p.D_ && at.q * SPT + j < D_STATE;
      a2[i][j] = ok ? p.A[at.state(p, at.k, i) + j] * DECAY_SCALE : 0.f;
    }
}

__device__ __forceinline__ void load_state(const ScanArgs& p, const Place& at, const float* from, int64 lead, float h[CPT][SPT]) {
#pragma unroll
  for (int i = 0; i < CPT; i++)
#pragma unroll
    for (int j = 0; j < SPT; j++) {
      bool ok = from != nullptr && at.channel(i) < p.D_ && at.q * SPT + j < D_STATE;
      h[i][j] = ok ? from[at.state(p, lead, i) + j] : 0.f;
    }
}

__device__ __forceinline__ void store_state(const ScanArgs& p, const Place& at, float* to, int64 lead, const float h[CPT][SPT]) {
#pragma unroll
  for (int i = 0; i < CPT; i++)
#pragma unroll
    for (int j = 0; j < SPT; j++)
      if (at.channel(i) < p.D_ && at.q * SPT + j < D_STATE) to[at.state(p, lead, i) + j] = h[i][j];
}

// One step of the recurrence, from what is staged: y = C h, with the skip in SKIP.
template <bool SKIP, class S>
__device__ __forceinline__ void walk_step(const S& s, const Place& at, int t, const float a2[CPT][SPT], const float* skip, float h[CPT][SPT], float y[CPT]) {
  float x[CPT], f[CPT], b[SPT], cc[SPT];
  load_floats<CPT>(s.x + t * CHANNELS + at.c * CPT, x);
  load_floats<CPT>(s.u + t * CHANNELS + at.c * CPT, f);
  load_floats<SPT>(s.B + t * N + at.q * SPT, b);
  load_floats<SPT>(s.C + t * N + at.q * SPT, cc);
#pragma unroll
  for (int i = 0; i < CPT; i++) {
    const float xu = x[i] * f[i];
    y[i] = SKIP ? skip[i] * f[i] : 0.f;
#pragma unroll
    for (int j = 0; j < SPT; j++) {
      h[i][j] = decay_of(x[i], a2[i][j]) * h[i][j] + xu * b[j];  // h_t = exp(Delta A) h_{t-1} + Delta B u
      y[i] += h[i][j] * cc[j];                                   // y_t = C h_t (+ D u)
    }
  }
}

// The outputs of a step, summed over the lanes that hold a channel's states, to the staging layout, at output_offset.
__device__ __forceinline__ int output_offset(const Place& at) { return at.c * CPT + kept_by<CPT, STATE_LANES, CHANNEL_LANES>(at.lane); }
__device__ __forceinline__ void store_output(float* shared, const Place& at, int offset, int t, float y[CPT]) {
  reduce_over_lanes<CPT, STATE_LANES, CHANNEL_LANES>(y, at.lane);
  constexpr int KEPT = CPT > STATE_LANES ? CPT / STATE_LANES : 1, COPIES = STATE_LANES > CPT ? STATE_LANES / CPT : 1;
  if (at.q % COPIES == 0) store_floats<KEPT>(shared + t * CHANNELS + offset, y);
}
