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
// MIN_BLOCKS, DELTA_FLOAT (delta and its gradient in float32), SOFTPLUS, STEP_ORDER (step t reads row t of delta, B and
// C), GATE (multiply by silu(z)), PARTIAL (write float32 partial results that a second kernel merges).
#include "common.cuh"
#include "scan_shared.cuh"
#include "scan_forward.cuh"
#include "scan_carry.cuh"
#include "scan_backward.cuh"
