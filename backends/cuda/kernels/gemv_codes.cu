// A part of gemv.cu: packed codes, and what C++ has no words for.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

// Compiled for the formats in use, FORMATS(X); if RAGGED is defined, for rows that are no whole number
// of blocks. With N for a panel of N tokens (gemv_few.cu: formats FEW_FORMATS(X)). With PAIRS for one token (1)
// or up to PAIRS pairs at a time (gemv_pairs.cu), of up to MOST channels, WIDER4 and WIDER2 being 1 if rows are
// multiples of 64 and of 128. With both the shared expert is multiplied as the former, chosen ones as the latter.

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

#if defined(KERNEL) && ONLY(gate_up)
constexpr bool WAITS = false;  // it has what it needs, and may have to begin before others have ended
#else
constexpr bool WAITS = true;
#endif

enum { F16, MXFP8, MXFP4, A2, A3, A4, A5, A6, A8, GROUP128 = 16, NARROW = 32 };  // affine: groups of 64 or 128

constexpr int WARPS = 8;
#ifndef PAIRS
#define WIDER4 0
#define WIDER2 0
#endif

// ---- formats: CODES consecutive codes of a row are one lane's share of a block of 4 * CODES

template <int FORMAT> struct Format {
  static constexpr int F = FORMAT % GROUP128;
  static constexpr int BITS = F == F16 ? 16 : F == MXFP8 || F == A8 ? 8 : F == MXFP4 || F == A4 ? 4
                              : F == A2 ? 2 : F == A3 ? 3 : F == A5 ? 5 : 6;
  static constexpr bool AFFINE = F >= A2, SCALED = F != F16;
  static constexpr int GROUP = !AFFINE ? 32 : FORMAT & GROUP128 ? 128 : 64;
  // Wider shares: fewer lines of memory for a load to look up.
  static constexpr int WIDE4 = FORMAT & NARROW ? 0 : WIDER4, WIDE2 = FORMAT & NARROW ? 0 : WIDER2;
  static constexpr int CODES = F == A2 ? 64 << WIDE2 : F == MXFP4 || F == A6 ? 32 << WIDE4 : BITS > 8 ? 16 : 32;
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

// How the L1 keeps codes. A lane's 32 bytes are two loads that take turns in the same sectors of memory: were what
// the first brings not kept until the second, it would come twice. Where many share x there, codes push out less
// of it if they go first; the experts of several tokens are faster if they do not.
#if !defined(PAIRS) || PAIRS == 1
#define KEEP ".L1::evict_first"
#else
#define KEEP ""
#endif

template <int WORDS> __device__ __forceinline__ void fetch(const u8* p, u32 (&w)[WORDS]) {
  if constexpr (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4)
      asm volatile("ld.global.nc" KEEP ".v4.u32 {%0,%1,%2,%3}, [%4];"
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

// As many bytes, zeros above them. Not a C++ load: that would convert, and so wait, at once.
template <int BYTES> __device__ __forceinline__ u32 fetch_scale(const u8* p) {
  u32 r;
  if constexpr (BYTES == 4) asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(r) : "l"(p));
  else if constexpr (BYTES == 2) asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(r) : "l"(p));
  else asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(r) : "l"(p));
  return r;
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

__device__ __forceinline__ float sum_of_halves(u32 x) {
  float lo, hi;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
      : "=f"(lo), "=f"(hi)
      : "r"(x));
  return lo + hi;
}

__device__ __forceinline__ void* dynamic() {  // shared memory that the launch asks for
  extern __shared__ uint4 room[];
  return room;
}

// Whether another kernel has set a flag; what it wrote before can then be read.
__device__ __forceinline__ bool ready(const int* flag) {
  int set;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(set) : "l"(flag) : "memory");
  return set;
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
