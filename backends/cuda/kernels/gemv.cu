
// Decode matrices: a few tokens against quantized weights, on tensor cores.
//
// A warp multiplies 16 rows of weights with TILES * 8 tokens by mma.m16n8k16: the weights are the
// first operand, unpacked in registers, the tokens are the columns of the second. The order of the
// channels within a block is free as long as both operands agree, so a lane reads 16 bytes (or so)
// of consecutive codes of a row: no repacking, no shared memory, no layout change.
//
//   weights   row-major codes as in the file; value = fp16 * 2^base (qmatrix.py)
//   x         fp16 "panel": element (token n, channel k) at ((k / 8) * N + n) * 8 + k % 8
//
// Sums are fp32: over a warp's share of the channels, then over warps in a fixed order, so that a
// token's result does not depend on what else is in the batch.

// ---- several matrices, each with its own input and output

struct Segment {
  Matrix matrix;
  int format;
  int parts;        // over how many warps a row's channels are split: a power of two up to WARPS
  int sets;         // how often a block takes 16 * WARPS / parts rows
  int first_block;  // of the grid
  int out_half;     // 1: fp16 panel, 0: fp32 rows
  int out_stride;   // fp32: elements from token to token; fp16: tokens of the panel
  const uint4* x;
  void* out;
};

struct Segments {
  int count, tokens;
  Segment each[8];
};

#ifdef ONE
constexpr int TILES = 1, COLUMNS = 1, ROOM = 8 * WARPS * 16;  // floats for sums of a block of threads
#else
constexpr int TILES = (N + 7) / 8, COLUMNS = 8, ROOM = 64 * WARPS * 16;
#endif

// A block of threads' share of the products.
__device__ __forceinline__ void linears_block(const Segments& all, int block, float* room) {
  typedef float Sums[WARPS][16 * COLUMNS * TILES];
  Sums* sums = (Sums*)room;
  int which = 0;
  while (which + 1 < all.count && block >= all.each[which + 1].first_block) which++;
  const Segment& s = all.each[which];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int parts = s.parts, step = 16 * WARPS / parts;
  const Matrix& m = s.matrix;
  const int row0 = (block - s.first_block) * s.sets * step;
  const int sets = min(s.sets, (m.rows - row0 + step - 1) / step);
  int column[TILES];
#pragma unroll
  for (int i = 0; i < TILES; i++) column[i] = min(i * 8 + lane / 4, N - 1);
  any_share<N>(s.format, m, row0 + warp / parts * 16, step, sets, warp % parts, parts, s.x, column, sums[0][warp]);
  __syncthreads();
  // consecutive threads take consecutive rows: the output of a token is contiguous
  for (int i = threadIdx.x; i < sets * step * all.tokens; i += 32 * WARPS) {
    const int at = i % (sets * step), token = i / (sets * step), r = row0 + at, row = at % step;
    if (r >= m.rows) continue;
    float sum = 0;
    for (int part = 0; part < parts; part++)
      sum += sums[at / step][row / 16 * parts + part][row % 16 * COLUMNS * TILES + token];
    if (s.out_half) ((u16*)s.out)[((u64)(r / 8) * s.out_stride + token) * 8 + r % 8] = half_of(sum);
    else ((float*)s.out)[(u64)token * s.out_stride + r] = sum;
  }
}

#if ONLY(linears)
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) linears(const __grid_constant__ Segments all) {
  __shared__ float room[ROOM];
  let_next_start();
  linears_block(all, blockIdx.x, room);
}
#endif

// ---- experts

// A tile has up to 8 pairs, of one token one, whatever N is: N only tells how wide the panel x is.

struct Experts {
  const u64* w1;  // address of each expert's matrix
  const u64* w3;
  const u64* w2;
  Matrix up, down;           // shapes and offsets: codes unused
  Matrix shared1, shared3, shared2;
  int up_format, down_format, shared_up_format, shared_down_format;
  int tokens, picks;
  int shared_tiles;          // tiles of 8 tokens for the shared expert; its tiles come first
  int shared_sets, sets;     // how many sets of rows a block takes
  int shared_blocks, blocks; // blocks of threads a tile
  int shared_later;          // blocks of threads that the shared expert has in gate_up, if not in begin_experts
  const int* tile_expert;    // (tiles,): the experts at work, each for up to 8 (token, pick) pairs
  const int* tile_count;     // (tiles,): 0 for none
  const int* tile_pairs;     // (tiles, 8): token * picks + pick
  const float* weights;      // (tokens, picks)
  const uint4* x;            // fp16 panel
  u16* hidden;               // fp16 panels of 8 columns, one a tile
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
  const int each = w.shared ? e.shared_blocks : e.blocks, block = w.shared ? at : at - shared;
  w.tile = block / each;
  w.block = block % each;
  w.sets = w.shared ? e.shared_sets : e.sets;
  w.count = w.shared ? min(8, e.tokens - 8 * w.tile) : e.tile_count[w.tile];
  w.expert = w.shared ? 0 : e.tile_expert[w.tile];
  return w.count > 0;
}

__device__ __forceinline__ Matrix at(Matrix shape, u64 address) {
  shape.codes = (const u8*)address;
  return shape;
}

// hidden = silu(w1 x) * (w3 x) * weight, in fp16. Warps 0-3 take w1's rows, warps 4-7 w3's.
__device__ __forceinline__ void gate_up_block(const Experts& e, const Work& w, float* room) {
  typedef float Sums[WARPS][16 * COLUMNS];
  Sums* sums = (Sums*)room;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slot = min(lane / 4, w.count - 1);
  const int column[1] = {w.shared ? w.tile * 8 + slot : e.tile_pairs[w.tile * 8 + slot] / e.picks};
  const bool gate = warp < 4;
  const Matrix m = w.shared ? (gate ? e.shared1 : e.shared3)
                            : at(e.up, (gate ? e.w1 : e.w3)[w.expert]);
  const int row0 = w.block * w.sets * 16, sets = min(w.sets, (m.rows - row0 + 15) / 16);
  any_share<N>(w.shared ? e.shared_up_format : e.up_format, m, row0, 16, sets, warp % 4, 4, e.x, column,
               sums[0][warp]);
  __syncthreads();
  u16* hidden = e.hidden + (u64)(w.shared ? w.tile : e.shared_tiles + w.tile) * m.rows * 8;
  for (int i = threadIdx.x; i < sets * 16 * w.count; i += 32 * WARPS) {
    const int at = i % (sets * 16), c = i / (sets * 16), r = row0 + at;
    if (r >= m.rows) continue;
    float g = 0, u = 0;
    for (int part = 0; part < 4; part++) {
      g += sums[at / 16][part][at % 16 * COLUMNS + c];
      u += sums[at / 16][4 + part][at % 16 * COLUMNS + c];
    }
    float h = swiglu(g, u, e.limit);
    if (!w.shared) h *= e.weights[e.tile_pairs[w.tile * 8 + c]];
    hidden[(r / 8 * 8 + c) * 8 + r % 8] = half_of(h);
  }
}

// What needs no routing: the router's own product, in the first blocks, and the shared expert's gate and up.
#if ONLY(begin_experts)
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
begin_experts(const __grid_constant__ Segments router, int router_blocks, const __grid_constant__ Experts e) {
  __shared__ float room[ROOM];
  let_next_start();
  Work w;
  if ((int)blockIdx.x < router_blocks) linears_block(router, blockIdx.x, room);
  else if (find_work(e, blockIdx.x - router_blocks, gridDim.x, w)) gate_up_block(e, w, room);
}
#endif

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
  if (find_work(e, blockIdx.x, e.shared_later, w)) gate_up_block(e, w, room);
}
#endif

// out = w2 hidden, of each pair and of the shared expert: 32 rows at a time.
#if ONLY(down)
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) down(const __grid_constant__ Experts e) {
  __shared__ float sums[8][WARPS][16 * COLUMNS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  let_next_start();
  Work w;  // the plan was complete before gate_up let this kernel start
  if (!find_work(e, blockIdx.x, e.shared_tiles * e.shared_blocks, w)) return;
  if (!w.shared && copying(e)) wait_for(e.arrived + w.expert);
  const Matrix m = w.shared ? e.shared2 : at(e.down, e.w2[w.expert]);
  const u16* x = e.hidden + (u64)(w.shared ? w.tile : e.shared_tiles + w.tile) * m.cols * 8;
  const int column[1] = {min(lane / 4, w.count - 1)};
  const int row0 = w.block * w.sets * 32, sets = min(w.sets, (m.rows - row0 + 31) / 32);
  any_share<8>(w.shared ? e.shared_down_format : e.down_format, m, row0 + warp / 4 * 16, 32, sets, warp % 4,
               4, (const uint4*)x, column, sums[0][warp]);
  __syncthreads();
  for (int i = threadIdx.x; i < sets * 32 * w.count; i += 32 * WARPS) {
    const int at = i % (sets * 32), c = i / (sets * 32), r = row0 + at;
    if (r >= m.rows) continue;
    float sum = 0;
    for (int part = 0; part < 4; part++)
      sum += sums[at / 32][at % 32 / 16 * 4 + part][at % 16 * COLUMNS + c];
    int line = w.shared ? e.tokens * e.picks + w.tile * 8 + c : e.tile_pairs[w.tile * 8 + c];
    e.out[(u64)line * m.rows + r] = sum;
  }
}
#endif
