// What the chunks of a path pass on. See scan_shared.cuh.
#pragma once

// First pass of a chunk-parallel scan: the state that a chunk reaches from zero, and the sum of its Delta, which gives
// every state's decay over the chunk by one exponential. With ADJOINT also the adjoint that reaches the chunk's start
// from a zero adjoint at its end, sum_t (a_1 ... a_t) C_t dy_t: the same decays, so the backward needs one pass.
struct __align__(16) CarryShared { float x[TILE_STEPS * CHANNELS], u[TILE_STEPS * CHANNELS], dy[TILE_STEPS * CHANNELS], B[TILE_STEPS * N], C[TILE_STEPS * N]; };

template <bool ADJOINT> __device__ __forceinline__ void carry(const ScanArgs& p) {
  __shared__ CarryShared shared[WARPS];
  const Place at(p);
  CarryShared& s = shared[at.warp];
  const int channel = at.in_range(p) ? at.channel0 + at.column : 0;
  const act_t* dy = ADJOINT ? p.dy + at.b * p.dy_b + (int64)at.k * p.dy_k + channel : nullptr;
  float a2[CPT][SPT], h[CPT][SPT], decay[CPT][SPT], adjoint[CPT][SPT], total[CPT];
  load_decay(p, at, a2);
#pragma unroll
  for (int i = 0; i < CPT; i++) {
    total[i] = 0.f;
#pragma unroll
    for (int j = 0; j < SPT; j++) { h[i][j] = 0.f; adjoint[i][j] = 0.f; decay[i][j] = 1.f; }
  }
  clear_padding(s, at);

  Inputs in(p, at);
  Rows raw_dy;
#if GATE
  const act_t* z = p.z + at.b * p.z_b + (int64)at.k * p.z_k + channel;
  Rows raw_z;
#endif
  auto load = [&](int tokens, int first) {
    const GroupRows rows(at, tokens, first);
    in.load<ADJOINT>(p, at, rows);
    if constexpr (ADJOINT) {
      raw_dy.load(dy, p.dy_l, at, rows);
#if GATE
      raw_z.load(z, p.z_l, at, rows);
#endif
    }
  };
  int tokens = load_tokens(p, at, at.first_step), next_tokens = load_tokens(p, at, at.first_step + TILE_STEPS);
  load(tokens, at.first_step);
  for (int first = at.first_step; first < at.end_step; first += TILE_STEPS) {
    in.stage<ADJOINT>(s, p, at, tokens);
    if constexpr (ADJOINT) {
#pragma unroll
      for (int i = 0; i < PER_LANE; i++) {
        float f[VEC];
        unpack(raw_dy.value[i], f);
#if GATE
        float gate[VEC];
        unpack(raw_z.value[i], gate);
#pragma unroll
        for (int v = 0; v < VEC; v++) f[v] *= silu(gate[v]);
#endif
        store_floats<VEC>(s.dy + at.staged_step(i) * CHANNELS + at.column, f);
      }
    }
    __syncwarp();
    tokens = next_tokens;
    next_tokens = load_tokens(p, at, first + 2 * TILE_STEPS);
    if (first + TILE_STEPS < at.end_step) load(tokens, first + TILE_STEPS);
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
  // Several chunks' values are read before the first is replaced: else each would wait for the memory anew.
  constexpr int AT_ONCE = 16;
  const int batches = (chunks + AT_ONCE - 1) / AT_ONCE;
  float own[AT_ONCE], decay[AT_ONCE];
  auto load = [&](const float* from, int first) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int c = min(first + i, chunks - 1);
      own[i] = from[base + c * stride];
      decay[i] = decay_of(p.delta[delta_base + c * D], a2);
    }
  };
  float h = p.initial != nullptr ? p.initial[index] : 0.f;
  for (int batch = 0; batch < batches; batch++) {
    load(state, batch * AT_ONCE);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (const int c = batch * AT_ONCE + i; c < chunks) {
        state[base + c * stride] = h;
        h = decay[i] * h + own[i];
      }
  }
  if (adjoint == nullptr) return;
  float g = p.dlast != nullptr ? p.dlast[index] : 0.f;
  for (int batch = batches - 1; batch >= 0; batch--) {
    load(adjoint, batch * AT_ONCE);
#pragma unroll
    for (int i = AT_ONCE - 1; i >= 0; i--)
      if (const int c = batch * AT_ONCE + i; c < chunks) {
        adjoint[base + c * stride] = g;
        g = decay[i] * g + own[i];
      }
  }
}
