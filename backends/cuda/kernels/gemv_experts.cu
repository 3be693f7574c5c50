
// A part of gemv.cu: the experts of a step of up to 32 tokens.

struct Experts {
  const u64* w1;  // address of each expert's matrix
  const u64* w3;
  const u64* w2;
  Matrix up, down;           // shapes and offsets: codes unused
  Matrix shared1, shared3, shared2;
  int up_format, down_format, shared_up_format, shared_down_format;
  int tokens, picks, width;  // of the panel x
  int shared_tiles;          // tiles of 8 tokens that the shared expert has in `hidden`, before the others; 0: not here
  int shared_sets, sets;     // how many sets of rows a block takes
  int shared_blocks, blocks; // blocks of threads for the shared expert, and a tile of chosen ones
  int shared_later;          // blocks of threads that the shared expert has in gate_up, if not in begin_experts
  const int* tile_expert;    // (tiles,): the experts at work, each for up to 8 (token, pick) pairs
  const int* tile_count;     // (tiles,): 0 for none
  const int* tile_pairs;     // (tiles, 8): token * picks + pick
  const float* weights;      // (tokens, picks)
  const uint4* x;            // fp16 panel
  u16* hidden;               // fp16 panels: of the shared expert as wide as x, then of 8 columns, one a tile
  float* out;                // (tokens * picks, D) of the chosen, then (tokens, D) of the shared: to be added
  const int* copies;         // of a layer in two memories (placement/place.cu): how many experts are being
                             // copied, and whether their w1 and w3 are there; else null
  const int* arrived;        // of each expert: 0 while its w2 is being copied
  float limit;
};

__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  gate = fminf(gate, limit);
  up = fminf(fmaxf(up, -limit), limit);
  return gate / (1.f + expf(-gate)) * up;
}

// What a block of threads does: which matrix, for which pairs, which sets of rows.
struct Work {
  bool shared;
  int tile, count, expert, block, sets;
};

// Of a launch whose first `shared` blocks are the shared expert's.
__device__ __forceinline__ bool find_work(const Experts& e, int at, int shared, Work& w) {
  w.shared = at < shared;
  const int block = w.shared ? at : at - shared;
  w.tile = w.shared ? 0 : block / e.blocks;
  w.block = w.shared ? block : block % e.blocks;
  w.sets = w.shared ? e.shared_sets : e.sets;
  w.count = w.shared ? e.tokens : e.tile_count[w.tile];
  w.expert = w.shared ? 0 : e.tile_expert[w.tile];
  return w.count > 0;
}

__device__ __forceinline__ Matrix at(Matrix shape, u64 address) {
  shape.codes = (const u8*)address;
  return shape;
}

// A panel of `hidden`, for as many columns.
__device__ __forceinline__ u16* hidden_of(const Experts& e, const Work& w, int channels, int& width) {
  width = w.shared ? e.width : 8;
  return e.hidden + (w.shared ? 0 : (u64)(e.shared_tiles + w.tile) * channels * 8);
}

// hidden = silu(w1 x) * (w3 x) * weight, in fp16. Warps 0-3 take w1's rows, warps 4-7 w3's.
struct GateUp {
  const Experts& e;
  const Work& w;
  float* room;

  __device__ __forceinline__ Matrix matrix() const {
    const bool gate = threadIdx.x / 32 < 4;
    return w.shared ? (gate ? e.shared1 : e.shared3) : at(e.up, (gate ? e.w1 : e.w3)[w.expert]);
  }

  template <int EACH>
  __device__ __forceinline__ void finish(int rows, int row0, int sets, int first, int pairs) const {
    int width;
    u16* hidden = hidden_of(e, w, rows, width);
    for (int i = threadIdx.x; i < sets * 16 * pairs; i += 32 * WARPS) {
      const int at = i % (sets * 16), c = i / (sets * 16), r = row0 + at;
      if (r >= rows) continue;
      const float* sums = room + (at / 16 * WARPS * 16 + at % 16) * EACH + c;
      float g = 0, u = 0;
      for (int part = 0; part < 4; part++) g += sums[part * 16 * EACH], u += sums[(4 + part) * 16 * EACH];
      float h = swiglu(g, u, e.limit);
      if (!w.shared) h *= e.weights[e.tile_pairs[w.tile * 8 + first + c]];
      hidden[((u64)(r / 8) * width + first + c) * 8 + r % 8] = half_of(h);
    }
  }

#ifdef N
  __device__ __forceinline__ void run_few() const {
    const Matrix m = matrix();
    const int row0 = w.block * w.sets * 16, sets = min(w.sets, (m.rows - row0 + 15) / 16);
    products_few(e.shared_up_format, m, row0, 16, sets, threadIdx.x / 32 % 4, 4, e.x, room);
    finish<8 * TILES>(m.rows, row0, sets, 0, w.count);
  }
#endif

#ifdef PAIRS
  template <int COUPLES> __device__ __forceinline__ void run(int first, int pairs) const {
    const Matrix m = matrix();
    const int row0 = w.block * w.sets * 16, sets = min(w.sets, (m.rows - row0 + 15) / 16);
    const Columns columns = {e.x, e.width, w.shared ? nullptr : e.tile_pairs, e.picks, w.tile * 8 + first, pairs};
    products<COUPLES>(w.shared ? e.shared_up_format : e.up_format, m, row0, 16, sets, threadIdx.x / 32 % 4, 4,
                      columns, room, [&](int set, int sets) {
      finish<COUPLES * WAYS>(m.rows, row0 + set * 16, sets, first, pairs);
    });
  }
#endif
};

// out = w2 hidden, of each pair and of the shared expert: 32 rows at a time.
struct Down {
  const Experts& e;
  const Work& w;
  float* room;

  template <int EACH>
  __device__ __forceinline__ void finish(int rows, int row0, int sets, int first, int pairs) const {
    for (int i = threadIdx.x; i < sets * 32 * pairs; i += 32 * WARPS) {
      const int at = i % (sets * 32), c = i / (sets * 32), r = row0 + at;
      if (r >= rows) continue;
      const float* sums = room + (at / 16 * 4 * 16 + at % 16) * EACH + c;
      float sum = 0;
      for (int part = 0; part < 4; part++) sum += sums[part * 16 * EACH];
      const int pair = w.tile * 8 + first + c, line = w.shared ? e.tokens * e.picks + pair : e.tile_pairs[pair];
      e.out[(u64)line * rows + r] = sum;
    }
  }

#ifdef N
  __device__ __forceinline__ void run_few() const {
    const Matrix& m = e.shared2;
    const int warp = threadIdx.x / 32, row0 = w.block * w.sets * 32, sets = min(w.sets, (m.rows - row0 + 31) / 32);
    products_few(e.shared_down_format, m, row0 + warp / 4 * 16, 32, sets, warp % 4, 4, (const uint4*)e.hidden, room);
    finish<8 * TILES>(m.rows, row0, sets, 0, w.count);
  }
#endif

#ifdef PAIRS
  template <int COUPLES> __device__ __forceinline__ void run(int first, int pairs) const {
    const Matrix m = w.shared ? e.shared2 : at(e.down, e.w2[w.expert]);
    int width;
    const uint4* x = (const uint4*)hidden_of(e, w, m.cols, width);
    const int warp = threadIdx.x / 32, row0 = w.block * w.sets * 32, sets = min(w.sets, (m.rows - row0 + 31) / 32);
    const Columns columns = {x, width, nullptr, 1, first, pairs};
    products<COUPLES>(w.shared ? e.shared_down_format : e.down_format, m, row0 + warp / 4 * 16, 32, sets, warp % 4, 4,
                      columns, room, [&](int set, int sets) {
      finish<COUPLES * WAYS>(m.rows, row0 + set * 32, sets, first, pairs);
    });
  }
#endif
};

// Of several tokens the shared expert's products are those of gemv_few.cu, whose sums take more room.
template <class Part> __device__ __forceinline__ void run(const Experts& e, const Work& w, float* room) {
#ifdef N
#ifdef PAIRS
  if (w.shared) return Part{e, w, (float*)dynamic()}.run_few();
#else
  return Part{e, w, room}.run_few();
#endif
#endif
#ifdef PAIRS
  by_couples(w.count, Part{e, w, room});
#endif
}

// What needs no routing: the router's own product, in the first blocks, and the shared expert's gate and up.
#if ONLY(begin_experts)
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
begin_experts(const __grid_constant__ Segments router, int router_blocks, const __grid_constant__ Experts e) {
  __shared__ float room[LINEARS_ROOM];
  let_next_start();
  Work w;
  if ((int)blockIdx.x < router_blocks) linears_block(router, blockIdx.x, room);
  else if (find_work(e, blockIdx.x - router_blocks, gridDim.x, w)) run<GateUp>(e, w, room);
}
#endif

#ifdef PAIRS

// Whether experts are being copied. Then these kernels begin before that has ended, and wait for what they
// need; what was written before can be read.
__device__ __forceinline__ bool copying(const Experts& e) { return e.copies && e.copies[0]; }

__device__ __forceinline__ void wait_for(const int* flag) {
  if (threadIdx.x == 0)
    while (!ready(flag)) {}
  __syncthreads();
}

// The chosen experts' gate and up, and the shared one's if it was not in begin_experts.
#if ONLY(gate_up)
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) gate_up(const __grid_constant__ Experts e) {
  __shared__ float room[ROOM];
  if (copying(e)) {
    wait_for(e.copies + 1);
  } else {
    wait_for_inputs();
    let_next_start();  // only now: `down` reads the router's plan before it waits
  }
  Work w;
  if (find_work(e, blockIdx.x, e.shared_later, w)) run<GateUp>(e, w, room);
}
#endif

#if ONLY(down)
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) down(const __grid_constant__ Experts e) {
  __shared__ float room[ROOM];
  let_next_start();
  Work w;  // the plan was complete before gate_up let this kernel start
  if (!find_work(e, blockIdx.x, e.shared_tiles ? e.shared_blocks : 0, w)) return;
  if (!w.shared && copying(e)) wait_for(e.arrived + w.expert);
  run<Down>(e, w, room);
}
#endif

#endif
