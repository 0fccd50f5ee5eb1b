// The next steps of a causal depthwise convolution (+ SiLU) whose past is in a state, which it updates in place.
//
// A thread takes a channel of a sequence. Macros: ACT, STATE (the state's type, coded like ACT), WIDTH, SILU.
#include "common.cuh"

constexpr int PAST = WIDTH - 1;

struct ConvUpdateArgs {
  const act_t* x;                 // (B, D, L)
  state_t* state;                 // (slots, D, S), the newest last; or circular, see below
  const float *weight, *bias;     // (D, W), (D); bias may be null
  const int *seen, *slots;        // (B,): steps seen so far (step t is at t mod S), or null; slots: -1 for padding, or null
  act_t* out;                     // (B, D, L), contiguous
  int64 rows;                     // B D
  int64 x_b, x_d, x_l, state_b, state_d, state_s;  // in elements
  int D, L, S, pad;
};

extern "C" __global__ void __launch_bounds__(128) conv_update(const __grid_constant__ ConvUpdateArgs p) {
  const int64 row = (int64)blockIdx.x * 128 + threadIdx.x;
  if (row >= p.rows) return;
  const int64 b = row / p.D;
  const int d = (int)(row % p.D), slot = p.slots != nullptr ? p.slots[b] : 0;
  act_t* out = p.out + row * p.L;
  if (slot < 0) {
    for (int l = 0; l < p.L; l++) out[l] = from_float(0.f);
    return;
  }
  const act_t* x = p.x + b * p.x_b + d * p.x_d;
  state_t* state = p.state + (p.slots != nullptr ? slot : b) * p.state_b + d * p.state_d;
  const int begin = p.seen != nullptr ? p.seen[b] % p.S : 0;  // where a circular state takes the next step
  float w[WIDTH], window[WIDTH];
#pragma unroll
  for (int j = 0; j < WIDTH; j++) w[j] = p.weight[(int64)d * WIDTH + j];
#pragma unroll
  for (int j = 0; j < PAST; j++) {
    const int place = p.seen != nullptr ? (begin + p.S - PAST + j) % p.S : p.S - PAST + j;
    // The past is used as the input's type, which the inputs that it stands for had.
    window[j + 1] = to_float(from_float(load_state(state[place * p.state_s])));
  }
  const float bias = p.bias != nullptr ? p.bias[d] : 0.f;
  for (int l = 0; l < p.L; l++) {
    float y = bias;
#pragma unroll
    for (int j = 0; j < PAST; j++) window[j] = window[j + 1];
    window[PAST] = to_float(x[l * p.x_l]);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) y += w[j] * window[j];
    out[l] = from_float(SILU ? silu(y) : y);
    if (p.seen != nullptr) state[(begin + l) % p.S * p.state_s] = round_state(window[PAST]);
  }
  if (p.seen == nullptr)
    for (int i = 0; i < p.S; i++) {
      const int from = i + p.L - p.S;  // the input, or if negative the old state, that moves here
      state[i * p.state_s] = from >= 0 ? round_state(to_float(x[from * p.x_l])) : state[(from + p.S) * p.state_s];
    }
}
