// What the pieces of a path do to the states and the adjoints of the scan's backward, and from that what enters each piece.
// See pair_walk.cuh.
#include "common.cuh"
#include "pair_walk.cuh"

constexpr int LINK_BYTES = COMMON_BYTES + 2 * COPIED;

// What each piece does, from zero.
struct Links : Walk {
  float* spans[2];
  Pair* links[2];  // (state, adjoint)
  float A[2][VEC], bias[2][VEC];
  __device__ __forceinline__ Links(const PairArgs& p) : Walk(p, LINK_BYTES) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      // Of two lanes that share channels, the first chunk's stores one's, the second's the other's.
      spans[r] = kept(p.spans + first_link(r) + at.channel + !is_first(r));
      links[r] = kept((Pair*)p.links + first_link(r) + at.channel + !is_first(r));
    }
  }
  __device__ __forceinline__ void load_parameters(const float* parameters) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      load_floats<VEC>(parameters + r * TILE_CHANNELS + at.column, A[r]);
      load_floats<VEC>(parameters + (2 + r) * TILE_CHANNELS + at.column, bias[r]);
    }
  }
  template <bool REVERSE> __device__ __forceinline__ void walk(int piece) const {
    const float *A = this->A[REVERSE], *bias = this->bias[REVERSE];
    float a[STEPS][VEC], B[SLOTS], C[SLOTS], x_sum[VEC];
    Link own[VEC];
    common.read_B(at, REVERSE, B);
    common.read_C(at, REVERSE, C);
#pragma unroll
    for (int v = 0; v < VEC; v++) own[v].x = own[v].h = own[v].g = 0.f;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const int j = REVERSE ? STEPS - 1 - i : i;
      float x[VEC], f[VEC];
      step_size<false>(REVERSE, j, bias, x, nullptr);
      unpack(u[j], f);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        a[i][v] = decay_of(x[v], A[v]);
        own[v].h = a[i][v] * own[v].h + x[v] * f[v] * B[j];
        own[v].x += x[v];
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
    // The first chunk's lanes take the adjoint from the second's, those take the state from the first's.
    const bool first = is_first(REVERSE);
    float through[VEC];
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      const float other = __shfl_xor_sync(FULL_WARP, choose(first, own[v].h, own[v].g), LANES);
      through[v] = decay_of(own[v].x, A[v]) * other + choose(first, own[v].g, own[v].h);
      x_sum[v] = own[v].x + __shfl_xor_sync(FULL_WARP, own[v].x, LANES);
    }
    const float other = __shfl_xor_sync(FULL_WARP, choose(first, through[1], through[0]), LANES);
    Pair link;
    link.x = choose(first, other, through[1]);
    link.y = choose(first, through[0], other);
    if (!at.ok) return;
    *row_of(links[REVERSE], piece, p.channels * 8) = link;
    *row_of(spans[REVERSE], piece, p.channels * 4) = choose(first, x_sum[0], x_sum[1]);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) pair_links(const __grid_constant__ PairArgs p) {
  float* parameters = dynamic_shared + WARPS * (LINK_BYTES / 4);
  Links links(p);
  stage_parameter(p, links.at, p.A, 1.f, parameters);
  stage_parameter(p, links.at, p.bias, DECAY_SCALE, parameters + 2 * TILE_CHANNELS);
  __syncthreads();
  links.load_parameters(parameters);
  for_each_piece(links, COPIED, [](int, int) {}, [&](int piece, int) {
    links.walk<false>(piece);
    links.walk<true>(piece);
  });
}

// From what each piece does to what enters it: a thread a channel and some consecutive pieces, PARTS threads a channel. Up to
// LENGTH pieces stay in registers; more of them (LENGTH 0) are read three times, AT_ONCE at a time.
constexpr int AT_ONCE = LENGTH > 0 ? LENGTH : 7;

struct Pieces {
  const float* spans;
  Pair* links;  // (state, adjoint)
  int count, channels, first, end;
  bool reversed;
  float A, decay[AT_ONCE], x[AT_ONCE];
  Pair made[AT_ONCE];
  // The i-th piece that the direction visits.
  __device__ __forceinline__ int64 at(int i) const { return (int64)(reversed ? count - 1 - i : i) * channels; }
  __device__ __forceinline__ bool there(int i) const { return i >= first && i < end; }
  // Pieces outside of [first, end) leave everything as it is.
  __device__ __forceinline__ void read(int i) {
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      x[j] = there(i + j) ? spans[at(i + j)] : 0.f;
      if (there(i + j)) made[j] = links[at(i + j)]; else made[j].x = made[j].y = 0.f;
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) decay[j] = decay_of(x[j], A);
  }
  // What all of them do.
  __device__ __forceinline__ Link combined() {
    Link all;
    all.x = all.h = all.g = 0.f;
    for (int i = first; i < end; i += AT_ONCE) {
      read(i);
      float g = 0.f;
#pragma unroll
      for (int j = AT_ONCE - 1; j >= 0; j--) g = decay[j] * g + made[j].y;
      all.g += decay_of(all.x, A) * g;
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) { all.h = decay[j] * all.h + made[j].x; all.x += x[j]; }
    }
    return all;
  }
  // Leaves what enters each; `h` and `g` are what enters all of them, then what leaves them.
  __device__ __forceinline__ void enter(float& h, float& g) {
    for (int i = first; i < end; i += AT_ONCE) {
      if (LENGTH == 0) read(i);
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const float entering = h;
        h = decay[j] * h + made[j].x;
        made[j].x = entering;
        if (LENGTH == 0 && there(i + j)) links[at(i + j)].x = entering;
      }
    }
    for (int i = LENGTH > 0 ? first : end - AT_ONCE; i > first - AT_ONCE; i -= AT_ONCE) {
      if (LENGTH == 0) read(i);
#pragma unroll
      for (int j = AT_ONCE - 1; j >= 0; j--) {
        const float entering = g;
        g = decay[j] * g + made[j].y;
        made[j].y = entering;
        if (!there(i + j)) continue;
        if (LENGTH > 0) links[at(i + j)] = made[j]; else links[at(i + j)].y = entering;
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(32 * PARTS) pair_combine(const __grid_constant__ PairArgs p) {
  __shared__ Link parts[PARTS][32];
  const int strips = (p.channels + 31) / 32, in_turn = blockIdx.x / strips;
  const int bk = p.last_first ? p.batch * p.K - 1 - in_turn : in_turn, k = bk % p.K;
  const int lane = threadIdx.x & 31, part = threadIdx.x >> 5, channel = blockIdx.x % strips * 32 + lane;
  const bool ok = channel < p.channels;  // lanes without one read the strip's first, which no other block writes
  const int64 index = (int64)bk * p.channels + channel, row = (int64)bk * p.pieces * p.channels + (ok ? channel : channel - lane);
  const int length = (p.pieces + PARTS - 1) / PARTS;
  Pieces pieces;
  pieces.A = ok ? p.A[k * p.channels + channel] : 0.f;
  pieces.spans = p.spans + row;
  pieces.links = (Pair*)p.links + row;
  pieces.count = p.pieces; pieces.channels = p.channels; pieces.reversed = false;
  for (int i = 0; i < p.pairs; i++) pieces.reversed = pieces.reversed || p.back[i] == k;
  pieces.first = min(part * length, p.pieces);
  pieces.end = min(pieces.first + length, p.pieces);
  parts[part][lane] = pieces.combined();
  __syncthreads();
  if (!ok) return;
  float h = p.state_in != nullptr ? p.state_in[index] * DECAY_SCALE : 0.f, g = p.dlast != nullptr ? p.dlast[index] : 0.f;
  for (int q = 0; q < part; q++) h = decay_of(parts[q][lane].x, pieces.A) * h + parts[q][lane].h;
  for (int q = PARTS - 1; q > part; q--) g = decay_of(parts[q][lane].x, pieces.A) * g + parts[q][lane].g;
  pieces.enter(h, g);
  if (part == 0 && p.dstate != nullptr) p.dstate[index] = g;
}
