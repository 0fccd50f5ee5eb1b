// Selective scan along a path: forward, backward, and the carries between chunks. See kernels/README.md.
//
// A warp owns CHANNELS neighbouring channels of one image (row of the batch) and one direction, and walks a chunk of the
// path. Memory is channels-last, so the lanes' accesses are coalesced whatever the order of the tokens. It works on
// groups of TILE_STEPS steps, in two layouts that meet in shared memory:
//   staging: a lane holds VEC neighbouring channels of several steps: loads, softplus, epilogue, once an element;
//   compute: a lane holds CPT channels x SPT states and walks the steps: the recurrence, once a (channel, state).
// The next group's loads are in flight while a group is computed. Warps share nothing but the sums of dB and dC.
//
// Macros: ACT, D_STATE, SPT, CPT, STEPS (register window of the backward), WINDOWS (windows a group), WARPS, VEC,
// MIN_BLOCKS, DELTA_FLOAT (delta and its gradient in float32), SOFTPLUS, STEP_ORDER (step t reads row t of delta, B and C), GATE (multiply by silu(z)), PARTIAL (write float32 partial results that a second kernel merges).
#include "common.cuh"

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
  void* y;                        // act_t, or float with PARTIAL; the backward's, with GATE: float (B, L, K, D)
  float* last_state;              // (B, K, D, N)
  float *carry_state, *carry_adjoint, *carry_delta;  // (B, K, chunks, D, N) twice, (B, K, chunks, D)
  void* du;                       // act_t, or float with PARTIAL
  delta_t* ddelta;                // (B, L, K, D)
  float* dBC;                     // (B, K, tiles, L, 2 N): dB and dC summed over a block's channels
  float* dparams;                 // (B chunks, K D (N + 2)): dA, dD, dbias of a chunk
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
    k = (int)(block % p.K); block /= p.K;
    chunk = (int)(block % p.chunks);
    b = (int)(block / p.chunks);
    lane = threadIdx.x & 31; warp = threadIdx.x >> 5;
    channel0 = (tile * WARPS + warp) * CHANNELS;
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

// Lane t of the warp holds the token of step first + t, -1 where there is none.
__device__ __forceinline__ int load_tokens(const ScanArgs& p, const Place& at, int first) {
  int t = first + at.lane;
  return at.lane < TILE_STEPS && t >= at.first_step && t < at.end_step ? p.order[(int64)at.k * p.P + t] : -1;
}

// One activation (u, delta, dy, z) of a group of steps, as loaded, in the staging layout. Steps without a token read
// token 0: their Delta, C and dy are set to zero instead.
template <class T, class R> struct RowsOf {
  R value[PER_LANE];
  __device__ __forceinline__ void load(const T* base, int stride, const Place& at, int tokens, bool by_step, int first) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int t = at.staged_step(i), token = __shfl_sync(FULL_WARP, tokens, t);
      value[i] = *reinterpret_cast<const R*>(row_of(base, token >= 0 && by_step ? first + t : max(token, 0), stride));
    }
  }
};
typedef RowsOf<act_t, Raw<VEC>> Rows;
typedef RowsOf<delta_t, RawDelta<VEC>> DeltaRows;

// B or C of a group of steps: rows of D_STATE values that all lanes of a warp share.
struct Projection {
  Raw<BC_VEC> value[BC_PER_LANE];
  __device__ __forceinline__ void load(const act_t* base, int stride, const Place& at, int tokens, bool by_step, int first) {
#pragma unroll
    for (int i = 0; i < BC_PER_LANE; i++) {
      const int e = at.lane + 32 * i, t = e / BC_ROW, n = (e % BC_ROW) * BC_VEC;
      const int token = __shfl_sync(FULL_WARP, tokens, t & 31);
      value[i] = t < TILE_STEPS && token >= 0 ? load_raw<BC_VEC>(row_of(base, by_step ? first + t : token, stride) + n) : raw_zero<BC_VEC>();
    }
  }
  __device__ __forceinline__ void stage(float* shared, const Place& at) const {
#pragma unroll
    for (int i = 0; i < BC_PER_LANE; i++) {
      int e = at.lane + 32 * i, t = e / BC_ROW, n = (e % BC_ROW) * BC_VEC;
      float f[BC_VEC];
      unpack(value[i], f);
      if (t < TILE_STEPS) store_floats<BC_VEC>(shared + t * N + n, f);
    }
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

// The per-channel parameters of a lane's columns in the staging layout.
__device__ __forceinline__ void load_columns(const float* from, const ScanArgs& p, const Place& at, float f[VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; v++) f[v] = from != nullptr && at.in_range(p) ? from[(int64)at.k * p.D_ + at.channel0 + at.column + v] : 0.f;
}

// Delta of one staged element: softplus(delta + bias), and 0 where there is no step, which leaves the state as it is.
__device__ __forceinline__ float step_size(float v, bool valid) {
  float x = SOFTPLUS ? softplus(v) : v;
  return valid ? x : 0.f;
}

// Sum a step's outputs over the lanes that hold a channel's states, to the staging layout.
__device__ __forceinline__ void store_output(float* shared, const Place& at, int t, float y[CPT]) {
  const int kept = reduce_over_lanes<CPT, STATE_LANES, CHANNEL_LANES>(y, at.lane);
  constexpr int KEPT = CPT > STATE_LANES ? CPT / STATE_LANES : 1, COPIES = STATE_LANES > CPT ? STATE_LANES / CPT : 1;
  if (at.q % COPIES == 0) store_floats<KEPT>(shared + t * CHANNELS + at.c * CPT + kept, y);
}

struct __align__(16) ForwardShared { float x[TILE_STEPS * CHANNELS], u[TILE_STEPS * CHANNELS], y[TILE_STEPS * CHANNELS], B[TILE_STEPS * N], C[TILE_STEPS * N]; };

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) scan_forward(const __grid_constant__ ScanArgs p) {
  __shared__ ForwardShared shared[WARPS];
  const Place at(p);
  ForwardShared& s = shared[at.warp];
  const bool ok = at.in_range(p);
  const int channel = ok ? at.channel0 + at.column : 0;
  const act_t* u = p.u + at.b * p.u_b + (int64)at.k * p.u_k + channel;
  const delta_t* delta = p.delta + at.b * p.delta_b + (int64)at.k * p.delta_k + channel;
  const act_t* B = p.B + at.b * p.B_b + (int64)at.k * p.B_k;
  const act_t* C = p.C + at.b * p.C_b + (int64)at.k * p.C_k;
  const int64 y_offset = at.b * p.y_b + (int64)at.k * p.y_k + channel;
#if GATE
  const act_t* z = p.z + at.b * p.z_b + (int64)at.k * p.z_k + channel;
  Rows raw_z;
#endif
  float a2[CPT][SPT], h[CPT][SPT], bias[VEC], skip[VEC];
  load_decay(p, at, a2);
  load_state(p, at, p.state_in, at.bkc, h);
  load_columns(p.bias, p, at, bias);
  load_columns(p.D, p, at, skip);
  if (N != D_STATE)
    for (int i = at.lane; i < TILE_STEPS * N; i += 32) s.B[i] = s.C[i] = 0.f;

  Rows raw_u;
  DeltaRows raw_delta;
  Projection raw_B, raw_C;
  int tokens = load_tokens(p, at, at.first_step), next_tokens = load_tokens(p, at, at.first_step + TILE_STEPS);
  auto load = [&](int first) {
    raw_u.load(u, p.u_l, at, tokens, false, first);
    raw_delta.load(delta, p.delta_l, at, tokens, STEP_ORDER, first);
    raw_B.load(B, p.B_l, at, tokens, STEP_ORDER, first);
    raw_C.load(C, p.C_l, at, tokens, STEP_ORDER, first);
#if GATE
    raw_z.load(z, p.z_l, at, tokens, false, first);
#endif
  };
  load(at.first_step);
  for (int first = at.first_step; first < at.end_step; first += TILE_STEPS) {
    const int current = tokens;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int t = at.staged_step(i);
      const bool valid = __shfl_sync(FULL_WARP, current, t) >= 0;
      float f[VEC], x[VEC];
      unpack(raw_delta.value[i], x);
      unpack(raw_u.value[i], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) x[v] = step_size(x[v] + bias[v], valid && ok);
      store_floats<VEC>(s.x + t * CHANNELS + at.column, x);
      store_floats<VEC>(s.u + t * CHANNELS + at.column, f);
    }
    raw_B.stage(s.B, at);
    raw_C.stage(s.C, at);
#if GATE
    Rows gate = raw_z;
#endif
    __syncwarp();
    tokens = next_tokens;
    next_tokens = load_tokens(p, at, first + 2 * TILE_STEPS);
    if (first + TILE_STEPS < at.end_step) load(first + TILE_STEPS);

#pragma unroll
    for (int t = 0; t < TILE_STEPS; t++) {
      float x[CPT], f[CPT], y[CPT], b[SPT], cc[SPT];
      load_floats<CPT>(s.x + t * CHANNELS + at.c * CPT, x);
      load_floats<CPT>(s.u + t * CHANNELS + at.c * CPT, f);
      load_floats<SPT>(s.B + t * N + at.q * SPT, b);
      load_floats<SPT>(s.C + t * N + at.q * SPT, cc);
#pragma unroll
      for (int i = 0; i < CPT; i++) {
        const float xu = x[i] * f[i];
        y[i] = 0.f;
#pragma unroll
        for (int j = 0; j < SPT; j++) {
          h[i][j] = decay_of(x[i], a2[i][j]) * h[i][j] + xu * b[j];  // h_t = exp(Delta A) h_{t-1} + Delta B u
          y[i] += h[i][j] * cc[j];                                       // y_t = C h_t
        }
      }
      store_output(s.y, at, t, y);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const int t = at.staged_step(i), token = __shfl_sync(FULL_WARP, current, t);
      float y[VEC], f[VEC];
      load_floats<VEC>(s.y + t * CHANNELS + at.column, y);
      load_floats<VEC>(s.u + t * CHANNELS + at.column, f);
#pragma unroll
      for (int v = 0; v < VEC; v++) y[v] += skip[v] * f[v];
#if GATE
      unpack(gate.value[i], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) y[v] *= silu(f[v]);
#endif
      if (ok && token >= 0) {
#if PARTIAL
        store_floats<VEC>(row_of((float*)p.y + y_offset, token, p.y_l), y);
#else
        store_act<VEC>(row_of((act_t*)p.y + y_offset, token, p.y_l), y);
#endif
      }
    }
  }
  if (at.chunk == p.chunks - 1) store_state(p, at, p.last_state, (int64)at.b * p.K + at.k, h);
}

// First pass of a chunk-parallel scan: the state that a chunk reaches from zero, and the sum of its Delta, which gives
// every state's decay over the chunk by one exponential. With ADJOINT also the adjoint that reaches the chunk's start
// from a zero adjoint at its end, sum_t (a_1 ... a_t) C_t dy_t: the same decays, so the backward needs one pass.
struct __align__(16) CarryShared { float x[TILE_STEPS * CHANNELS], u[TILE_STEPS * CHANNELS], dy[TILE_STEPS * CHANNELS], B[TILE_STEPS * N], C[TILE_STEPS * N]; };

template <bool ADJOINT> __device__ __forceinline__ void carry(const ScanArgs& p) {
  __shared__ CarryShared shared[WARPS];
  const Place at(p);
  CarryShared& s = shared[at.warp];
  const bool ok = at.in_range(p);
  const int channel = ok ? at.channel0 + at.column : 0;
  const act_t* u = p.u + at.b * p.u_b + (int64)at.k * p.u_k + channel;
  const delta_t* delta = p.delta + at.b * p.delta_b + (int64)at.k * p.delta_k + channel;
  const act_t* B = p.B + at.b * p.B_b + (int64)at.k * p.B_k;
  const act_t* C = ADJOINT ? p.C + at.b * p.C_b + (int64)at.k * p.C_k : nullptr;
  const act_t* dy = ADJOINT ? p.dy + at.b * p.dy_b + (int64)at.k * p.dy_k + channel : nullptr;
  float a2[CPT][SPT], h[CPT][SPT], decay[CPT][SPT], adjoint[CPT][SPT], bias[VEC], total[CPT];
  load_decay(p, at, a2);
  load_columns(p.bias, p, at, bias);
#pragma unroll
  for (int i = 0; i < CPT; i++) {
    total[i] = 0.f;
#pragma unroll
    for (int j = 0; j < SPT; j++) { h[i][j] = 0.f; adjoint[i][j] = 0.f; decay[i][j] = 1.f; }
  }
  if (N != D_STATE)
    for (int i = at.lane; i < TILE_STEPS * N; i += 32) s.B[i] = s.C[i] = 0.f;

  Rows raw_u, raw_dy;
  DeltaRows raw_delta;
#if GATE
  const act_t* z = p.z + at.b * p.z_b + (int64)at.k * p.z_k + channel;
  Rows raw_z;
#endif
  Projection raw_B, raw_C;
  int tokens = load_tokens(p, at, at.first_step), next_tokens = load_tokens(p, at, at.first_step + TILE_STEPS);
  auto load = [&](int first) {
    raw_u.load(u, p.u_l, at, tokens, false, first);
    raw_delta.load(delta, p.delta_l, at, tokens, STEP_ORDER, first);
    raw_B.load(B, p.B_l, at, tokens, STEP_ORDER, first);
    if constexpr (ADJOINT) {
      raw_dy.load(dy, p.dy_l, at, tokens, false, first);
      raw_C.load(C, p.C_l, at, tokens, STEP_ORDER, first);
#if GATE
      raw_z.load(z, p.z_l, at, tokens, false, first);
#endif
    }
  };
  load(at.first_step);
  for (int first = at.first_step; first < at.end_step; first += TILE_STEPS) {
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
      if constexpr (ADJOINT) {
        unpack(raw_dy.value[i], f);
#if GATE
        float gate[VEC];
        unpack(raw_z.value[i], gate);
#pragma unroll
        for (int v = 0; v < VEC; v++) f[v] *= silu(gate[v]);
#endif
        store_floats<VEC>(s.dy + t * CHANNELS + at.column, f);
      }
    }
    raw_B.stage(s.B, at);
    if constexpr (ADJOINT) raw_C.stage(s.C, at);
    __syncwarp();
    tokens = next_tokens;
    next_tokens = load_tokens(p, at, first + 2 * TILE_STEPS);
    if (first + TILE_STEPS < at.end_step) load(first + TILE_STEPS);
#pragma unroll
    for (int t = 0; t < TILE_STEPS; t++) {
      float x[CPT], f[CPT], gy[CPT], b[SPT], cc[SPT];
      load_floats<CPT>(s.x + t * CHANNELS + at.c * CPT, x);
      load_floats<CPT>(s.u + t * CHANNELS + at.c * CPT, f);
      load_floats<SPT>(s.B + t * N + at.q * SPT, b);
      if constexpr (ADJOINT) {
        load_floats<CPT>(s.dy + t * CHANNELS + at.c * CPT, gy);
        load_floats<SPT>(s.C + t * N + at.q * SPT, cc);
      }
#pragma unroll
      for (int i = 0; i < CPT; i++) {
        const float xu = x[i] * f[i];
        total[i] += x[i];
#pragma unroll
        for (int j = 0; j < SPT; j++) {
          const float a = decay_of(x[i], a2[i][j]);
          h[i][j] = a * h[i][j] + xu * b[j];
          if constexpr (ADJOINT) {
            decay[i][j] *= a;
            adjoint[i][j] += decay[i][j] * (cc[j] * gy[i]);
          }
        }
      }
    }
    __syncwarp();
  }
  store_state(p, at, p.carry_state, at.bkc, h);
  if constexpr (ADJOINT) store_state(p, at, p.carry_adjoint, at.bkc, adjoint);
#pragma unroll
  for (int i = 0; i < CPT; i++)
    if (at.q == 0 && at.channel(i) < p.D_) p.carry_delta[at.bkc * p.D_ + at.channel(i)] = total[i];
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) scan_carry(const __grid_constant__ ScanArgs p) { carry<false>(p); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) scan_carry_adjoint(const __grid_constant__ ScanArgs p) { carry<true>(p); }

// Second pass: walk the chunks of a row. Turns each chunk's own contribution into the state that enters it, in place;
// likewise, from the last chunk to the first, the adjoint.
struct CombineArgs {
  float *state, *adjoint;          // (rows, chunks, D, N), rows = B K; adjoint may be null
  const float *delta, *A;          // (rows, chunks, D), (K, D, N)
  const float *initial, *dlast;    // (rows, D, N), or null for zero
  int64 rows;
  int K, D, chunks, pad;
};

extern "C" __global__ void __launch_bounds__(128) combine_carries(const __grid_constant__ CombineArgs p) {
  float *state = p.state, *adjoint = p.adjoint;
  const int chunks = p.chunks;
  const int64 D = p.D, index = (int64)blockIdx.x * 128 + threadIdx.x;
  if (index >= p.rows * D * D_STATE) return;
  const int64 dn = index % (D * D_STATE), row = index / (D * D_STATE), d = dn / D_STATE;
  const int64 stride = D * D_STATE, base = row * chunks * stride + dn, delta_base = row * chunks * D + d;
  const float a2 = p.A[(row % p.K) * stride + dn] * DECAY_SCALE;
  float h = p.initial != nullptr ? p.initial[index] : 0.f;
#pragma unroll 8
  for (int c = 0; c < chunks; c++) {
    const float own = state[base + c * stride], decay = decay_of(p.delta[delta_base + c * D], a2);
    state[base + c * stride] = h;
    h = decay * h + own;
  }
  if (adjoint == nullptr) return;
  float g = p.dlast != nullptr ? p.dlast[index] : 0.f;
#pragma unroll 8
  for (int c = chunks - 1; c >= 0; c--) {
    const float own = adjoint[base + c * stride], decay = decay_of(p.delta[delta_base + c * D], a2);
    adjoint[base + c * stride] = g;
    g = decay * g + own;
  }
}

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
