// Decode attention: one token's heads against its window and entries, split over keys.
//
// A warp has 64 channels of a row: the ones with one scale, or the rotary tail. A lane reads 16
// consecutive codes of a key, which are one operand of QK as they stand: the order of channels is
// free as long as query and key agree. The same registers, transposed 8 x 8 by movmatrix, are the
// operand of PV, so keys never visit shared memory; only scores do, to be summed over warps.
//
//   rows    planes: e4m3 codes (C - 64), E8M0 scales (SCALES), bf16 tail (64); 0 the ring, 1 the pool
//   out     fp16, channel k of token t at (k / 8) * ps + t * ts + k % 8
//   part    fp32 (token, split, head, C) not yet divided; stats (token, split, head): largest logit
//           in powers of two, and sum

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

#ifndef WARPS
#define WARPS 8  // C / 64
#endif
#ifndef MT
#define MT 1  // tiles of 16 heads
#endif
#ifndef RESIDENT
#define RESIDENT 1  // blocks on a multiprocessor
#endif
#ifndef SCALES
#define SCALES 8  // bytes of scales a row
#endif

constexpr int C = 64 * WARPS;
constexpr int PLAIN = C - 64;
constexpr int HEADS = 16 * MT;
constexpr int NT = 4;          // tiles of 8 keys
constexpr int KEYS = 8 * NT;
constexpr int STRIDE = KEYS + 8;  // of a row in shared memory: no bank conflicts
constexpr float LOWEST = -1e30f;
#define NEVER __int_as_float(0xff800000)
constexpr float LOG2E = 1.44269504f;

struct Args {
  const float *q, *freqs, *sink;
  const int *slot, *pos, *ids;
  const u8 *codes[2], *scales[2];
  const u16 *tail[2];
  u16 *out;
  float *part;
  float2 *stats;
  int q_stride, n_ids, size[2], ratio, window, heads, ps, ts, splits;
  float eps;
};

#ifdef __CUDACC__  // a test on the CPU brings its own

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

__device__ __forceinline__ u32 half2_of(float a, float b) {  // a in the low half
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}

__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

__device__ __forceinline__ float exp2_of(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ u32 transposed(u32 x) {
  u32 r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four e4m3 codes as fp16, times two equal powers of two.
__device__ __forceinline__ void decode4(u32 codes, u32 power, u32 &low, u32 &high) {
#if __CUDA_ARCH__ >= 890
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }"
      : "=r"(low), "=r"(high)
      : "r"(codes));
#else  // e4m3 is fp16 with a shorter exponent: shifted in, it is the value times 2^-8
  u32 a = __byte_perm(codes, 0, 0x1404), b = __byte_perm(codes, 0, 0x3424);
  low = mul2(a & 0x80008000 | (a >> 1 & 0x3f803f80), 0x5c005c00);
  high = mul2(b & 0x80008000 | (b >> 1 & 0x3f803f80), 0x5c005c00);
#endif
  low = mul2(low, power);
  high = mul2(high, power);
}

// 16 or 1 or 4 bytes, or zeros (an int: -1) and no access; in program order, without a branch.
__device__ __forceinline__ uint4 load16(const void *from, bool there) {
  uint4 x = make_uint4(0, 0, 0, 0);
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.v4.u32 {%0,%1,%2,%3}, [%4]; }"
               : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
               : "l"(from), "r"((u32)there));
  return x;
}

__device__ __forceinline__ u32 load_byte(const u8 *from, bool there) {
  u32 x = 0;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.u8 %0, [%1]; }"
               : "+r"(x)
               : "l"(from), "r"((u32)there));
  return x;
}

__device__ __forceinline__ int load_int(const int *from, bool there) {
  int x = -1;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.u32 %0, [%1]; }"
               : "+r"(x)
               : "l"(from), "r"((u32)there));
  return x;
}

__device__ __forceinline__ float quotient(float x, float y) { return __fdividef(x, y); }

__device__ __forceinline__ float rsqrt_of(float x) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

#endif

__device__ __forceinline__ u32 power_of(u32 scale) {
  float x = __uint_as_float(scale << 23);
  return half2_of(x, x);
}

// cos and sin of an angle of up to 2^22, exact to float32's last bits.
__device__ __forceinline__ float2 rotation(float angle) {
  float n = rintf(angle * 0.636619772f);
  float x = fmaf(-n, 1.57079637f, angle);  // pi / 2 in three parts; the first product is exact
  x = fmaf(-n, -4.37113883e-8f, x);
  x = fmaf(-n, -1.71512451e-15f, x);
  float xx = x * x;
  float cos = fmaf(xx * xx, fmaf(xx, fmaf(xx, 2.44331571e-5f, -1.38873162e-3f), 4.16666456e-2f),
                   fmaf(xx, -0.5f, 1.f));
  float sin = fmaf(x * xx, fmaf(xx, fmaf(xx, -1.95152959e-4f, 8.33216087e-3f), -1.66666546e-1f), x);
  int quarter = (int)n;
  float a = quarter & 1 ? sin : cos, b = quarter & 1 ? cos : sin;
  return make_float2((quarter + 1) & 2 ? -a : a, quarter & 2 ? -b : b);
}

// Which keys a token has: the window's first, newest first, then entries; in tiles of KEYS. How many
// tiles there are does not depend on the position where entries are named.
struct Keys {
  int newest, window, entries, window_tiles, tiles, ring_size;
  const int *ids;

  __device__ Keys(const Args &p, int t, int pos) {
    ring_size = p.size[0];
    newest = (u32)max(pos, 0) % (u32)ring_size;
    window = min(pos + 1, p.window);
    window_tiles = (p.window + KEYS - 1) / KEYS;
    ids = p.n_ids ? p.ids + (u64)t * p.n_ids : nullptr;
    entries = p.n_ids;
    if (!ids && p.ratio) entries = min((u32)(pos + 1) / (u32)p.ratio, (u32)p.size[1]);
    tiles = window_tiles + (entries + KEYS - 1) / KEYS;
  }

  // Rows of the lane's keys n * 8 + lane / 4 of a tile, -1 for none.
  __device__ __forceinline__ void rows(int (&row)[NT], int tile, int lane) const {
    int j = tile * KEYS + lane / 4, e = j - window_tiles * KEYS;
    if (tile < window_tiles) {
#pragma unroll
      for (int n = 0; n < NT; n++) {
        int back = newest - j - n * 8;
        row[n] = j + n * 8 < window ? back + (back < 0 ? ring_size : 0) : -1;
      }
    } else if (ids) {
#pragma unroll
      for (int n = 0; n < NT; n++) row[n] = load_int(ids + e + n * 8, e + n * 8 < entries);
    } else {
#pragma unroll
      for (int n = 0; n < NT; n++) row[n] = e + n * 8 < entries ? e + n * 8 : -1;
    }
  }
};

struct Raw {  // a lane's 16 channels of NT keys
  uint4 low[NT], high[NT];  // 16 codes; or 16 bf16
  u32 scale[NT];
};

__device__ __forceinline__ void fetch(Raw &raw, const Args &p, const int (&row)[NT], bool pool,
                                      u32 slot, int warp, int lane) {
  u32 base = slot * (pool ? p.size[1] + 1 : p.size[0] + 1);
  if (warp < WARPS - 1) {
    const u8 *codes = (pool ? p.codes[1] : p.codes[0]) + warp * 64 + lane % 4 * 16;
    const u8 *scales = (pool ? p.scales[1] : p.scales[0]) + warp;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      u64 at = base + row[n];
      raw.low[n] = load16(codes + at * PLAIN, row[n] >= 0);
      raw.scale[n] = load_byte(scales + at * SCALES, row[n] >= 0);
    }
  } else {
    const u16 *tail = (pool ? p.tail[1] : p.tail[0]) + lane % 4 * 16;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      u64 at = base + row[n];
      raw.low[n] = load16(tail + at * 64, row[n] >= 0);
      raw.high[n] = load16(tail + at * 64 + 8, row[n] >= 0);
    }
  }
}

__device__ __forceinline__ u32 half2_of_bf16(u32 x) {
  return half2_of(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000));
}

// k[n][s]: channels 4 s .. 4 s + 3 of the lane's 16, of key n * 8 + lane / 4
__device__ __forceinline__ void decode(u32 (&k)[NT][4][2], const Raw &raw, int warp) {
  if (warp < WARPS - 1) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
      u32 power = power_of(raw.scale[n]);
      decode4(raw.low[n].x, power, k[n][0][0], k[n][0][1]);
      decode4(raw.low[n].y, power, k[n][1][0], k[n][1][1]);
      decode4(raw.low[n].z, power, k[n][2][0], k[n][2][1]);
      decode4(raw.low[n].w, power, k[n][3][0], k[n][3][1]);
    }
  } else {
#pragma unroll
    for (int n = 0; n < NT; n++) {
      uint4 low = raw.low[n], high = raw.high[n];
      k[n][0][0] = half2_of_bf16(low.x), k[n][0][1] = half2_of_bf16(low.y);
      k[n][1][0] = half2_of_bf16(low.z), k[n][1][1] = half2_of_bf16(low.w);
      k[n][2][0] = half2_of_bf16(high.x), k[n][2][1] = half2_of_bf16(high.y);
      k[n][3][0] = half2_of_bf16(high.z), k[n][3][1] = half2_of_bf16(high.w);
    }
  }
}

struct Shared {
  float scores[WARPS][HEADS][STRIDE];
  u16 weights[HEADS][STRIDE];
  float squares[WARPS][HEADS];
  float bias[KEYS], fade[HEADS], share[HEADS];
  float2 turn[32];
};

struct Query {  // of the block's heads: the lane's 16 channels of rows lane / 4 and that + 8
  uint4 x[MT][2][4];

  __device__ __forceinline__ void load(const Args &p, int t, int warp, int lane) {
    const float *from = p.q + (u64)t * p.q_stride + warp * 64 + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        int head = blockIdx.y * HEADS + i * 16 + r * 8 + lane / 4;
#pragma unroll
        for (int s = 0; s < 4; s++) x[i][r][s] = load16(from + head * C + 4 * s, head < p.heads);
      }
  }

  static __device__ __forceinline__ float4 floats(uint4 v) {
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                       __uint_as_float(v.w));
  }

  // Normed and rotated, as operand a[i][s].
  __device__ __forceinline__ void finish(u32 (&a)[MT][4][4], Shared &shared, float angle, float eps,
                                         int warp, int lane) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float squares = 0;
#pragma unroll
        for (int s = 0; s < 4; s++) {
          float4 v = floats(x[i][r][s]);
          squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
        squares += __shfl_xor_sync(~0u, squares, 1);
        squares += __shfl_xor_sync(~0u, squares, 2);
        if (lane % 4 == 0) shared.squares[warp][i * 16 + r * 8 + lane / 4] = squares;
      }
    if (warp == 0) shared.turn[lane] = rotation(angle);
    __syncthreads();
    float2 turn[8];  // none for channels that are not rotary
#pragma unroll
    for (int n = 0; n < 8; n++) turn[n] = make_float2(1, 0);
    if (warp == WARPS - 1) {
#pragma unroll
      for (int n = 0; n < 8; n++) turn[n] = shared.turn[lane % 4 * 8 + n];
    }
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float squares = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) squares += shared.squares[w][i * 16 + r * 8 + lane / 4];
        float norm = rsqrt_of(squares / C + eps);
#pragma unroll
        for (int s = 0; s < 4; s++) {
          float4 v = floats(x[i][r][s]);
          float2 e = turn[2 * s], f = turn[2 * s + 1];
          a[i][s][r] = half2_of((v.x * e.x - v.y * e.y) * norm, (v.x * e.y + v.y * e.x) * norm);
          a[i][s][r + 2] = half2_of((v.z * f.x - v.w * f.y) * norm, (v.z * f.y + v.w * f.x) * norm);
        }
      }
  }
};

// Scores summed over warps, to weights in shared memory. A thread has 2 keys of rows tid / 16 + ...
constexpr int ROWS_AT_ONCE = 32 * WARPS * 2 / KEYS, ROUNDS = HEADS / ROWS_AT_ONCE;

__device__ __forceinline__ void weigh(Shared &shared, float (&high)[ROUNDS], float (&total)[ROUNDS],
                                      float scale) {
  int key = threadIdx.x % (KEYS / 2) * 2;
  float2 bias = *(const float2 *)&shared.bias[key];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    int row = i * ROWS_AT_ONCE + threadIdx.x / (KEYS / 2);
    float2 s = make_float2(0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      float2 v = *(const float2 *)&shared.scores[w][row][key];
      s.x += v.x;
      s.y += v.y;
    }
    s.x = s.x * scale + bias.x;
    s.y = s.y * scale + bias.y;
    float top = fmaxf(s.x, s.y);
#pragma unroll
    for (int d = 1; d < KEYS / 2; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    top = fmaxf(top, high[i]);
    s.x = exp2_of(s.x - top);
    s.y = exp2_of(s.y - top);
    float sum = s.x + s.y;
#pragma unroll
    for (int d = 1; d < KEYS / 2; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    float fade = exp2_of(high[i] - top);
    total[i] = total[i] * fade + sum;
    high[i] = top;
    *(u32 *)&shared.weights[row][key] = half2_of(s.x, s.y);
    if (key == 0) shared.fade[row] = fade;
  }
}

__device__ __forceinline__ void store_scores(Shared &shared, const u32 (&a)[MT][4][4],
                                             const u32 (&k)[NT][4][2], int warp, int lane) {
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float d[4] = {0, 0, 0, 0};
#pragma unroll
      for (int s = 0; s < 4; s++) mma(d, a[i][s], k[n][s][0], k[n][s][1]);
      float *to = &shared.scores[warp][i * 16 + lane / 4][n * 8 + lane % 4 * 2];
      *(float2 *)to = make_float2(d[0], d[1]);
      *(float2 *)(to + 8 * STRIDE) = make_float2(d[2], d[3]);
    }
}

// acc[i][2 s + h]: channels 4 s + 2 h, + 1 of the lane's 16, heads lane / 4 and that + 8 of tile i
__device__ __forceinline__ void add_values(float (&acc)[MT][8][4], const Shared &shared,
                                           const u32 (&k)[NT][4][2], int lane) {
  u32 p[MT][NT / 2][4];
#pragma unroll
  for (int i = 0; i < MT; i++) {
    int row = i * 16 + lane / 4;
    float fade = shared.fade[row], fade8 = shared.fade[row + 8];
#pragma unroll
    for (int n = 0; n < 8; n++) {
      acc[i][n][0] *= fade, acc[i][n][1] *= fade;
      acc[i][n][2] *= fade8, acc[i][n][3] *= fade8;
    }
#pragma unroll
    for (int s = 0; s < NT / 2; s++)
#pragma unroll
      for (int r = 0; r < 4; r++)
        p[i][s][r] = *(const u32 *)&shared.weights[row + r % 2 * 8][s * 16 + r / 2 * 8 + lane % 4 * 2];
  }
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int s = 0; s < NT / 2; s++) {
      u32 b0 = transposed(k[2 * s][n / 2][n % 2]), b1 = transposed(k[2 * s + 1][n / 2][n % 2]);
#pragma unroll
      for (int i = 0; i < MT; i++) mma(acc[i][n], p[i][s], b0, b1);
    }
}

// Four channels, rotated back if they are rotary, as fp16.
__device__ __forceinline__ uint2 finished(float4 v, const float2 *turn) {
  if (turn) {
    float2 e = turn[0], f = turn[1];
    v = make_float4(v.x * e.x + v.y * e.y, v.y * e.x - v.x * e.y, v.z * f.x + v.w * f.y,
                    v.w * f.x - v.z * f.y);
  }
  constexpr float MOST = 65504;
  v.x = fminf(fmaxf(v.x, -MOST), MOST), v.y = fminf(fmaxf(v.y, -MOST), MOST);
  v.z = fminf(fmaxf(v.z, -MOST), MOST), v.w = fminf(fmaxf(v.w, -MOST), MOST);
  return make_uint2(half2_of(v.x, v.y), half2_of(v.z, v.w));
}

__device__ __forceinline__ u16 *place(const Args &p, int t, int channel) {
  return p.out + (u64)(channel / 8) * p.ps + (u64)t * p.ts + channel % 8;
}

template <bool SPLIT>
__device__ __forceinline__ void finish(const Args &p, Shared &shared, const float (&acc)[MT][8][4],
                                       const float (&high)[ROUNDS], const float (&total)[ROUNDS],
                                       int t, int warp, int lane) {
  u32 first = (t * p.splits + blockIdx.x) * p.heads + blockIdx.y * HEADS;  // of split sums
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    int row = i * ROWS_AT_ONCE + threadIdx.x / (KEYS / 2), head = blockIdx.y * HEADS + row;
    if (threadIdx.x % (KEYS / 2) || head >= p.heads) continue;
    if (SPLIT) {
      p.stats[first + row] = make_float2(high[i], total[i]);
    } else {
      float sink = p.sink[head] * LOG2E, top = fmaxf(high[i], sink), fade = exp2_of(high[i] - top);
      shared.share[row] = quotient(fade, total[i] * fade + exp2_of(sink - top));
    }
  }
  if (SPLIT && total[0] == 0) return;  // no keys, for no head
  if (!SPLIT) __syncthreads();
  int channel = warp * 64 + lane % 4 * 16;
  const float2 *turn = warp == WARPS - 1 ? &shared.turn[lane % 4 * 8] : nullptr;
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = i * 16 + r * 8 + lane / 4, head = blockIdx.y * HEADS + row;
      if (head >= p.heads) continue;
      float4 *to = (float4 *)(p.part + (u64)(first + row) * C + channel);
#pragma unroll
      for (int s = 0; s < 4; s++) {
        const float(&x)[4] = acc[i][2 * s], (&y)[4] = acc[i][2 * s + 1];
        float4 v = make_float4(x[2 * r], x[2 * r + 1], y[2 * r], y[2 * r + 1]);
        if (SPLIT) {
          to[s] = v;
        } else {
          float f = shared.share[row];
          v = make_float4(v.x * f, v.y * f, v.z * f, v.w * f);
          *(uint2 *)place(p, t, head * C + channel + 4 * s) = finished(v, turn ? turn + 2 * s : 0);
        }
      }
    }
}

// Tiles blockIdx.x, blockIdx.x + splits, ... of a token's keys; grid (splits, blocks of heads, tokens).
template <bool SPLIT> __device__ __forceinline__ void attend(const Args &p) {
  __shared__ Shared shared;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = blockIdx.z, tile = blockIdx.x;
  wait_for_inputs();
  let_next_start();
  int pos = p.pos[t];
  u32 slot = p.slot[t];
  float freq = p.freqs[lane];
  Query query;
  query.load(p, t, warp, lane);
  Keys keys(p, t, pos);

  float high[ROUNDS], total[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) high[i] = LOWEST, total[i] = 0;
  float acc[MT][8][4] = {};
  if (tile < keys.tiles || !SPLIT) {
    int row[NT], next[NT];
    Raw raw;
    keys.rows(row, tile, lane);
    fetch(raw, p, row, tile >= keys.window_tiles, slot, warp, lane);
    keys.rows(next, tile + p.splits, lane);
    u32 a[MT][4][4];
    query.finish(a, shared, (float)pos * freq, p.eps, warp, lane);
    const float scale = LOG2E * rsqrt_of((float)C);
    for (; tile < keys.tiles; tile += p.splits) {
      u32 k[NT][4][2];
      decode(k, raw, warp);
      if (threadIdx.x < 32 && lane % 4 == 0) {
#pragma unroll
        for (int n = 0; n < NT; n++) shared.bias[n * 8 + lane / 4] = row[n] < 0 ? NEVER : 0;
      }
#pragma unroll
      for (int n = 0; n < NT; n++) row[n] = next[n];
      fetch(raw, p, row, tile + p.splits >= keys.window_tiles, slot, warp, lane);
      keys.rows(next, tile + 2 * p.splits, lane);
      store_scores(shared, a, k, warp, lane);
      __syncthreads();
      weigh(shared, high, total, scale);
      __syncthreads();
      add_values(acc, shared, k, lane);
    }
  }
  finish<SPLIT>(p, shared, acc, high, total, t, warp, lane);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) attend_split(const Args p) {
  attend<true>(p);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) attend_whole(const Args p) {
  attend<false>(p);
}

// The sum of a head's splits, with the sink, 128 channels a warp. With PARTS 1 a block has a head, a
// warp for each 128 channels: grid (heads, tokens). With more, PARTS warps share the splits of 128
// channels: grid (heads * C / 128, tokens).
constexpr int SLICES = C / 128, MOST_SPLITS = 64;

template <int PARTS> __device__ __forceinline__ void combine(const Args &p) {
  __shared__ float weights[MOST_SPLITS];
  __shared__ float2 turn[32];
  __shared__ float4 sums[PARTS][32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = blockIdx.y;
  int head = PARTS > 1 ? blockIdx.x / SLICES : blockIdx.x;
  int slice = PARTS > 1 ? blockIdx.x % SLICES : warp, channel = slice * 128 + lane * 4;
  wait_for_inputs();
  let_next_start();
  u32 first = t * p.splits * p.heads + head;
  if (warp == 0) {
    float2 s[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      s[j] = make_float2(LOWEST, 0);
      if (lane + 32 * j < p.splits) s[j] = p.stats[first + (lane + 32 * j) * p.heads];
    }
    turn[lane] = rotation((float)p.pos[t] * p.freqs[lane]);
    float sink = p.sink[head] * LOG2E, top = fmaxf(fmaxf(s[0].x, s[1].x), sink);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    float w[2] = {exp2_of(s[0].x - top), exp2_of(s[1].x - top)};
    float sum = w[0] * s[0].y + w[1] * s[1].y;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    float share = quotient(1, sum + exp2_of(sink - top));
    weights[lane] = s[0].y > 0 ? w[0] * share : 0;
    weights[lane + 32] = s[1].y > 0 ? w[1] * share : 0;
  }
  float4 v = make_float4(0, 0, 0, 0);
  constexpr int AT_ONCE = 8;  // loaded before the weights are known
  for (int s0 = 0; s0 < p.splits; s0 += AT_ONCE * PARTS) {
    uint4 x[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      int s = s0 + i * PARTS + warp % PARTS;
      x[i] = load16(p.part + (u64)(first + s * p.heads) * C + channel, s < p.splits);
    }
    if (s0 == 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      int s = s0 + i * PARTS + warp % PARTS;
      float w = s < MOST_SPLITS ? weights[s] : 0;
      float4 y = Query::floats(x[i]);
      v.x += w ? w * y.x : 0, v.y += w ? w * y.y : 0;  // where it is 0 nothing was written
      v.z += w ? w * y.z : 0, v.w += w ? w * y.w : 0;
    }
  }
  if (PARTS > 1) {
    sums[warp][lane] = v;
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int w = 1; w < PARTS; w++) {
      float4 x = sums[w][lane];
      v.x += x.x, v.y += x.y, v.z += x.z, v.w += x.w;
    }
  }
  const float2 *back = channel >= PLAIN ? &turn[(channel - PLAIN) / 2] : nullptr;
  *(uint2 *)place(p, t, head * C + channel) = finished(v, back);
}

extern "C" __global__ void __launch_bounds__(32 * SLICES) combine_slices(const Args p) {
  combine<1>(p);
}

extern "C" __global__ void __launch_bounds__(128) combine_parts(const Args p) { combine<4>(p); }
