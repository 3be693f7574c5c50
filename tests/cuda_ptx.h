// What gemv.cu says in PTX, for cuda_block.cpp.

#define __forceinline__ inline
#define __grid_constant__
#define __align__(n)
#define __expf expf

struct uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
using std::fmax;

static unsigned prmt(unsigned a, unsigned b, unsigned pick) {
    unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(bytes >> (pick >> 4 * i & 7) * 8 & 255) << 8 * i;
    return r;
}
static unsigned __funnelshift_r(unsigned low, unsigned high, int shift) {
    return ((unsigned long long)high << 32 | low) >> shift;
}
static float half_value(unsigned bits) {
    _Float16 half;
    unsigned short low = bits;
    memcpy(&half, &low, 2);
    return half;
}
static unsigned two_halves(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
static unsigned mul2(unsigned a, unsigned b) {
    return two_halves(half_value(a) * half_value(b), half_value(a >> 16) * half_value(b >> 16));
}
static unsigned fma2(unsigned a, unsigned b, unsigned c) {
    return two_halves(half_value(a) * half_value(b) + half_value(c),
                      half_value(a >> 16) * half_value(b >> 16) + half_value(c >> 16));
}
static unsigned half2_of(float x) { return two_halves(x, x); }
static unsigned short half_of(float x) { return half_bits(std::fmin(std::fmax(x, -65504.f), 65504.f)); }

static float sum_of_halves(unsigned x) { return half_value(x) + half_value(x >> 16); }

static bool ready(const int* flag) { return *flag; }
static void tell(int* flag) { *flag = 1; }
static float4 read_of_others(const float* at) { return *(const float4*)at; }

static void copy16(uint4* to, const uint4* from) { memcpy(to, from, 16); }
static void end_of_copies() {}
template <int PENDING> static void await_copies() {}
#ifdef WAYS
static void meet_way(int way) {
    static int met[8], turn[8];
    meet(met[way], turn[way], THREADS / WAYS);
}
#endif

constexpr int E4M3 = -8;
static unsigned e4m3_pair(unsigned v) {
    v = prmt(v, 0, 0x1000);
    return (v & 0x80008000) | (v >> 1 & 0x3f803f80);
}

template <int WORDS> static void fetch(const unsigned char* from, unsigned (&words)[WORDS]) {
    memcpy(words, from, 4 * WORDS);
}

template <int BYTES> static unsigned fetch_scale(const unsigned char* from) {
    unsigned scale = 0;
    memcpy(&scale, from, BYTES);
    return scale;
}

template <int V> static void copy(unsigned* to, const unsigned char* from) { memcpy(to, from, 4 * V); }
template <int V> static void read(unsigned* to, const unsigned* from) { memcpy(to, from, 4 * V); }
template <int PENDING> static void arrived() {}
static void commit() {}
static void expect(const unsigned char*) {}

// mma.m16n8k16: lane 4 g + t holds of A rows g and g + 8, columns 2 t and 2 t + 8 and the next, of B
// rows 2 t and 2 t + 8 and the next, column g; of C rows g and g + 8, columns 2 t and the next.
static void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    static float a[THREADS / 32][16][16], b[THREADS / 32][16][8];
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    unsigned as[4] = {a0, a1, a2, a3}, bs[2] = {b0, b1};
    for (int i = 0; i < 8; i++) a[warp][g + i / 2 % 2 * 8][2 * t + i / 4 * 8 + i % 2] = half_value(as[i / 2] >> i % 2 * 16);
    for (int i = 0; i < 4; i++) b[warp][2 * t + i / 2 * 8 + i % 2][g] = half_value(bs[i / 2] >> i % 2 * 16);
    meet_warp();
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) c[i] += a[warp][g + i / 2 * 8][k] * b[warp][k][2 * t + i % 2];
    meet_warp();
}

#ifdef SHARED
static void* dynamic() {
    alignas(128) static char room[SHARED];
    return room;
}
#endif
