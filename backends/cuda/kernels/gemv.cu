// Decode matrices: a few tokens against quantized weights, on tensor cores.
//
// A warp multiplies 16 rows of weights with up to 8 * NT tokens by mma.m16n8k16: the weights are the
// first operand, unpacked in registers, the tokens are the columns of the second. The order of the
// channels within a block is free as long as both operands agree, so a lane reads 16 bytes (or so)
// of consecutive codes of a row: no repacking, no shared memory, no layout change.
//
//   weights   row-major codes as in the file; value = fp16 * 2^base (qmatrix.py)
//   x         fp16 "panel": element (token n, channel k) at ((k / 8) * N + n) * 8 + k % 8
//
// Sums are fp32: over a warp's share of the channels, then over warps in a fixed order, so that a
// token's result does not depend on what else is in the batch.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

#ifndef NT
#define NT 1  // tiles of 8 tokens
#endif

enum { F16, MXFP8, MXFP4, A2, A3, A4, A5, A6, A8 };

constexpr int WARPS = 8;

// ---- formats: CODES consecutive codes of a row are one lane's share of a block of 4 * CODES

template <int F> struct Format {
  static constexpr int BITS = F == F16 ? 16 : F == MXFP8 || F == A8 ? 8 : F == MXFP4 || F == A4 ? 4
                              : F == A2 ? 2 : F == A3 ? 3 : F == A5 ? 5 : 6;
  static constexpr bool AFFINE = F >= A2;
  static constexpr bool SCALED = F != F16;
  static constexpr int CODES = F == A2 ? 64 : BITS >= 8 ? 16 : 32;
  static constexpr int WORDS = CODES * BITS / 32;
  static constexpr int BLOCK = 4 * CODES;
  static constexpr int AHEAD = F == A2 ? 2 : WORDS > 4 ? 2 : 4;  // blocks in flight a warp
  static constexpr int PAIR = BITS == 4 ? 4 : BITS == 2 ? 8 : 1;  // which codes share a register
};

__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 pick) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(pick));
  return r;
}

__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

__device__ __forceinline__ u32 half2_of(float x) {  // the same value twice
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ u16 half_of(float x) {  // saturating
  u16 r;
  x = fminf(fmaxf(x, -65504.f), 65504.f);
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float power_of_2(int e) { return __int_as_float((e + 127) << 23); }

template <int WORDS> __device__ __forceinline__ void fetch(const u8* p, u32 (&w)[WORDS]) {
  if constexpr (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4)
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(w[i]), "=r"(w[i + 1]), "=r"(w[i + 2]), "=r"(w[i + 3])
                   : "l"(p + 4 * i));
  } else if constexpr (WORDS % 2 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 2)
      asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(w[i]), "=r"(w[i + 1]) : "l"(p + 4 * i));
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(w[i]) : "l"(p + 4 * i));
  }
}

// The j-th 16 codes of a lane's words as 8 registers of two fp16, not yet scaled.
// MXFP4: value * 2^-14; MXFP8: value * 2^-8; affine: code * 2^(-14 - BITS), below the normal range.
template <int F> __device__ __forceinline__ void decode16(const u32* w, int j, u32 (&a)[8]) {
  constexpr int BITS = Format<F>::BITS;
  if constexpr (F == F16) {
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] = w[8 * j + i];
  } else if constexpr (F == MXFP8) {
#pragma unroll
    for (int i = 0; i < 8; i++) {  // bytes to the upper ends; what is below is masked away
      u32 v = prmt(w[4 * j + i / 2], 0, i % 2 ? 0x3222 : 0x1000);
      a[i] = (v & 0x80008000) | ((v >> 1) & 0x3f803f80);
    }
  } else if constexpr (F == MXFP4) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32 v = w[2 * j + i];
      u32 odd = (v & 0x80808080) | ((v >> 3) & 0x0e0e0e0e);
      u32 even = ((v << 4) & 0x80808080) | ((v << 1) & 0x0e0e0e0e);
      a[4 * i] = (even << 8) & 0xff00ff00;
      a[4 * i + 1] = (odd << 8) & 0xff00ff00;
      a[4 * i + 2] = even & 0xff00ff00;
      a[4 * i + 3] = odd & 0xff00ff00;
    }
  } else if constexpr (F == A2) {
#pragma unroll
    for (int i = 0; i < 8; i++)
      a[i] = (i < 4 ? w[j] << (8 - 2 * i) : w[j] >> (2 * i - 8)) & 0x03000300;
  } else if constexpr (F == A4) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      constexpr int AT = 6;
      int from = 4 * (i % 4);
      u32 v = w[2 * j + i / 4];
      a[i] = (from < AT ? v << (AT - from) : v >> (from - AT)) & 0x03c003c0;
    }
  } else if constexpr (F == A8) {
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] = prmt(w[4 * j + i / 2], 0, i % 2 ? 0x4342 : 0x4140) << 2;
  } else {  // 3, 5 or 6 bits: codes cross words
    constexpr int AT = 10 - BITS;
    constexpr u32 MASK = ((1u << BITS) - 1) << AT;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      int from = BITS * (16 * j + 2 * i) - AT;
      u32 v;
      if (from < 0) {
        v = w[0] << -from;
      } else {
        int word = from / 32, shift = from % 32;
        u32 next = word + 1 < Format<F>::WORDS ? w[word + 1] : 0;
        v = shift ? __funnelshift_r(w[word], next, shift) : w[word];
      }
      a[i] = (v & MASK) | ((v << (16 - BITS)) & (MASK << 16));
    }
  }
}

// 16 consecutive channels of a token, in the pairs in which decode16 gives the codes.
template <int PAIR> __device__ __forceinline__ void arrange(const uint4& lo, const uint4& hi, u32 (&b)[8]) {
  u32 x[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
  if constexpr (PAIR == 1) {
#pragma unroll
    for (int i = 0; i < 8; i++) b[i] = x[i];
  } else if constexpr (PAIR == 4) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      int at = 4 * (i / 4) + (i % 4) / 2;
      b[i] = prmt(x[at], x[at + 2], i % 2 ? 0x7632 : 0x5410);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) b[i] = prmt(x[i / 2], x[4 + i / 2], i % 2 ? 0x7632 : 0x5410);
  }
}

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct Matrix {  // one quantized matrix in memory
  const u8* codes;
  int rows, cols, group;
  int scales_at, biases_at, base_at;
};

template <int F> struct Scale {  // of one row's share of a block
  u32 scale, bias;
};

template <int F>
__device__ __forceinline__ Scale<F> fetch_scale(const Matrix& m, int row, int k, bool valid) {
  Scale<F> s{0, 0};
  if constexpr (Format<F>::AFFINE) {
    if (valid) {
      int at = row * (m.cols / m.group) + k / m.group;
      s.scale = ((const u16*)(m.codes + m.scales_at))[at];
      s.bias = ((const u16*)(m.codes + m.biases_at))[at];
    }
  } else if constexpr (Format<F>::SCALED) {
    if (valid) s.scale = m.codes[m.scales_at + row * (m.cols / 32) + k / 32];
  }
  return s;
}

template <int F> __device__ __forceinline__ void prepare(Scale<F>& s, int base) {
  if constexpr (Format<F>::AFFINE) {
    s.scale = half2_of(__int_as_float(s.scale << 16) * power_of_2(14 + Format<F>::BITS - base));
    s.bias = half2_of(__int_as_float(s.bias << 16) * power_of_2(-base));
  } else if constexpr (Format<F>::SCALED) {
    int e = max((int)s.scale - base - 127 + (F == MXFP4 ? 29 : 23), 0);  // 2^(scale - base + 14 or 8)
    s.scale = e << 10 | e << 26;
  }
}

// acc += 16 rows from `row0` x the channels of blocks [first, last), for 8 tokens a tile.
// `column[i]` is this lane's column of x in tile i, or -1 for none: lane l serves column l / 4.
template <int F>
__device__ __forceinline__ void accumulate(const Matrix& m, int row0, int first, int last,
                                           const uint4* x, int n, const int (&column)[NT],
                                           float (&acc)[NT][4]) {
  using T = Format<F>;
  constexpr int U = T::AHEAD;
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const int rows[2] = {min(row0 + lane / 4, m.rows - 1), min(row0 + lane / 4 + 8, m.rows - 1)};
  const int row_bytes = m.cols / 8 * T::BITS;
  const int base = *(const int*)(m.codes + m.base_at);
  for (int block = first; block < last; block += U) {
    u32 words[U][2][T::WORDS];
    Scale<F> scales[U][2];
#pragma unroll
    for (int u = 0; u < U; u++) {
      int k = (block + u) * T::BLOCK + quad * T::CODES;
      bool valid = block + u < last && k < m.cols;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if (valid) {
          fetch(m.codes + (u64)rows[r] * row_bytes + k / 8 * T::BITS, words[u][r]);
        } else {
#pragma unroll
          for (int i = 0; i < T::WORDS; i++) words[u][r][i] = 0;
        }
        scales[u][r] = fetch_scale<F>(m, rows[r], k, valid);
      }
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      int k = (block + u) * T::BLOCK + quad * T::CODES;
      bool valid = block + u < last && k < m.cols;
      prepare<F>(scales[u][0], base);
      prepare<F>(scales[u][1], base);
#pragma unroll
      for (int j = 0; j < T::CODES / 16; j++) {
        u32 a[2][8];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          decode16<F>(words[u][r], j, a[r]);
#pragma unroll
          for (int i = 0; i < 8; i++) {
            if constexpr (T::AFFINE) a[r][i] = fma2(a[r][i], scales[u][r].scale, scales[u][r].bias);
            else if constexpr (T::SCALED) a[r][i] = mul2(a[r][i], scales[u][r].scale);
          }
        }
#pragma unroll
        for (int tile = 0; tile < NT; tile++) {
          uint4 lo = {0, 0, 0, 0}, hi = {0, 0, 0, 0};
          if (valid && column[tile] >= 0) {
            const uint4* p = x + (u64)(k / 8 + 2 * j) * n + column[tile];
            lo = p[0];
            hi = p[n];
          }
          u32 b[8];
          arrange<T::PAIR>(lo, hi, b);
#pragma unroll
          for (int i = 0; i < 8; i += 2)
            mma(acc[tile], a[0][i], a[1][i], a[0][i + 1], a[1][i + 1], b[i], b[i + 1]);
        }
      }
    }
  }
  float factor = power_of_2(base);
#pragma unroll
  for (int tile = 0; tile < NT; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) acc[tile][i] *= factor;
}

// A warp's share `part` of `parts` of a row's channels.
template <int F>
__device__ __forceinline__ void share(const Matrix& m, int row0, int part, int parts, const uint4* x,
                                      int n, const int (&column)[NT], float (&acc)[NT][4]) {
  int blocks = (m.cols + Format<F>::BLOCK - 1) / Format<F>::BLOCK;
  int each = (blocks + parts - 1) / parts;
  accumulate<F>(m, row0, part * each, min(part * each + each, blocks), x, n, column, acc);
}

__device__ __forceinline__ void any_share(int format, const Matrix& m, int row0, int part, int parts,
                                          const uint4* x, int n, const int (&column)[NT],
                                          float (&acc)[NT][4]) {
  switch (format) {
#define CASE(F) case F: share<F>(m, row0, part, parts, x, n, column, acc); break;
    FORMATS(CASE)
#undef CASE
  }
}

// Each warp's 16 x 8 NT sums to shared memory: row, then token.
__device__ __forceinline__ void spill(float* to, const float (&acc)[NT][4]) {
  const int lane = threadIdx.x % 32, row = lane / 4, token = lane % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < NT; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      to[(row + i / 2 * 8) * 8 * NT + tile * 8 + token + i % 2] = acc[tile][i];
}

__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void prefetch(const u8* p, int bytes) {  // into L2; 16-byte granules
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes & ~15));
#endif
}

// ---- several matrices, each with its own input and output

struct Segment {
  Matrix matrix;
  int format;
  int parts;       // over how many warps a row's channels are split: a power of two up to WARPS
  int first_block; // of the grid
  int out_half;    // 1: fp16 panel, 0: fp32 rows
  const uint4* x;
  void* out;
  int out_stride;  // fp32: elements from token to token; fp16: tokens of the panel
};

struct Segments {
  int count, tokens, n, pad;
  Segment each[8];
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
linears(const __grid_constant__ Segments all) {
  __shared__ float sums[WARPS][16 * 8 * NT];
  int which = 0;
  while (which + 1 < all.count && (int)blockIdx.x >= all.each[which + 1].first_block) which++;
  const Segment& s = all.each[which];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int parts = s.parts, tiles = WARPS / parts;
  const int row0 = (blockIdx.x - s.first_block) * tiles * 16;
  const Matrix m = s.matrix;
  let_next_start();
  if (threadIdx.x == 0) {
    int row_bytes = (m.scales_at ? m.scales_at : m.base_at) / m.rows;
    prefetch(m.codes + (u64)row0 * row_bytes, min(tiles * 16, m.rows - row0) * row_bytes);
  }
  wait_for_inputs();
  int column[NT];
#pragma unroll
  for (int i = 0; i < NT; i++) column[i] = i * 8 + lane / 4 < all.tokens ? i * 8 + lane / 4 : -1;
  float acc[NT][4] = {};
  int tile = warp / parts;
  if (row0 + tile * 16 < m.rows)
    any_share(s.format, m, row0 + tile * 16, warp % parts, parts, s.x, all.n, column, acc);
  spill(sums[warp], acc);
  __syncthreads();
  for (int i = threadIdx.x; i < tiles * 16 * 8 * NT; i += 32 * WARPS) {
    // consecutive threads take consecutive rows: the output of a token is contiguous
    int row = i % (tiles * 16), token = i / (tiles * 16);
    if (token >= all.tokens || row0 + row >= m.rows) continue;
    float sum = 0;
    for (int part = 0; part < parts; part++)
      sum += sums[row / 16 * parts + part][row % 16 * 8 * NT + token];
    int r = row0 + row;
    if (s.out_half) ((u16*)s.out)[((u64)(r / 8) * s.out_stride + token) * 8 + r % 8] = half_of(sum);
    else ((float*)s.out)[(u64)token * s.out_stride + r] = sum;
  }
}

// ---- experts

#if NT == 1  // a tile has up to 8 pairs

struct Experts {
  const u64* w1;  // address of each expert's matrix
  const u64* w3;
  const u64* w2;
  Matrix up, down;           // shapes and offsets: codes unused
  Matrix shared1, shared3, shared2;
  int up_format, down_format, shared_up_format, shared_down_format;
  int tokens, n, picks;      // n: tokens of x's panel
  int shared_tiles;          // tiles of 8 tokens for the shared expert; its tiles come first
  const int* tile_expert;    // (tiles,): the experts at work, each for up to 8 (token, pick) pairs
  const int* tile_count;     // (tiles,): 0 for none
  const int* tile_pairs;     // (tiles, 8): token * picks + pick
  const float* weights;      // (tokens, picks)
  const uint4* x;            // fp16 panel
  u16* hidden;               // fp16 panels of 8 columns, one a tile
  float* out;                // (tokens * picks, D) of the chosen, then (tokens, D) of the shared
  float limit;
};

__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  gate = fminf(gate, limit);
  up = fminf(fmaxf(up, -limit), limit);
  return gate / (1.f + expf(-gate)) * up;
}

// Which matrix, and for which pairs, a tile of blockIdx.y is; false if it has nothing to do.
struct Work {
  bool shared;
  int tile, count, expert;
};

__device__ __forceinline__ bool find_work(const Experts& e, int y, Work& w) {
  w.shared = y < e.shared_tiles;
  w.tile = w.shared ? y : y - e.shared_tiles;
  w.count = w.shared ? min(8, e.tokens - 8 * y) : e.tile_count[w.tile];
  w.expert = w.shared ? 0 : e.tile_expert[w.tile];
  return w.count > 0;
}

__device__ __forceinline__ Matrix at(Matrix shape, u64 address) {
  shape.codes = (const u8*)address;
  return shape;
}

// hidden = silu(w1 x) * (w3 x) * weight, in fp16. Warps 0-3 take w1's rows, warps 4-7 w3's.
extern "C" __global__ void __launch_bounds__(32 * WARPS) gate_up(const __grid_constant__ Experts e) {
  __shared__ float sums[WARPS][16 * 8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = blockIdx.x * 16;
  let_next_start();
  wait_for_inputs();
  Work w;
  if (!find_work(e, blockIdx.y, w)) return;
  int slot = lane / 4, column[NT];
  column[0] = slot < w.count ? (w.shared ? w.tile * 8 + slot : e.tile_pairs[w.tile * 8 + slot] / e.picks) : -1;
  float acc[NT][4] = {};
  const bool gate = warp < 4;
  const Matrix m = w.shared ? (gate ? e.shared1 : e.shared3)
                            : at(e.up, (gate ? e.w1 : e.w3)[w.expert]);
  any_share(w.shared ? e.shared_up_format : e.up_format, m, row0, warp % 4, 4, e.x, e.n, column, acc);
  spill(sums[warp], acc);
  __syncthreads();
  const int rows = w.shared ? e.shared1.rows : e.up.rows;
  for (int i = threadIdx.x; i < 16 * 8; i += 32 * WARPS) {
    int row = i % 16, c = i / 16, r = row0 + row;
    if (c >= w.count || r >= rows) continue;
    float g = 0, u = 0;
    for (int part = 0; part < 4; part++) {
      g += sums[part][row * 8 + c];
      u += sums[4 + part][row * 8 + c];
    }
    float h = swiglu(g, u, e.limit);
    if (!w.shared) h *= e.weights[e.tile_pairs[w.tile * 8 + c]];
    e.hidden[(((u64)blockIdx.y * (rows / 8) + r / 8) * 8 + c) * 8 + r % 8] = half_of(h);
  }
}

// out = w2 hidden, of each pair and of the shared expert: 32 rows a block.
extern "C" __global__ void __launch_bounds__(32 * WARPS) down(const __grid_constant__ Experts e) {
  __shared__ float sums[WARPS][16 * 8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = blockIdx.x * 32;
  let_next_start();
  wait_for_inputs();
  Work w;
  if (!find_work(e, blockIdx.y, w)) return;
  const uint4* x = (const uint4*)e.hidden + (u64)blockIdx.y * (e.down.cols / 8) * 8;
  int column[NT];
  column[0] = lane / 4 < w.count ? lane / 4 : -1;
  float acc[NT][4] = {};
  int mine = row0 + warp / 4 * 16;
  const Matrix m = w.shared ? e.shared2 : at(e.down, e.w2[w.expert]);
  if (mine < m.rows)
    any_share(w.shared ? e.shared_down_format : e.down_format, m, mine, warp % 4, 4, x, 8, column, acc);
  spill(sums[warp], acc);
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * 8; i += 32 * WARPS) {
    int row = i % 32, c = i / 32, r = row0 + row;
    if (c >= w.count || r >= e.down.rows) continue;
    float sum = 0;
    for (int part = 0; part < 4; part++) sum += sums[row / 16 * 4 + part][row % 16 * 8 + c];
    int line = w.shared ? e.tokens * e.picks + w.tile * 8 + c : e.tile_pairs[w.tile * 8 + c];
    e.out[(u64)line * e.down.rows + r] = sum;
  }
}

// The sum over a token's experts in the order of its picks, then the shared one: (tokens, D).
extern "C" __global__ void __launch_bounds__(256) combine(const __grid_constant__ Experts e, float* y) {
  let_next_start();
  wait_for_inputs();
  const int d = e.down.rows, i = (blockIdx.x * 256 + threadIdx.x) * 4, token = blockIdx.y;
  if (i >= d) return;
  float4 sum = {0, 0, 0, 0};
  for (int pick = 0; pick <= e.picks; pick++) {
    int line = pick < e.picks ? token * e.picks + pick : e.tokens * e.picks + token;
    float4 v = *(const float4*)(e.out + (u64)line * d + i);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  *(float4*)(y + (u64)token * d + i) = sum;
}
#endif
