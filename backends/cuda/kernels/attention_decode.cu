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

#endif

__device__ __forceinline__ u32 power_of(u8 scale) {
  float x = __uint_as_float((u32)scale << 23);
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

// Which keys a token has: the window's first, newest first, then entries; in tiles of KEYS.
struct Keys {
  int pos, newest, window, entries, window_tiles, tiles;
  const int *ids;

  __device__ Keys(const Args &p, int t) {
    pos = p.pos[t];
    newest = pos % p.size[0];
    window = min(pos + 1, p.window);
    ids = p.n_ids ? p.ids + (u64)t * p.n_ids : nullptr;
    entries = pos < 0 ? 0 : ids ? p.n_ids : p.ratio ? min((pos + 1) / p.ratio, p.size[1]) : 0;
    window_tiles = (window + KEYS - 1) / KEYS;
    tiles = window_tiles + (entries + KEYS - 1) / KEYS;
  }

  // The row of key `k` of a tile, or -1.
  __device__ __forceinline__ int row(const Args &p, int tile, int k) const {
    if (tile < window_tiles) {
      int j = tile * KEYS + k;
      return j >= window ? -1 : j > newest ? newest - j + p.size[0] : newest - j;
    }
    int j = (tile - window_tiles) * KEYS + k;
    return j >= entries ? -1 : ids ? ids[j] : j;
  }
};

struct Raw {  // a lane's 16 channels of NT keys
  uint4 low[NT], high[NT];  // 16 codes; or 16 bf16
  u8 scale[NT];
};

__device__ __forceinline__ void fetch(Raw &raw, const Args &p, const Keys &keys, int tile, u64 slot,
                                      int warp, int lane) {
  int pool = tile >= keys.window_tiles;
  u64 base = slot * (p.size[pool] + 1);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    int row = keys.row(p, tile, n * 8 + lane / 4);
    u64 at = base + row;
    raw.low[n] = raw.high[n] = make_uint4(0, 0, 0, 0);
    raw.scale[n] = 0;
    if (row >= 0 && warp < WARPS - 1) {
      raw.low[n] = *(const uint4 *)(p.codes[pool] + at * PLAIN + warp * 64 + lane % 4 * 16);
      raw.scale[n] = p.scales[pool][at * SCALES + warp];
    } else if (row >= 0) {
      const uint4 *tail = (const uint4 *)(p.tail[pool] + at * 64 + lane % 4 * 16);
      raw.low[n] = tail[0];
      raw.high[n] = tail[1];
    }
  }
}

__device__ __forceinline__ u32 half2_of_bf16(u32 x) {
  return half2_of(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000));
}

// k[n][s]: channels 4 s .. 4 s + 3 of the lane's 16, of key n * 8 + lane / 4
__device__ __forceinline__ void decode(u32 (&k)[NT][4][2], const Raw &raw, int warp) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const u32 *low = (const u32 *)&raw.low[n], *high = (const u32 *)&raw.high[n];
    u32 power = power_of(raw.scale[n]);
#pragma unroll
    for (int s = 0; s < 4; s++) {
      if (warp < WARPS - 1) {
        decode4(low[s], power, k[n][s][0], k[n][s][1]);
      } else {
        k[n][s][0] = half2_of_bf16(s < 2 ? low[2 * s] : high[2 * s - 4]);
        k[n][s][1] = half2_of_bf16(s < 2 ? low[2 * s + 1] : high[2 * s - 3]);
      }
    }
  }
}

struct Shared {
  float scores[WARPS][HEADS][STRIDE];
  u16 weights[HEADS][STRIDE];
  float squares[WARPS][HEADS];
  float fade[HEADS], share[HEADS];
  float2 turn[32];
};

// The query of the block's heads as operand a[i][s], normed and rotated.
__device__ __forceinline__ void query(u32 (&a)[MT][4][4], Shared &shared, const Args &p, int t,
                                      int pos, int warp, int lane) {
  float4 x[MT][2][4];
  const float *from = p.q + (u64)t * p.q_stride + warp * 64 + lane % 4 * 16;
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = i * 16 + r * 8 + lane / 4, head = blockIdx.y * HEADS + row;
      float squares = 0;
#pragma unroll
      for (int s = 0; s < 4; s++) {
        float4 v = make_float4(0, 0, 0, 0);
        if (head < p.heads) v = ((const float4 *)(from + (u64)head * C))[s];
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        x[i][r][s] = v;
      }
      squares += __shfl_xor_sync(~0u, squares, 1);
      squares += __shfl_xor_sync(~0u, squares, 2);
      if (lane % 4 == 0) shared.squares[warp][row] = squares;
    }
  if (warp == 0) shared.turn[lane] = rotation((float)pos * p.freqs[lane]);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float squares = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) squares += shared.squares[w][i * 16 + r * 8 + lane / 4];
      float norm = rsqrtf(squares / C + p.eps);
#pragma unroll
      for (int s = 0; s < 4; s++) {
        float4 v = x[i][r][s];
        if (warp == WARPS - 1) {
          float2 e = shared.turn[lane % 4 * 8 + 2 * s], f = shared.turn[lane % 4 * 8 + 2 * s + 1];
          v = make_float4(v.x * e.x - v.y * e.y, v.x * e.y + v.y * e.x, v.z * f.x - v.w * f.y,
                          v.z * f.y + v.w * f.x);
        }
        a[i][s][r] = half2_of(v.x * norm, v.y * norm);
        a[i][s][r + 2] = half2_of(v.z * norm, v.w * norm);
      }
    }
}

// Scores summed over warps, to weights in shared memory. A thread has 2 keys of rows tid / 16 + ...
constexpr int ROWS_AT_ONCE = 32 * WARPS * 2 / KEYS, ROUNDS = HEADS / ROWS_AT_ONCE;

__device__ __forceinline__ void weigh(Shared &shared, float (&high)[ROUNDS], float (&total)[ROUNDS],
                                      const Args &p, const Keys &keys, int tile) {
  int key = threadIdx.x % (KEYS / 2) * 2;
  bool there[2] = {keys.row(p, tile, key) >= 0, keys.row(p, tile, key + 1) >= 0};
  const float scale = LOG2E * rsqrtf((float)C);
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
    s.x = there[0] ? s.x * scale : NEVER;
    s.y = there[1] ? s.y * scale : NEVER;
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

// grid (splits, blocks of HEADS heads, tokens)
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) attend(Args p) {
  __shared__ Shared shared;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = blockIdx.z, split = blockIdx.x;
  let_next_start();
  wait_for_inputs();
  Keys keys(p, t);
  int each = (keys.tiles + p.splits - 1) / p.splits, tile = split * each;
  int last = min(tile + each, keys.tiles);
  u64 slot = p.slot[t];

  float high[ROUNDS], total[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) high[i] = LOWEST, total[i] = 0;
  float acc[MT][8][4] = {};
  if (tile < last || p.splits == 1) {
    Raw raw;
    fetch(raw, p, keys, tile, slot, warp, lane);
    u32 a[MT][4][4];
    query(a, shared, p, t, keys.pos, warp, lane);
    for (; tile < last; tile++) {
      u32 k[NT][4][2];
      decode(k, raw, warp);
      if (tile + 1 < last) fetch(raw, p, keys, tile + 1, slot, warp, lane);
      store_scores(shared, a, k, warp, lane);
      __syncthreads();
      weigh(shared, high, total, p, keys, tile);
      __syncthreads();
      add_values(acc, shared, k, lane);
    }
  }

#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    int row = i * ROWS_AT_ONCE + threadIdx.x / (KEYS / 2), head = blockIdx.y * HEADS + row;
    if (threadIdx.x % (KEYS / 2) || head >= p.heads) continue;
    if (p.splits > 1) {
      p.stats[((u64)t * p.splits + split) * p.heads + head] = make_float2(high[i], total[i]);
    } else {
      float sink = p.sink[head] * LOG2E, top = fmaxf(high[i], sink), fade = exp2_of(high[i] - top);
      shared.share[row] = fade / (total[i] * fade + exp2_of(sink - top));
    }
  }
  if (p.splits > 1 && total[0] == 0) return;  // no keys
  __syncthreads();
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = i * 16 + r * 8 + lane / 4, head = blockIdx.y * HEADS + row;
      int channel = warp * 64 + lane % 4 * 16;
      if (head >= p.heads) continue;
      float *to = p.part + (((u64)t * p.splits + split) * p.heads + head) * C + channel;
#pragma unroll
      for (int s = 0; s < 4; s++) {
        float(&x)[4] = acc[i][2 * s], (&y)[4] = acc[i][2 * s + 1];
        float4 v = make_float4(x[2 * r], x[2 * r + 1], y[2 * r], y[2 * r + 1]);
        if (p.splits > 1) {
          ((float4 *)to)[s] = v;
        } else {
          float f = shared.share[row];
          v = make_float4(v.x * f, v.y * f, v.z * f, v.w * f);
          const float2 *turn = warp == WARPS - 1 ? &shared.turn[lane % 4 * 8 + 2 * s] : nullptr;
          *(uint2 *)place(p, t, head * C + channel + 4 * s) = finished(v, turn);
        }
      }
    }
}

// The sum of a head's splits, with the sink, for 128 channels a warp. Either a warp for each 128
// channels of a head, grid (heads, tokens); or PARTS warps that share the splits (at least as many) of
// 128 channels, grid (heads * C / 128, tokens).
constexpr int PARTS = 4, SLICES = C / 128, MOST_SPLITS = 64;

extern "C" __global__ void __launch_bounds__(128) combine(Args p, int parts) {
  __shared__ float weights[MOST_SPLITS];
  __shared__ float2 turn[32];
  __shared__ float4 sums[PARTS][32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = blockIdx.y;
  int head = parts > 1 ? blockIdx.x / SLICES : blockIdx.x;
  int slice = parts > 1 ? blockIdx.x % SLICES : warp, channel = slice * 128 + lane * 4;
  let_next_start();
  wait_for_inputs();
  u64 first = (u64)t * p.splits * p.heads + head;
  if (warp == 0) {
    float2 s[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      s[j] = make_float2(LOWEST, 0);
      if (lane + 32 * j < p.splits) s[j] = p.stats[first + (u64)(lane + 32 * j) * p.heads];
    }
    turn[lane] = rotation((float)p.pos[t] * p.freqs[lane]);
    float sink = p.sink[head] * LOG2E, top = fmaxf(fmaxf(s[0].x, s[1].x), sink);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    float w[2] = {exp2_of(s[0].x - top), exp2_of(s[1].x - top)};
    float sum = w[0] * s[0].y + w[1] * s[1].y;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    float share = 1 / (sum + exp2_of(sink - top));
    weights[lane] = s[0].y > 0 ? w[0] * share : 0;
    weights[lane + 32] = s[1].y > 0 ? w[1] * share : 0;
  }
  const float4 *from = (const float4 *)(p.part + first * C + channel);
  u64 stride = (u64)p.heads * (C / 4);
  float4 v = make_float4(0, 0, 0, 0);
  constexpr int AT_ONCE = 8;  // loaded before the weights are known
  for (int s0 = parts > 1 ? warp : 0; s0 < p.splits; s0 += AT_ONCE * parts) {
    float4 x[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (s0 + i * parts < p.splits) x[i] = from[(s0 + i * parts) * stride];
    if (s0 < parts) __syncthreads();
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      float w = s0 + i * parts < p.splits ? weights[s0 + i * parts] : 0;
      if (w == 0) continue;  // nothing was written there
      v.x += w * x[i].x, v.y += w * x[i].y, v.z += w * x[i].z, v.w += w * x[i].w;
    }
  }
  if (parts > 1) {
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
