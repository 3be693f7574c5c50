// Runs gemm_clusters.cu on the CPU: a cluster of two blocks, a fiber for each thread, which gives way
// wherever it waits. In place of gemm_clusters_ptx.cu. SOURCE names the rest.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include "fibers.h"

using std::max;
using std::min;

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __builtin_assume(x)

constexpr int BLOCK = 32 * WARPS + 128, ALL = 2 * BLOCK;
struct Place { int x, y; };
struct float2 { float x, y; };
static Place threadIdx, blockIdx, gridDim = {2, 1};

static int me() { return blockIdx.x * BLOCK + threadIdx.x; }
static void meet(int group, int all) {
    static std::map<int, int> met, turns;
    int turn = turns[group];
    if (++met[group] == all) met[group] = 0, turns[group]++;
    while (turns[group] == turn) give_way();
}
static void __syncwarp() { meet(me() / 32, 32); }
static void __syncthreads() { meet(1000 + blockIdx.x, BLOCK); }
static void copiers_meet() { meet(3000 + blockIdx.x, 128); }
static void cluster_wait() { meet(2000, ALL); }
static unsigned cluster_rank() { return blockIdx.x; }

static float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
static float __uint_as_float(unsigned x) { return __int_as_float(x); }
#define __expf(x) std::exp(x)
static float __fdividef(float x, float y) { return x / y; }
static unsigned short half_bits(float x) {
    _Float16 half = x;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}
#include "gemm_ptx.h"

#undef THREADS
static u8 memory[2][1 << 20];  // of each block; barriers lie above all stages
static u32 shared_address(const u8*) { return 0; }
static u32 shared_address(const u64*) { return 1 << 19; }

struct Barrier { int arrivals, left, bytes, phase; };
static std::map<u32, Barrier> barriers_of[2];
static void barrier_turn(Barrier& b) {
    if (b.left == 0 && b.bytes == 0) b.left = b.arrivals, b.phase++;
}
static void barrier_init(u32 at, int arrivals) { barriers_of[blockIdx.x][at] = {arrivals, arrivals, 0, 0}; }
static void barriers_are_ready() {}
static void barrier_wait(u32 at, u32 parity) {
    while ((barriers_of[blockIdx.x][at].phase & 1) == (int)parity) give_way();
}
static void barrier_expect(u32 at, int bytes) {
    Barrier& b = barriers_of[blockIdx.x][at];
    b.bytes += bytes, b.left--;
    barrier_turn(b);
}
static void barrier_arrive(u32 at, u32 rank) {
    Barrier& b = barriers_of[rank][at];
    b.left--;
    barrier_turn(b);
}
static void copy_to_both(u32 to, const void* from, int bytes, u32 barrier) {
    for (int rank = 0; rank < 2; rank++) {
        memcpy(memory[rank] + to, from, bytes);
        Barrier& b = barriers_of[rank][barrier];
        b.bytes -= bytes;
        barrier_turn(b);
    }
}
static void prefetch(const void*) {}
template <int N> static void more_registers() {}
template <int N> static void fewer_registers() {}
static void pin(float&) {}
static void pin(u32&) {}
static u16 to_half(float x) { return half_bits(std::fmin(std::fmax(x, -65504.f), 65504.f)); }
static void mma_fence() {}
static void mma_commit() {}
template <int PENDING> static void mma_wait() {}

template <int COUNT> static std::vector<u32> of_warp(const u32* mine) {  // each lane's
    static u32 seen[ALL][COUNT];
    memcpy(seen[me()], mine, sizeof seen[0]);
    __syncwarp();
    u32* first = seen[me() / 32 * 32];
    std::vector<u32> all(first, first + 32 * COUNT);
    __syncwarp();
    return all;
}
static u32 transposed(u32 x) {
    auto all = of_warp<1>(&x);
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    auto at = [&](int row, int col) { return all[row * 4 + col / 2] >> col % 2 * 16 & 0xFFFF; };
    return at(2 * t, g) | at(2 * t + 1, g) << 16;
}
static u64 described(u32 at) { return at / 16; }
template <int N> static void product(float (&d)[N / 2], const u32* a, u64 described) {
    u32 x = described * 16;
    auto all = of_warp<4>(a);
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < N / 2; i++) {
        int row = g + i / 2 % 2 * 8, token = i / 4 * 8 + 2 * t + i % 2;
        for (int k = 0; k < 16; k++) {
            u32 pair = all[(row % 8 * 4 + k % 8 / 2) * 4 + k / 8 * 2 + row / 8];
            int chunk = (int)(x % 128 / 16) + k / 8;
            const u8* at = memory[blockIdx.x] + x / 128 * 128 + token * 128 + (chunk ^ token % 8) * 16;
            u16 input;
            memcpy(&input, at + k % 8 * 2, 2);
            d[i] += half_value(pair >> k % 2 * 16 & 0xFFFF) * half_value(input);
        }
    }
}

#include SOURCE

extern "C" void run(const Matrix* m, const Work* work) {
    body = [=] { experts(*m, *work); };
    run_fibers(ALL, [](int t) { threadIdx = {t % BLOCK, 0}, blockIdx = {t / BLOCK, 0}; });
}
