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

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

// Compiled for the formats in use, FORMATS(X); for a panel of N tokens; and, if RAGGED is defined,
// for rows that are no whole number of blocks.

// A kernel is compiled alone, as KERNEL: that takes a quarter of the time.
#define linears_ 1
#define begin_experts_ 2
#define gate_up_ 3
#define down_ 4
#define JOINED(a, b) a##b
#define NUMBER(name) JOINED(name, _)
#ifdef KERNEL
#define ONLY(name) (NUMBER(KERNEL) == JOINED(name, _))
#else
#define ONLY(name) 1
#endif

enum { F16, MXFP8, MXFP4, A2, A3, A4, A5, A6, A8, GROUP128 = 16 };  // affine: groups of 64 or 128

constexpr int WARPS = 8;
#ifndef WIDE4
#define WIDE4 1
#endif
#ifndef ARRANGE
#define ARRANGE true
#endif

// ---- formats: CODES consecutive codes of a row are one lane's share of a block of 4 * CODES

template <int FORMAT> struct Format {
  static constexpr int F = FORMAT % GROUP128;
  static constexpr int BITS = F == F16 ? 16 : F == MXFP8 || F == A8 ? 8 : F == MXFP4 || F == A4 ? 4
                              : F == A2 ? 2 : F == A3 ? 3 : F == A5 ? 5 : 6;
  static constexpr bool AFFINE = F >= A2, SCALED = F != F16;
  static constexpr int GROUP = !AFFINE ? 32 : FORMAT >= GROUP128 ? 128 : 64;
  static constexpr int CODES = F == A2 || (F == MXFP4 && WIDE4) ? 64 : BITS > 8 ? 16 : 32;
  static constexpr int WORDS = CODES * BITS / 32;
  static constexpr int BLOCK = 4 * CODES;
  static constexpr int GROUPS = SCALED && CODES > GROUP ? CODES / GROUP : 1;  // of a lane's share
  static constexpr int AHEAD = WORDS > 4 ? 2 : 4;                 // blocks on their way, a warp
  static constexpr int PAIR = BITS == 4 ? 4 : BITS == 2 ? 8 : 1;  // which codes share a register
};

#ifndef EMULATED  // what C++ has no words for; the tests have them for a CPU

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

// Two FP8 bytes as fp16 * 2^E4M3.
#if __CUDA_ARCH__ >= 890
constexpr int E4M3 = 0;
__device__ __forceinline__ u32 e4m3_pair(u32 v) {
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"((u16)v));
  return r;
}
#else
constexpr int E4M3 = -8;
__device__ __forceinline__ u32 e4m3_pair(u32 v) {
  v = prmt(v, 0, 0x1000);  // bytes to the upper ends; what is below is masked away
  return (v & 0x80008000) | ((v >> 1) & 0x3f803f80);
}
#endif

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
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

#endif

__device__ __forceinline__ float power_of_2(int e) { return __int_as_float((e + 127) << 23); }

// The j-th 16 codes of a lane's words as 8 registers of two fp16, not yet scaled.
// MXFP4: value * 2^-14; MXFP8: value * 2^E4M3; affine: code * 2^(-14 - BITS), below the normal range.
template <int FORMAT> __device__ __forceinline__ void decode16(const u32* w, int j, u32 (&a)[8]) {
  constexpr int F = Format<FORMAT>::F, BITS = Format<FORMAT>::BITS;
  if constexpr (F == F16) {
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] = w[8 * j + i];
  } else if constexpr (F == MXFP8) {
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] = e4m3_pair(w[4 * j + i / 2] >> i % 2 * 16);
  } else if constexpr (F == MXFP4) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32 v = w[2 * j + i];
      u32 odd = (v & 0x80808080) | ((v >> 3) & 0x0e0e0e0e);
      u32 even = ((v << 4) & 0x80808080) | ((v << 1) & 0x0e0e0e0e);
      a[4 * i] = prmt(even, 0, 0x2404);  // byte 0 and 2 to the upper ends of two halves
      a[4 * i + 1] = prmt(odd, 0, 0x2404);
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
        u32 next = word + 1 < Format<FORMAT>::WORDS ? w[word + 1] : 0;
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

// Where channel k lies in a panel that is arranged for a format, as a channel: what the four lanes of
// a row read at once side by side, which the memory next to the threads gives in one go, and in the
// pairs in which decode16 gives the codes.
__device__ __forceinline__ int arranged(int format, int k) {
  const int f = format % GROUP128;
  const int codes = f == A2 || (f == MXFP4 && WIDE4) ? 64 : f == F16 ? 16 : 32;
  const int lane = k / codes % 4, at = k % codes;
  const int place = f == A2 ? at / 16 * 16 + at % 8 * 2 + at / 8 % 2
                    : f == MXFP4 || f == A4 ? at / 8 * 8 + at % 4 * 2 + at / 4 % 2 : at;
  return k / (4 * codes) * (4 * codes) + (place / 8 * 4 + lane) * 8 + place % 8;
}

struct Matrix {  // one quantized matrix in memory
  const u8* codes;
  int rows, cols;
  int scales_at, biases_at, base_at, pad;
};

struct Scale {  // of one row's share of a block
  u32 scale, bias;
};

template <int FORMAT> __device__ __forceinline__ void prepare(Scale& s, int base) {
  using T = Format<FORMAT>;
  if constexpr (T::AFFINE) {
    s.scale = half2_of(__int_as_float(s.scale << 16) * power_of_2(14 + T::BITS - base));
    s.bias = half2_of(__int_as_float(s.bias << 16) * power_of_2(-base));
  } else if constexpr (T::SCALED) {
    int e = max((int)s.scale - base - 127 + 15 - (T::F == MXFP4 ? -14 : E4M3), 0);
    s.scale = e * 0x04000400;  // the exponents of two fp16
  }
}

// One lane's share of a block of two rows, 8 apart.
template <int F> struct Fetched {
  u32 words[2][Format<F>::WORDS];
  Scale scales[2][Format<F>::GROUPS];
};

// Blocks [first, first + count) of 16 rows, then of the 16 rows `step` below, and so on.
template <int F> struct Reader {
  using T = Format<F>;
  const Matrix& m;
  const u8* codes[2];
  const u8* scales[2];
  int row, step, first, count, left;

  __device__ __forceinline__ Reader(const Matrix& m, int row0, int step, int first, int count)
      : m(m), row(row0 + threadIdx.x % 32 / 4), step(step), first(first), count(count) {
    start_rows();
  }

  __device__ __forceinline__ void start_rows() {
    const int k = first * T::BLOCK + threadIdx.x % 4 * T::CODES;
    left = count;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      u32 at = min(row + 8 * r, m.rows - 1);
      codes[r] = m.codes + (u64)at * (m.cols / 8 * T::BITS) + k / 8 * T::BITS;
      scales[r] = m.codes + m.scales_at + (at * (m.cols / T::GROUP) + k / T::GROUP) * (T::AFFINE ? 2 : 1);
    }
  }

  __device__ __forceinline__ void next(Fetched<F>& to) {
    bool inside = true;
#ifdef RAGGED  // lanes beyond a row's end take zeros
    inside = (first + count - left) * T::BLOCK + threadIdx.x % 4 * T::CODES < m.cols;
    if (!inside) to = Fetched<F>{};
#endif
    if (inside) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        fetch(codes[r], to.words[r]);
        const int skipped = T::BLOCK % T::GROUP ? scale_offset() : 0;
        if constexpr (T::AFFINE) {
          to.scales[r][0].scale = *(const u16*)(scales[r] + skipped);
          to.scales[r][0].bias = *(const u16*)(scales[r] + skipped + (m.biases_at - m.scales_at));
        } else if constexpr (T::GROUPS == 2) {
          const u32 both = *(const u16*)scales[r];
          to.scales[r][0].scale = both & 255, to.scales[r][1].scale = both >> 8;
        } else if constexpr (T::SCALED) {
          to.scales[r][0].scale = scales[r][skipped];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      codes[r] += T::BLOCK / 8 * T::BITS;
      scales[r] += T::BLOCK % T::GROUP ? 0 : T::BLOCK / T::GROUP * (T::AFFINE ? 2 : 1);
    }
    if (--left == 0) {
      row += step;
      start_rows();
    }
  }

  // Of a block smaller than a group: from where the row's share began.
  __device__ __forceinline__ int scale_offset() const {
    const int quad = threadIdx.x % 4 * T::CODES, start = first * T::BLOCK + quad;
    return (((first + count - left) * T::BLOCK + quad) / T::GROUP - start / T::GROUP) * 2;
  }
};

// acc += a block of 16 rows x its channels, whose first ones of this lane's columns are at x[tile].
template <int F, int WIDTH, bool ARRANGED, int TILES>
__device__ __forceinline__ void multiply(const u32 (&words)[2][Format<F>::WORDS], Scale (&given)[2][Format<F>::GROUPS],
                                         int base, const uint4* const (&x)[TILES], float (&acc)[TILES][4]) {
  using T = Format<F>;
#pragma unroll
  for (int g = 0; g < T::GROUPS; g++) prepare<F>(given[0][g], base), prepare<F>(given[1][g], base);
#pragma unroll
  for (int j = 0; j < T::CODES / 16; j++) {
    const Scale scales[2] = {given[0][j * 16 * T::GROUPS / T::CODES], given[1][j * 16 * T::GROUPS / T::CODES]};
    u32 a[2][8];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      decode16<F>(words[r], j, a[r]);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if constexpr (T::AFFINE) a[r][i] = fma2(a[r][i], scales[r].scale, scales[r].bias);
        else if constexpr (T::SCALED) a[r][i] = mul2(a[r][i], scales[r].scale);
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      u32 b[8];
      if constexpr (ARRANGED) arrange<1>(x[tile][8 * j * WIDTH], x[tile][(8 * j + 4) * WIDTH], b);
      else arrange<T::PAIR>(x[tile][2 * j * WIDTH], x[tile][(2 * j + 1) * WIDTH], b);
#pragma unroll
      for (int i = 0; i < 8; i += 2)
        mma(acc[tile], a[0][i], a[1][i], a[0][i + 1], a[1][i + 1], b[i], b[i + 1]);
    }
  }
}

// A warp's sums to shared memory: row, then token. Clears them.
template <int TILES>
__device__ __forceinline__ void spill(float* to, float (&acc)[TILES][4], float factor) {
  const int lane = threadIdx.x % 32, row = lane / 4, token = lane % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      to[(row + i / 2 * 8) * 8 * TILES + tile * 8 + token + i % 2] = acc[tile][i] * factor;
      acc[tile][i] = 0;
    }
}

// Several sets of 16 rows, `step` apart, x the channels of blocks [first, first + count), for 8
// tokens a tile; the sums of a set go to sums + set * WARPS * 16 * 8 * TILES. Lane l serves column l / 4 of a
// tile; `column[i]` is that column, in tile i, of a panel x that is WIDTH wide. Blocks, of the next
// set too, are on their way from memory while one is multiplied.
template <int F, int WIDTH, bool ARRANGED, int TILES>
__device__ __forceinline__ void stream(const Matrix& m, int row0, int step, int sets, int first, int count,
                                       const uint4* x, const int (&column)[TILES], float* sums) {
  using T = Format<F>;
  constexpr int U = T::AHEAD;
  const int total = sets * count;
  Reader<F> reader(m, row0, step, first, count);
  Fetched<F> ring[U];
#pragma unroll
  for (int u = 0; u < U; u++)
    if (u < total) reader.next(ring[u]);
  wait_for_inputs();
  const int base = *(const int*)(m.codes + m.base_at);
  float acc[TILES][4] = {};
  if (total == 0)
    for (int set = 0; set < sets; set++) spill(sums + set * WARPS * 16 * 8 * TILES, acc, 0);
  const uint4 *start[TILES], *at[TILES];
#pragma unroll
  for (int i = 0; i < TILES; i++)
    at[i] = start[i] = x + (first * T::BLOCK / 8 + threadIdx.x % 4 * (ARRANGED ? 1 : T::CODES / 8)) * WIDTH + column[i];
  int left = count;
  for (int block = 0; block < total; block += U) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (block + u >= total) break;
#ifdef RAGGED  // lanes beyond a row's end read anything finite: their weights are 0
      if ((first + count - left) * T::BLOCK + threadIdx.x % 4 * T::CODES >= m.cols)
        for (int i = 0; i < TILES; i++) at[i] = x + column[i];
#endif
      multiply<F, WIDTH, ARRANGED>(ring[u].words, ring[u].scales, base, at, acc);
#pragma unroll
      for (int i = 0; i < TILES; i++) at[i] += T::BLOCK / 8 * WIDTH;
      // From 8 tokens on, two at once: neighbours in memory, which it then gives sooner.
      if (N >= 8 && u % 2 && block + u - 1 + U < total) reader.next(ring[u - 1]);
      if ((N < 8 || u % 2) && block + u + U < total) reader.next(ring[u]);
      if (--left == 0) {
        spill(sums, acc, power_of_2(base));
        sums += WARPS * 16 * 8 * TILES;
        left = count;
#pragma unroll
        for (int i = 0; i < TILES; i++) at[i] = start[i];
      }
    }
  }
}

// A warp's share `part` of `parts` of the rows' channels.
template <int F, int WIDTH, bool ARRANGED, int TILES>
__device__ __forceinline__ void share(const Matrix& m, int row0, int step, int sets, int part, int parts,
                                      const uint4* x, const int (&column)[TILES], float* sums) {
  int blocks = (m.cols + Format<F>::BLOCK - 1) / Format<F>::BLOCK;
  int each = (blocks + parts - 1) / parts;
  int first = min(part * each, blocks);
  stream<F, WIDTH, ARRANGED>(m, row0, step, sets, first, min(each, blocks - first), x, column, sums);
}

template <int WIDTH, bool ARRANGED, int TILES>
__device__ __forceinline__ void any_share(int format, const Matrix& m, int row0, int step, int sets, int part,
                                          int parts, const uint4* x, const int (&column)[TILES], float* sums) {
  switch (format) {
#define CASE(F) case F: share<F, WIDTH, ARRANGED>(m, row0, step, sets, part, parts, x, column, sums); break;
    FORMATS(CASE)
#undef CASE
  }
}

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

constexpr int TILES = (N + 7) / 8, ROOM = 64 * WARPS * 16;  // sums of a block of threads

// A block of threads' share of the products.
__device__ __forceinline__ void linears_block(const Segments& all, int block, float* room) {
  typedef float Sums[WARPS][16 * 8 * TILES];
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
  any_share<N, false>(s.format, m, row0 + warp / parts * 16, step, sets, warp % parts, parts, s.x, column, sums[0][warp]);
  __syncthreads();
  // consecutive threads take consecutive rows: the output of a token is contiguous
  for (int i = threadIdx.x; i < sets * step * all.tokens; i += 32 * WARPS) {
    const int at = i % (sets * step), token = i / (sets * step), r = row0 + at, row = at % step;
    if (r >= m.rows) continue;
    float sum = 0;
    for (int part = 0; part < parts; part++)
      sum += sums[at / step][row / 16 * parts + part][row % 16 * 8 * TILES + token];
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

// A tile has up to 8 pairs, whatever N is: N only tells how wide the panel x is.

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
  const int* tile_expert;    // (tiles,): the experts at work, each for up to 8 (token, pick) pairs
  const int* tile_count;     // (tiles,): 0 for none
  const int* tile_pairs;     // (tiles, 8): token * picks + pick
  const float* weights;      // (tokens, picks)
  const uint4* x;            // fp16 panel
  u16* arranged;             // the same for the chosen experts' format
  u16* hidden;               // fp16 panels of 8 columns and hidden_rows channels, one a tile, arranged
  float* out;                // (tokens * picks, D) of the chosen, then (tokens, D) of the shared: to be added
  float limit;
  int hidden_rows, arranging;  // blocks of threads that make `arranged`
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
template <bool CHOSEN> __device__ __forceinline__ void gate_up_block(const Experts& e, const Work& w, float* room) {
  typedef float Sums[WARPS][16 * 8];
  Sums* sums = (Sums*)room;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slot = min(lane / 4, w.count - 1);
  const int column[1] = {w.shared ? w.tile * 8 + slot : e.tile_pairs[w.tile * 8 + slot] / e.picks};
  const bool gate = warp < 4;
  const Matrix m = w.shared ? (gate ? e.shared1 : e.shared3)
                            : at(e.up, (gate ? e.w1 : e.w3)[w.expert]);
  const int row0 = w.block * w.sets * 16, sets = min(w.sets, (m.rows - row0 + 15) / 16);
  any_share<N, CHOSEN && ARRANGE>(CHOSEN ? e.up_format : e.shared_up_format, m, row0, 16, sets, warp % 4, 4,
                       CHOSEN && ARRANGE ? (const uint4*)e.arranged : e.x, column, sums[0][warp]);
  __syncthreads();
  u16* hidden = e.hidden + (u64)(w.shared ? w.tile : e.shared_tiles + w.tile) * e.hidden_rows * 8;
  for (int i = threadIdx.x; i < sets * 16 * w.count; i += 32 * WARPS) {
    const int at = i % (sets * 16), c = i / (sets * 16), r = row0 + at;
    if (r >= m.rows) continue;
    float g = 0, u = 0;
    for (int part = 0; part < 4; part++) {
      g += sums[at / 16][part][at % 16 * 8 + c];
      u += sums[at / 16][4 + part][at % 16 * 8 + c];
    }
    float h = swiglu(g, u, e.limit);
    if (!w.shared) h *= e.weights[e.tile_pairs[w.tile * 8 + c]];
    const int place = ARRANGE ? arranged(CHOSEN ? e.down_format : e.shared_down_format, r) : r;
    hidden[(place / 8 * 8 + c) * 8 + place % 8] = half_of(h);
  }
}

__device__ __forceinline__ void arrange_block(const Experts& e, int block) {
  wait_for_inputs();
  for (int i = block * 32 * WARPS + threadIdx.x; i < e.up.cols / 8 * N; i += e.arranging * 32 * WARPS) {
    const uint4 x = e.x[i];
    const u32 each[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const int place = arranged(e.up_format, i / N * 8 + c);
      e.arranged[(place / 8 * N + i % N) * 8 + place % 8] = (u16)(each[c / 2] >> c % 2 * 16);
    }
  }
}

// What needs no routing: the router's own product, in the first blocks; the shared expert's gate and
// up; and in the last ones the panel for the chosen experts.
#if ONLY(begin_experts)
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
begin_experts(const __grid_constant__ Segments router, int router_blocks, const __grid_constant__ Experts e) {
  __shared__ float room[ROOM];
  let_next_start();
  Work w;
  const int last = (int)gridDim.x - e.arranging;
  if ((int)blockIdx.x < router_blocks) linears_block(router, blockIdx.x, room);
  else if ((int)blockIdx.x >= last) arrange_block(e, blockIdx.x - last);
  else if (find_work(e, blockIdx.x - router_blocks, gridDim.x, w)) gate_up_block<false>(e, w, room);
}
#endif

// The chosen experts' gate and up.
#if ONLY(gate_up)
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) gate_up(const __grid_constant__ Experts e) {
  __shared__ float room[ROOM];
  wait_for_inputs();
  let_next_start();  // only now: `down` reads the router's plan before it waits
  Work w;
  if (find_work(e, blockIdx.x, 0, w)) gate_up_block<true>(e, w, room);
}
#endif

// out = w2 hidden, of each pair and of the shared expert: 32 rows at a time.
#if ONLY(down)
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) down(const __grid_constant__ Experts e) {
  __shared__ float sums[8][WARPS][16 * 8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  let_next_start();
  Work w;  // the plan was complete before gate_up let this kernel start
  if (!find_work(e, blockIdx.x, e.shared_tiles * e.shared_blocks, w)) return;
  const Matrix m = w.shared ? e.shared2 : at(e.down, e.w2[w.expert]);
  const u16* x = e.hidden + (u64)(w.shared ? w.tile : e.shared_tiles + w.tile) * e.hidden_rows * 8;
  const int column[1] = {min(lane / 4, w.count - 1)};
  const int row0 = w.block * w.sets * 32, sets = min(w.sets, (m.rows - row0 + 31) / 32);
  any_share<8, ARRANGE>(w.shared ? e.shared_down_format : e.down_format, m, row0 + warp / 4 * 16, 32, sets, warp % 4,
               4, (const uint4*)x, column, sums[0][warp]);
  __syncthreads();
  for (int i = threadIdx.x; i < sets * 32 * w.count; i += 32 * WARPS) {
    const int at = i % (sets * 32), c = i / (sets * 32), r = row0 + at;
    if (r >= m.rows) continue;
    float sum = 0;
    for (int part = 0; part < 4; part++) sum += sums[at / 32][at % 32 / 16 * 4 + part][at % 16 * 8 + c];
    int line = w.shared ? e.tokens * e.picks + w.tile * 8 + c : e.tile_pairs[w.tile * 8 + c];
    e.out[(u64)line * m.rows + r] = sum;
  }
}
#endif
