// The scan's forward. See scan_shared.cuh.
#include "common.cuh"
#include "scan_shared.cuh"
#include "scan_carry.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32) scan_carry(const __grid_constant__ ScanArgs p) { carry<false>(p); }

struct __align__(16) ForwardShared { float x[TILE_STEPS * CHANNELS], u[TILE_STEPS * CHANNELS], y[TILE_STEPS * CHANNELS], B[TILE_STEPS * N], C[TILE_STEPS * N]; };

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) scan_forward(const __grid_constant__ ScanArgs p) {
  __shared__ ForwardShared shared[WARPS];
  const Place at(p);
  ForwardShared& s = shared[at.warp];
  const bool ok = at.in_range(p);
  const int channel = ok ? at.channel0 + at.column : 0;
  const int64 y_offset = at.b * p.y_b + (int64)at.k * p.y_k + channel;
#if GATE
  const act_t* z = p.z + at.b * p.z_b + (int64)at.k * p.z_k + channel;
  Rows raw_z;
#endif
  float a2[CPT][SPT], h[CPT][SPT], skip[VEC];
  load_decay(p, at, a2);
  load_state(p, at, p.state_in, at.bkc, h);
  load_columns(p.D, p, at, skip);
  clear_padding(s, at);

  Inputs in(p, at);
  auto load = [&](int tokens, int first) {
    const GroupRows rows(at, tokens, first);
    in.load<true>(p, at, rows);
#if GATE
    raw_z.load(z, p.z_l, at, rows);
#endif
  };
  int tokens = load_tokens(p, at, at.first_step), next_tokens = load_tokens(p, at, at.first_step + TILE_STEPS);
  load(tokens, at.first_step);
  for (int first = at.first_step; first < at.end_step; first += TILE_STEPS) {
    const int current = tokens;
    in.stage<true>(s, p, at, current);
#if GATE
    const Rows gate = raw_z;
#endif
    __syncwarp();
    tokens = next_tokens;
    next_tokens = load_tokens(p, at, first + 2 * TILE_STEPS);
    if (first + TILE_STEPS < at.end_step) load(tokens, first + TILE_STEPS);

#pragma unroll
    for (int t = 0; t < TILE_STEPS; t++) {
      float y[CPT];
      walk_step<false>(s, at, t, a2, nullptr, h, y);
      store_output(s.y, at, output_offset(at), t, y);
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
