// The inputs of a warp's next piece while it walks another. See tile_walk.cuh and kernels/README.md.
//
// With STAGED they are copied to shared memory, past the first-level cache: beside a tile of 200 KB that cache has 28 KB, and
// a load of a 32-byte sector holds a line of 128 bytes of it until it arrives, so that few would be under way. Needs rows of
// u and delta that are multiples of 16 bytes. Without STAGED they wait in registers.
#pragma once

#if STAGED
// A piece's rows of u or delta: PARTS lanes copy a row.
template <class T> struct Rows {
  static constexpr int PARTS = TILE_CHANNELS * (int)sizeof(T) / 16;
  static constexpr int ROUNDS = (PIECE * PARTS + 31) / 32;
  static constexpr int BYTES = PIECE * PARTS * 16;
  const T* from;
  char* to;
  __device__ __forceinline__ void enter(const TileArgs& p, const Seat& at, const T* image, char* shared) {
    const int channel = at.tile * TILE_CHANNELS + at.lane % PARTS * (16 / (int)sizeof(T));
    from = image + (channel < p.channels ? channel : 0);
    to = shared;
  }
  template <class RowOf> __device__ __forceinline__ void copy(const Seat& at, int k, int k_stride, int l_stride, RowOf row) const {
    const T* from_k = direction(from, k, k_stride);
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
      const int part = i * 32 + at.lane, step = part / PARTS;
      if (PIECE * PARTS % 32 == 0 || step < PIECE) copy_16(to + part * 16, row_of(from_k, row(step), l_stride));
    }
  }
  __device__ __forceinline__ const T* of(const Seat& at, int j) const {
    return (const T*)to + (at.chunk * STEPS + j) * TILE_CHANNELS + at.column;
  }
};

struct Ahead {
  static constexpr int WORDS = (Rows<act_t>::BYTES + Rows<delta_t>::BYTES) / 4;
  Rows<act_t> u;
  Rows<delta_t> delta;
  __device__ __forceinline__ void enter(const TileArgs& p, const Seat& at, float* shared) {
    char* mine = (char*)(shared + at.warp * WORDS);
    u.enter(p, at, p.u + at.b * p.u_b, mine);
    delta.enter(p, at, p.delta + at.b * p.delta_b, mine + Rows<act_t>::BYTES);
  }
  // Needs the place's tokens in the warp's shared memory, and that all lanes have taken the rows before.
  __device__ __forceinline__ void load(const TileArgs& p, const Seat& at, const Common& common, Place to, int turn) const {
    const auto token = [&](int step) { return common.token_at(turn, step); };
    delta.copy(at, to.k, p.delta_k, p.delta_l, [&](int step) { return row_read(token(step), to.first() + step); });
    u.copy(at, to.k, p.u_k, p.u_l, [&](int step) { return row_seen(token(step)); });
  }
  __device__ __forceinline__ Inputs<false> take(const Seat& at) const {
    Inputs<false> inputs;
    wait_for_copies();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      inputs.delta[j] = load_delta<VEC>(delta.of(at, j));
      inputs.u[j] = load_raw<VEC>(u.of(at, j));
    }
    return inputs;
  }
};
#else
struct Ahead {
  static constexpr int WORDS = 0;
  Bases bases;
  Inputs<false> held;
  __device__ __forceinline__ void enter(const TileArgs& p, const Seat& at, float*) { bases.enter(p, at); }
  __device__ __forceinline__ void load(const TileArgs& p, const Seat& at, const Common& common, Place to, int turn) {
    int token[SLOTS];
    common.tokens(at, turn, token);
    held.load(p, at, bases, to, token);
  }
  __device__ __forceinline__ Inputs<false> take(const Seat&) const { return held; }
};
#endif
