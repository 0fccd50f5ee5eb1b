// One decoding step of a selective SSM, in place: reading and writing the state is all the time it takes.
//
//   h <- exp(Delta A) h + Delta x B;  y = (h C + D x) silu(z)
//
// ROW_LANES neighbouring lanes share a row (a channel of a head of a batch entry) and take VEC of its states at a time.
// Macros: ACT, STATE (the state's type, coded like ACT), ROW_LANES, VEC, SOFTPLUS.
#include "common.cuh"

struct UpdateArgs {
  state_t* state;                 // (slots, H, P, N)
  const act_t *x, *dt, *z;        // (B, H, P); z may be null
  const act_t *B, *C;             // (B, G, N)
  const float *A, *D, *bias;      // (H, P, N), (H, P), (H, P); D and bias may be null
  const int* slots;               // (B,): -1 for padding; or null
  act_t* out;                     // (B, H, P), contiguous
  int64 rows;                     // B H P, below 2^31: dividing 64-bit numbers would take the longest
  int64 state_b, state_h, state_p, x_b, x_h, x_p, dt_b, dt_h, dt_p, z_b, z_h, z_p, B_b, B_g, C_b, C_g;  // in elements
  int64 A_h, A_p, A_n, D_h, D_p, bias_h, bias_p;
  int H, P, N, heads_per_group;
};

struct __align__(sizeof(state_t) * VEC) States { state_t value[VEC]; };
struct __align__(sizeof(act_t) * VEC) Values { act_t value[VEC]; };

extern "C" __global__ void __launch_bounds__(128) state_update(const __grid_constant__ UpdateArgs p) {
  const int64 row = ((int64)blockIdx.x * 128 + threadIdx.x) / ROW_LANES;
  const int lane = threadIdx.x % ROW_LANES;
  const bool exists = row < p.rows;
  const unsigned index = exists ? (unsigned)row : 0, entry = index / (unsigned)p.P;
  const int channel = index % (unsigned)p.P, h = entry % (unsigned)p.H, g = (unsigned)h / (unsigned)p.heads_per_group;
  const int64 b = entry / (unsigned)p.H;
  const int slot = p.slots != nullptr ? p.slots[b] : 0;
  const int64 place = p.slots != nullptr ? max(slot, 0) : b;
  state_t* state = p.state + place * p.state_b + h * p.state_h + channel * p.state_p;
  const float* A = p.A + h * p.A_h + channel * p.A_p;
  const act_t *B = p.B + b * p.B_b + g * p.B_g, *C = p.C + b * p.C_b + g * p.C_g;
  const float x = to_float(p.x[b * p.x_b + h * p.x_h + channel * p.x_p]);
  float step = to_float(p.dt[b * p.dt_b + h * p.dt_h + channel * p.dt_p]);
  if (p.bias != nullptr) step += p.bias[h * p.bias_h + channel * p.bias_p];
  if (SOFTPLUS) step = softplus(step);
  const float input = step * x;
  float y[1] = {0.f};
  for (int n = lane * VEC; n < p.N && exists && slot >= 0; n += ROW_LANES * VEC) {
    States old = *reinterpret_cast<const States*>(state + n);
    const Values b_n = *reinterpret_cast<const Values*>(B + n), c_n = *reinterpret_cast<const Values*>(C + n);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      const float decay = decay_of(step, A[(n + v) * p.A_n] * DECAY_SCALE);
      old.value[v] = round_state(decay * load_state(old.value[v]) + input * to_float(b_n.value[v]));
      y[0] += load_state(old.value[v]) * to_float(c_n.value[v]);
    }
    *reinterpret_cast<States*>(state + n) = old;
  }
  reduce_over_lanes<1, ROW_LANES, 1>(y, threadIdx.x & 31);
  if (!exists || lane != 0) return;
  if (p.D != nullptr) y[0] += p.D[h * p.D_h + channel * p.D_p] * x;
  if (p.z != nullptr) y[0] *= silu(to_float(p.z[b * p.z_b + h * p.z_h + channel * p.z_p]));
  p.out[row] = from_float(slot >= 0 ? y[0] : 0.f);
}
