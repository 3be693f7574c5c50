// What gemm_ptx.cu says in PTX, for cuda_block.cpp.

#define __grid_constant__

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

struct uint4 { u32 x, y, z, w; };
struct uint2 { u32 x, y; };
struct int4 { int x, y, z, w; };
struct int2 { int x, y; };
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

static int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static int2 make_int2(int x, int y) { return {x, y}; }

static u32 __byte_perm(u32 low, u32 high, u32 which) {
    u64 both = (u64)high << 32 | low;
    u32 y = 0;
    for (int i = 0; i < 4; i++) y |= (u32)(both >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
    return y;
}
static u32 __funnelshift_r(u32 low, u32 high, int shift) {
    return ((u64)high << 32 | low) >> shift;
}
static float half_value(u32 bits) {
    _Float16 half;
    u16 low = bits;
    memcpy(&half, &low, 2);
    return half;
}
static u32 two_halves(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
static float high(u32 x) { return half_value(x >> 16); }
static u32 mul2(u32 a, u32 b) { return two_halves(half_value(a) * half_value(b), high(a) * high(b)); }
static u32 sub2(u32 a, u32 b) { return two_halves(half_value(a) - half_value(b), high(a) - high(b)); }
static u32 fma2(u32 a, u32 b, u32 c) {
    return two_halves(half_value(a) * half_value(b) + half_value(c), high(a) * high(b) + high(c));
}
static u32 twice(float x) { return two_halves(x, x); }
static void await_previous_kernel() {}
