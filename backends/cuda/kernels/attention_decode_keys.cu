// A part of attention_decode.cu: arguments, what C++ has no words for, and keys as read.
//
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
