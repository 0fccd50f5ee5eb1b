// The step sizes' low-rank projection, delta = W x for each token and direction, and its gradients, on tensor cores: for
// 16-bit x. See kernels/README.md.
//
// A float32 factor is the sum of three bfloat16 parts, whose products are exact and are summed in float32: nothing is lost
// that a float32 product would keep. A warp owns 16 TILES channels of a direction and walks over tokens, 16 at a time.
// Macros: ACT (1, 2), RANK, TILES, WARPS, X_PAIRS (two neighbouring values of x are one aligned access), AHEAD (the backward
// copies the next step's gradient to shared memory while it works on one).
#include "common.cuh"

// c += a b; a is 16 x 16, b 16 x 8, c 16 x 8. Lane 4 g + q holds of a rows g and g + 8, columns 2 q, 2 q + 1 and those plus 8;
// of b rows 2 q, 2 q + 1 and those plus 8 of column g; of c rows g and g + 8, columns 2 q and 2 q + 1.
__device__ __forceinline__ void multiply_add(float c[4], const uint32 a[4], const uint32 b[2]) {
#ifdef VM_EMULATE
  emulated_mma(c, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// An 8 x 8 matrix of which lane 4 g + q holds row g, columns 2 q and 2 q + 1, transposed.
__device__ __forceinline__ uint32 transposed(uint32 x) {
#ifdef VM_EMULATE
  return emulated_transpose(x);
#else
  uint32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
#endif
}

// x as a sum of PARTS pairs of bfloat16.
template <int PARTS> __device__ __forceinline__ void split(float low, float high, uint32 parts[PARTS]) {
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    parts[i] = pack_bf16(low, high);
    low -= bits_to_float(parts[i] << 16), high -= bits_to_float(parts[i] & 0xffff0000u);
  }
}

constexpr int PARTS = 3, X_PARTS = ACT == 2 ? 1 : 2;  // of float32 and of act_t
constexpr int FLUSH = 4;  // the unit's sums lose a bit more than float32's: they are added up every so many steps
constexpr int TOKENS = 16, WARP_CHANNELS = 16 * TILES, CHANNELS = WARPS * WARP_CHANNELS;
constexpr int R_TILES = (RANK + 7) / 8, R_STEPS = (RANK + 15) / 16;

struct DtArgs {
  const act_t* x;            // (rows, K, R), with strides
  const float* weight;       // (K, D, R)
  float* delta;              // (rows, K, D): the result, or its gradient
  float* dx;                 // (tiles, rows, K, R): the sums over the tiles' channels
  float* dweight;            // (chunks, K, D, R)
  int64 rows, x_row, x_k;
  int K, D, tiles, chunk;    // rows of a block
};

struct Seat {
  int lane, g, q, warp, k, tile, channel;  // channel: the warp's first
  int64 part, first, end;
  __device__ __forceinline__ Seat(const DtArgs& p) {
    lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, warp = threadIdx.x >> 5;
    tile = (int)(blockIdx.x % p.tiles), k = (int)(blockIdx.x / p.tiles % p.K), part = blockIdx.x / p.tiles / p.K;
    channel = tile * CHANNELS + warp * WARP_CHANNELS;
    first = part * p.chunk, end = min(first + p.chunk, p.rows);
  }
  // A lane reads four neighbouring channels at a time: columns 2 q, 2 q + 1 of 16 channels are 4 q, 4 q + 1, and columns
  // 2 q + 8, 2 q + 9 are 4 q + 2, 4 q + 3. The channel of column c < 8:
  __device__ __forceinline__ static int column(int c) { return 4 * (c / 2) + c % 2; }
};

// Values r and r + 1 of a token.
__device__ __forceinline__ Raw<2> load_pair(const DtArgs& p, const Seat& at, int64 row, int r) {
  const act_t* from = p.x + row * p.x_row + at.k * p.x_k + r;
  const bool present = row < at.end && r < RANK;
#if X_PAIRS
  return present ? load_raw<2>(from) : raw_zero<2>();
#else
  const uint32 low = present ? from[0] : 0, high = present && r + 1 < RANK ? from[1] : 0;
  Raw<2> pair;
  pair.x = low | high << 16;
  return pair;
#endif
}

__device__ __forceinline__ void split_pair(const Raw<2>& pair, uint32 parts[X_PARTS]) {
  if constexpr (X_PARTS == 1) {
    parts[0] = pair.x;
  } else {
    float f[2];
    unpack(pair, f);
    split<X_PARTS>(f[0], f[1], parts);
  }
}

__device__ __forceinline__ float weight_at(const DtArgs& p, const Seat& at, int channel, int r) {
  return channel < p.D && r < RANK ? p.weight[((int64)at.k * p.D + channel) * RANK + r] : 0.f;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) dt_expand(const __grid_constant__ DtArgs p) {
  const Seat at(p);
  uint32 w[PARTS][R_STEPS][2 * TILES][2];
#pragma unroll
  for (int i = 0; i < R_STEPS; i++)
#pragma unroll
    for (int n = 0; n < 2 * TILES; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int channel = at.channel + n / 2 * 16 + n % 2 * 2 + Seat::column(at.g), r = i * 16 + half * 8 + at.q * 2;
        uint32 parts[PARTS];
        split<PARTS>(weight_at(p, at, channel, r), weight_at(p, at, channel, r + 1), parts);
#pragma unroll
        for (int part = 0; part < PARTS; part++) w[part][i][n][half] = parts[part];
      }
  uint32 x[R_STEPS][4][X_PARTS];
  Raw<2> next[R_STEPS][4];
  auto load = [&](int64 row) {
#pragma unroll
    for (int i = 0; i < R_STEPS; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) next[i][j] = load_pair(p, at, row + at.g + j % 2 * 8, i * 16 + j / 2 * 8 + at.q * 2);
  };
  load(at.first);
  for (int64 row = at.first; row < at.end; row += TOKENS) {
#pragma unroll
    for (int i = 0; i < R_STEPS; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) split_pair(next[i][j], x[i][j]);
    load(row + TOKENS);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      float c[2][4] = {};
#pragma unroll
      for (int i = 0; i < R_STEPS; i++)
#pragma unroll
        for (int from = X_PARTS - 1; from >= 0; from--) {
          uint32 a[4];
#pragma unroll
          for (int j = 0; j < 4; j++) a[j] = x[i][j][from];
#pragma unroll
          for (int part = PARTS - 1; part >= 0; part--)  // the small products first
#pragma unroll
            for (int n = 0; n < 2; n++) multiply_add(c[n], a, w[part][i][2 * t + n]);
        }
      const int channel = at.channel + t * 16 + at.q * 4;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int64 to = row + at.g + 8 * i;
        const float f[4] = {c[0][2 * i], c[0][2 * i + 1], c[1][2 * i], c[1][2 * i + 1]};
        if (to < at.end && channel < p.D) store_floats<4>(p.delta + (to * p.K + at.k) * p.D + channel, f);
      }
    }
  }
}

extern __shared__ uint32 dynamic[];

extern "C" __global__ void __launch_bounds__(WARPS * 32) dt_backward(const __grid_constant__ DtArgs p) {
  const Seat at(p);
  // Of each 16 channels and 8 values: the weight's parts as b of a product, in the order of the lanes. Then the warps' sums.
  constexpr int FRAGMENT = 32 * 2 * PARTS, SUMS = TOKENS * 8 * R_TILES;
  uint32* w = dynamic + at.warp * TILES * R_TILES * FRAGMENT + at.lane * 2;
  float* sums = reinterpret_cast<float*>(dynamic + WARPS * TILES * R_TILES * FRAGMENT);
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int n = 0; n < R_TILES; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int channel = at.channel + t * 16 + at.q * 4 + half * 2, r = n * 8 + at.g;
        uint32 parts[PARTS];
        split<PARTS>(weight_at(p, at, channel, r), weight_at(p, at, channel + 1, r), parts);
#pragma unroll
        for (int part = 0; part < PARTS; part++) w[(t * R_TILES + n) * FRAGMENT + part * 64 + half] = parts[part];
      }
  __syncwarp();
  float dweight[TILES][R_TILES][4] = {}, recent[TILES][R_TILES][4] = {};
  const float* from = p.delta + (int64)at.k * p.D + at.channel + at.q * 4;
  const int64 stride = (int64)p.K * p.D;
  auto flush = [&] {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int n = 0; n < R_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) dweight[t][n][i] += recent[t][n][i], recent[t][n][i] = 0.f;
  };
  // A lane's own four channels of its tokens: a step's gradient as read, or as copied while the step before was at work.
  float* ahead = sums + 2 * WARPS * SUMS + (at.warp * TILES * 2 * 32 + at.lane) * 4;
  auto present = [&](int64 token, int t) { return token < at.end && at.channel + t * 16 + at.q * 4 < p.D; };
  auto copy = [&](int64 row) {
#if AHEAD
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int64 token = row + at.g + 8 * i;
        if (present(token, t)) copy_16(ahead + (t * 2 + i) * 128, from + token * stride + t * 16);
      }
#endif
  };
  Raw<2> next[R_TILES][2];  // of x
  auto load = [&](int64 row) {
#pragma unroll
    for (int n = 0; n < R_TILES; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) next[n][half] = load_pair(p, at, row + at.g + 8 * half, n * 8 + at.q * 2);
  };
  copy(at.first);
  load(at.first);
  int step = 0;
  for (int64 row = at.first; row < at.end; row += TOKENS, step++) {
    const int buffer = step & 1;
    if (step % FLUSH == 0) flush();
    float gradient[TILES][2][4];
#if AHEAD
    wait_for_copies();
#endif
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int64 token = row + at.g + 8 * i;
#pragma unroll
        for (int v = 0; v < 4; v++) gradient[t][i][v] = 0.f;
        if (present(token, t)) load_floats<4>(AHEAD ? ahead + (t * 2 + i) * 128 : from + token * stride + t * 16, gradient[t][i]);
      }
    copy(row + TOKENS);
    uint32 x[R_TILES][X_PARTS][2];  // as b of a product: tokens by values
#pragma unroll
    for (int n = 0; n < R_TILES; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32 parts[X_PARTS];
        split_pair(next[n][half], parts);
#pragma unroll
        for (int part = 0; part < X_PARTS; part++) x[n][part][half] = transposed(parts[part]);
      }
    load(row + TOKENS);
    float dx[R_TILES][4] = {};
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      uint32 a[PARTS][4], turned[PARTS][4];  // the gradient as tokens by channels, and as channels by tokens
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float* pair = &gradient[t][j % 2][j / 2 * 2];
        uint32 parts[PARTS];
        split<PARTS>(pair[0], pair[1], parts);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
          a[part][j] = parts[part];
          turned[part][j % 2 * 2 + j / 2] = transposed(parts[part]);
        }
      }
#pragma unroll
      for (int n = 0; n < R_TILES; n++) {
        uint32 b[PARTS][2];
        float sum[4] = {};
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
          for (int half = 0; half < 2; half++) b[part][half] = w[(t * R_TILES + n) * FRAGMENT + part * 64 + half];
#pragma unroll
        for (int order = PARTS - 1; order >= 0; order--)  // the small products first; smaller ones round away
#pragma unroll
          for (int part = 0; part <= order; part++) multiply_add(sum, a[part], b[order - part]);
#pragma unroll
        for (int i = 0; i < 4; i++) dx[n][i] += sum[i];
#pragma unroll
        for (int part = PARTS - 1; part >= 0; part--)
#pragma unroll
          for (int i = X_PARTS - 1; i >= 0; i--) multiply_add(recent[t][n], turned[part], x[n][i]);
      }
    }
    float* own = sums + (buffer * WARPS + at.warp) * SUMS;
#pragma unroll
    for (int n = 0; n < R_TILES; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) store_floats<2>(own + (at.g + 8 * i) * (8 * R_TILES) + n * 8 + at.q * 2, dx[n] + 2 * i);
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * RANK; i += 32 * WARPS) {
      const int token = i / RANK, r = i - token * RANK;
      float total = 0.f;
#pragma unroll
      for (int warp = 0; warp < WARPS; warp++) total += sums[(buffer * WARPS + warp) * SUMS + token * (8 * R_TILES) + r];
      if (row + token < at.end) {
        p.dx[(((int64)at.tile * p.rows + row + token) * p.K + at.k) * RANK + r] = total;
      }
    }
  }
  flush();
  float* to = p.dweight + (at.part * p.K + at.k) * (int64)p.D * RANK;
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int n = 0; n < R_TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int channel = at.channel + t * 16 + i / 2 * 2 + Seat::column(at.g), r = n * 8 + at.q * 2 + i % 2;
        if (channel < p.D && r < RANK) to[(int64)channel * RANK + r] = dweight[t][n][i];
      }
}
