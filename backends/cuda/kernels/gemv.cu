
// Decode matrices: a few tokens against quantized weights, on tensor cores.
//
// A warp multiplies 16 rows of weights with tokens by mma.m16n8k16: the weights are the first operand,
// unpacked in registers, the tokens are in the columns of the second: 8 of them a product (N,
// gemv_few.cu), or one or two (gemv_pairs.cu). The order of the channels within a block is free as long
// as both operands agree, so a lane reads 16 bytes (or so) of consecutive codes of a row: no repacking,
// no layout change.
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
  int count, tokens, width;  // of the panels x
  Segment each[8];
};

// A block of threads' share of one matrix's products: sets of rows from row0 on.
struct Product {
  const Segment& s;
  const int width, row0, sets;
  float* room;

  // To the output, the sums of some sets from the set-th on: of set, warp, row, and EACH tokens.
  // Consecutive threads take consecutive rows: the output of a token is contiguous.
  template <int EACH> __device__ __forceinline__ void finish(int set, int sets, int tokens) const {
    const int parts = s.parts, step = 16 * WARPS / parts;
    for (int i = threadIdx.x; i < sets * step * tokens; i += 32 * WARPS) {
      const int at = i % (sets * step), c = i / (sets * step), r = row0 + set * step + at, row = at % step;
      if (r >= s.matrix.rows) continue;
      const float* sums = room + ((at / step * WARPS + row / 16 * parts) * 16 + row % 16) * EACH + c;
      float sum = 0;
      for (int part = 0; part < parts; part++) sum += sums[part * 16 * EACH];
      if (s.out_half) ((u16*)s.out)[((u64)(r / 8) * s.out_stride + c) * 8 + r % 8] = half_of(sum);
      else ((float*)s.out)[(u64)c * s.out_stride + r] = sum;
    }
  }

#ifdef N
  __device__ __forceinline__ void run(int tokens) const {
    const int warp = threadIdx.x / 32, parts = s.parts, step = 16 * WARPS / parts;
    products_few(s.format, s.matrix, row0 + warp / parts * 16, step, sets, warp % parts, parts, s.x, room);
    finish<8 * TILES>(0, sets, tokens);
  }
#else
  template <int COUPLES> __device__ __forceinline__ void run(int first, int tokens) const {
    const int warp = threadIdx.x / 32, parts = s.parts, step = 16 * WARPS / parts;
    const Columns columns = {s.x, width, nullptr, 1, first, tokens};
    products<COUPLES>(s.format, s.matrix, row0 + warp / parts * 16, step, sets, warp % parts, parts, columns, room,
                      [&](int set, int sets) { finish<COUPLES * WAYS>(set, sets, tokens); });
  }
#endif
};

__device__ __forceinline__ void linears_block(const Segments& all, int block, float* room) {
  int which = 0;
  while (which + 1 < all.count && block >= all.each[which + 1].first_block) which++;
  const Segment& s = all.each[which];
  const int rows = s.sets * 16 * WARPS / s.parts, row0 = (block - s.first_block) * rows, step = rows / s.sets;
  const int sets = min(s.sets, (s.matrix.rows - row0 + step - 1) / step);
#ifdef N
  Product{s, all.width, row0, sets, room}.run(all.tokens);
#else
  by_couples(all.tokens, Product{s, all.width, row0, sets, room});
#endif
}

#ifdef N
constexpr int LINEARS_ROOM = FEW_ROOM;
#else
constexpr int LINEARS_ROOM = ROOM;
#endif

#if ONLY(linears)
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) linears(const __grid_constant__ Segments all) {
  __shared__ float room[LINEARS_ROOM];
  let_next_start();
  linears_block(all, blockIdx.x, room);
}
#endif
