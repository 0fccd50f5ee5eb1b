// The scan's forward for a direction and its reverse, whose outputs meet in shared memory. See scan_shared.cuh.
//
// A block is two warps with the same channels: one walks the direction, the other its reverse, each over all tokens. Half
// way they have visited every token once and left its output in `tile`. They wait for each other, and from there on each
// finds the other's output at every token it comes to, adds its own and writes the sum: once, and in a fixed order.
//
// Macros: those of scan_shared.cuh, WARPS being 2.
#define PAIRED
#include "common.cuh"
#include "scan_shared.cuh"

constexpr int KEPT = CPT > STATE_LANES ? CPT / STATE_LANES : 1, COPIES = STATE_LANES > CPT ? STATE_LANES / CPT : 1;

struct __align__(16) PairedShared { float x[TILE_STEPS * CHANNELS], u[TILE_STEPS * CHANNELS], B[TILE_STEPS * N], C[TILE_STEPS * N]; };

// One direction's walk; all that its two halves share.
struct PairedWalk {
  const ScanArgs& p;
  const Place& at;
  PairedShared& s;
  float* tile;                    // (L + 1, CHANNELS): the outputs so far; the last row is for steps without a token
  float a2[CPT][SPT], h[CPT][SPT], skip[CPT];
  Inputs in;
  int tokens, next_tokens, first, mine;
#if GATE
  const act_t* z;
  Rows raw_z;
#endif

  __device__ __forceinline__ PairedWalk(const ScanArgs& p_, const Place& at_, PairedShared& s_, float* tile_, int first_)
      : p(p_), at(at_), s(s_), tile(tile_), in(p_, at_), first(first_), mine(output_offset(at_)) {
    load_decay(p, at, a2);
    load_state(p, at, p.state_in, at.bkc, h);
#pragma unroll
    for (int i = 0; i < CPT; i++) skip[i] = p.D != nullptr && at.q == 0 && at.channel(i) < p.D_ ? p.D[(int64)at.k * p.D_ + at.channel(i)] : 0.f;
    clear_padding(s, at);
#if GATE
    z = p.z + at.b * p.z_b + (at.in_range(p) ? at.channel0 + at.column : 0);
#endif
    tokens = load_tokens(p, at, first);
    next_tokens = load_tokens(p, at, first + TILE_STEPS);
    in.load<true>(p, at, GroupRows(at, tokens, first));
  }

  __device__ __forceinline__ int row(int token) const { return (int)min((uint32)token, (uint32)p.L); }

  // `groups` groups of steps. FINISH: the other direction has been to their tokens.
  template <bool FINISH> __device__ __forceinline__ void walk(int groups) {
#if GATE
    if (FINISH) raw_z.load(z, p.z_l, at, GroupRows(at, tokens, first));
#endif
    for (int group = 0; group < groups; group++) {
      const int current = tokens;
      in.stage<true>(s, p, at, current);
#if GATE
      const Rows gate = raw_z;
#endif
      __syncwarp();
      first += TILE_STEPS;
      tokens = next_tokens;
      next_tokens = load_tokens(p, at, first + TILE_STEPS);
      if (first < p.P) {
        const GroupRows rows(at, tokens, first);
        in.load<true>(p, at, rows);
#if GATE
        if (FINISH) raw_z.load(z, p.z_l, at, rows);
#endif
      }
      int rows[TILE_STEPS];
      float other[TILE_STEPS][KEPT];
#pragma unroll
      for (int t = 0; t < TILE_STEPS; t++) {
        rows[t] = row(__shfl_sync(FULL_WARP, current, t)) * CHANNELS + mine;
        if (FINISH) load_floats<KEPT>(tile + rows[t], other[t]);
      }
#pragma unroll
      for (int t = 0; t < TILE_STEPS; t++) {
        float y[CPT];
        walk_step<true>(s, at, t, a2, skip, h, y);
        reduce_over_lanes<CPT, STATE_LANES, CHANNEL_LANES>(y, at.lane);
        if (FINISH)
#pragma unroll
          for (int i = 0; i < KEPT; i++) y[i] += other[t][i];
        if (at.q % COPIES == 0) store_floats<KEPT>(tile + rows[t], y);
      }
      __syncwarp();
      if constexpr (FINISH) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
          const int token = __shfl_sync(FULL_WARP, current, at.staged_step(i));
          float y[VEC];
          load_floats<VEC>(tile + row(token) * CHANNELS + at.column, y);
#if GATE
          float f[VEC];
          unpack(gate.value[i], f);
#pragma unroll
          for (int v = 0; v < VEC; v++) y[v] *= silu(f[v]);
#endif
          write(token, y);
        }
      }
    }
  }

  __device__ __forceinline__ void write(int token, const float* y) const {
    if (token < 0 || !at.in_range(p)) return;
    store_act<VEC>(row_of((act_t*)p.y + at.b * p.y_b + at.channel0 + at.column, token, p.y_l), y);
  }
};

extern __shared__ float paired_tile[];

extern "C" __global__ void __launch_bounds__(64, MIN_BLOCKS) scan_paired(const __grid_constant__ ScanArgs p) {
  __shared__ PairedShared shared[2];
  const Place at(p);
  // The reverse's groups end with the path, so that the directions change over at the same token.
  const int groups = (p.P + TILE_STEPS - 1) / TILE_STEPS, half = at.warp == 0 ? groups / 2 : groups - groups / 2;
  PairedWalk walk(p, at, shared[at.warp], paired_tile, at.warp == 0 ? 0 : p.P - groups * TILE_STEPS);
  walk.walk<false>(half);
  __syncthreads();
  walk.walk<true>(groups - half);
  store_state(p, at, p.last_state, (int64)at.b * p.K + at.k, walk.h);
}
