// What the backward pass of a GELU-MLP needs of its hidden layer, in one pass. See kernels/README.md.
// Macros: ACT, VEC.
#include "common.cuh"

struct GeluArgs {
  const act_t *x, *dy;
  act_t *y, *dx;     // GELU(x), and dy times its slope
  int64 count;       // in units of VEC values
};

extern "C" __global__ void __launch_bounds__(256) gelu_recompute(const __grid_constant__ GeluArgs p) {
  const int64 i = (int64)blockIdx.x * 256 + threadIdx.x;
  if (i >= p.count) return;
  float x[VEC], dy[VEC], y[VEC];
  unpack(load_raw<VEC>(p.x + i * VEC), x);
  unpack(load_raw<VEC>(p.dy + i * VEC), dy);
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    const float normal = 0.5f * (1.f + erff(x[v] * 0.70710678f));  // the normal distribution up to x
    const float density = 0.39894228f * exp2_approx(x[v] * x[v] * (-0.5f * LOG2E));
    y[v] = x[v] * normal;
    dy[v] *= normal + x[v] * density;
  }
  store_act<VEC>(p.y + i * VEC, y);
  store_act<VEC>(p.dx + i * VEC, dy);
}
