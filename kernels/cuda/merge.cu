// Second stages: sums in a fixed order, so that results are bit-identical from run to run.
// Macros: ACT.
#include "common.cuh"

struct MergeArgs {
  const float* partial;   // (rows, K, D)
  const act_t* z;         // rows of D, or null
  act_t* y;               // (rows, D)
  int64 rows, z_b;        // z's row of (b, l) starts at b z_b + l z_l
  int K, D, L, z_l;
};

// a / b and its remainder; 64-bit division, which is slow, only for large a.
__device__ __forceinline__ int64 divide(int64 a, int b, int& remainder) {
  if (a >> 32 == 0) {
    const uint32 quotient = (uint32)a / (uint32)b;
    remainder = (int)((uint32)a - quotient * (uint32)b);
    return quotient;
  }
  const int64 quotient = a / b;
  remainder = (int)(a - quotient * b);
  return quotient;
}

// y = sum_k partial_k, times silu(z).
template <int V> __device__ __forceinline__ void merge(const MergeArgs& p) {
  const int columns = p.D / V;
  const int64 index = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= p.rows * columns) return;
  int column, l;
  const int64 row = divide(index, columns, column);
  const int d = column * V;
  const float* from = p.partial + row * p.K * p.D + d;
  float y[V], f[V], gate[V];
  if (p.z != nullptr) {
    const int64 b = divide(row, p.L, l);
    unpack(load_raw<V>(p.z + b * p.z_b + (int64)l * p.z_l + d), gate);
  }
  load_floats<V>(from, y);
#pragma unroll 4
  for (int k = 1; k < p.K; k++) {
    load_floats<V>(from + (int64)k * p.D, f);
#pragma unroll
    for (int v = 0; v < V; v++) y[v] += f[v];
  }
  if (p.z != nullptr) {
#pragma unroll
    for (int v = 0; v < V; v++) y[v] *= silu(gate[v]);
  }
  store_act<V>(p.y + row * p.D + d, y);
}

extern "C" __global__ void __launch_bounds__(256) merge_directions_1(const __grid_constant__ MergeArgs p) { merge<1>(p); }
extern "C" __global__ void __launch_bounds__(256) merge_directions_2(const __grid_constant__ MergeArgs p) { merge<2>(p); }
extern "C" __global__ void __launch_bounds__(256) merge_directions_4(const __grid_constant__ MergeArgs p) { merge<4>(p); }

struct ProjectionArgs {
  const float* partial;   // (B, K, tiles, L, 2 N)
  act_t *dB, *dC;         // (B, L, K, N)
  int K, L, N, tiles, blocks, pad;  // `blocks` blocks a plane (b, k)
};

// dB and dC summed over the blocks of channels, V neighbouring states at a time.
template <int V> __device__ __forceinline__ void reduce_projection(const ProjectionArgs& p) {
  const int bk = blockIdx.x / p.blocks, plane = p.L * 2 * p.N;
  const int in_plane = ((blockIdx.x - bk * p.blocks) * 256 + threadIdx.x) * V;
  if (in_plane >= plane) return;
  const float* from = p.partial + (int64)bk * p.tiles * plane + in_plane;
  float sum[V], f[V];
#pragma unroll
  for (int v = 0; v < V; v++) sum[v] = 0.f;
#pragma unroll 4
  for (int i = 0; i < p.tiles; i++) {
    load_floats<V>(from + (int64)i * plane, f);
#pragma unroll
    for (int v = 0; v < V; v++) sum[v] += f[v];
  }
  const int l = in_plane / (2 * p.N), n = in_plane - l * 2 * p.N;
  const int64 to = (((int64)(bk / p.K) * p.L + l) * p.K + bk % p.K) * p.N;
  store_act<V>(n < p.N ? p.dB + to + n : p.dC + to + n - p.N, sum);
}

extern "C" __global__ void __launch_bounds__(256) reduce_projections_1(const __grid_constant__ ProjectionArgs p) { reduce_projection<1>(p); }
extern "C" __global__ void __launch_bounds__(256) reduce_projections_4(const __grid_constant__ ProjectionArgs p) { reduce_projection<4>(p); }

// The same for one state: a thread sums those of a token, whose directions lie side by side, V at a time.
template <int V> __device__ __forceinline__ void reduce_projection_of_one_state(const ProjectionArgs& p) {
  const int b = blockIdx.x / p.blocks, l = (blockIdx.x - b * p.blocks) * 256 + threadIdx.x;
  if (l >= p.L) return;
  for (int k = 0; k < p.K; k += V) {
    const Pair* from = (const Pair*)p.partial + ((int64)b * p.K + k) * p.tiles * p.L + l;
    float B[V], C[V];
#pragma unroll
    for (int v = 0; v < V; v++) B[v] = C[v] = 0.f;
#pragma unroll 3
    for (int i = 0; i < p.tiles; i++)
#pragma unroll
      for (int v = 0; v < V; v++) {
        const Pair f = from[((int64)v * p.tiles + i) * p.L];
        B[v] += f.x; C[v] += f.y;
      }
    const int64 to = ((int64)b * p.L + l) * p.K + k;
    store_act<V>(p.dB + to, B);
    store_act<V>(p.dC + to, C);
  }
}

extern "C" __global__ void __launch_bounds__(256) reduce_one_state_1(const __grid_constant__ ProjectionArgs p) { reduce_projection_of_one_state<1>(p); }
extern "C" __global__ void __launch_bounds__(256) reduce_one_state_2(const __grid_constant__ ProjectionArgs p) { reduce_projection_of_one_state<2>(p); }
extern "C" __global__ void __launch_bounds__(256) reduce_one_state_4(const __grid_constant__ ProjectionArgs p) { reduce_projection_of_one_state<4>(p); }

struct RowsArgs {
  const float* partial;          // (rows, width)
  float *first, *second, *third; // the column sums: up to first_end, up to second_end, and the rest
  int64 rows, width, first_end, second_end;
};

// Column sums, in a fixed order. The parts of a column may cancel, so that the sum is kept to twice float32's digits.
extern "C" __global__ void __launch_bounds__(256, 2) reduce_rows(const __grid_constant__ RowsArgs p) {
  __shared__ float sums[8][32], losses[8][32];
  const int lane = threadIdx.x & 31, part = threadIdx.x >> 5;
  const int64 column = (int64)blockIdx.x * 32 + lane;
  float sum = 0.f, lost = 0.f;
  if (column < p.width)
#pragma unroll 16
    for (int64 row = part; row < p.rows; row += 8) add_exactly(sum, lost, p.partial[row * p.width + column]);
  sums[part][lane] = sum;
  losses[part][lane] = lost;
  __syncthreads();
  if (part == 0 && column < p.width) {
    float total = 0.f;
    lost = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) add_exactly(total, lost, sums[i][lane]), lost += losses[i][lane];
    total += lost;
    float* out = column < p.first_end ? p.first + column : column < p.second_end ? p.second + column - p.first_end : p.third + column - p.second_end;
    *out = total;
  }
}
