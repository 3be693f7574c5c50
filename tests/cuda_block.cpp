// Runs a CUDA kernel on the CPU: a fiber for each thread, which gives way to the next one wherever
// threads meet. Compiled with SOURCE and THREADS defined, and what the source wants: topk.cu VALUES,
// index.cu C, gemv.cu EMULATED, gemm_unpack.cu UNPACK, gemm_tiles.cu FILLED, place.cu PLACEMENT.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "fibers.h"

using std::max;
using std::min;

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct float4 { float x, y, z, w; };
struct Place { int x, y; };
static Place threadIdx, blockIdx, gridDim, blockDim = {THREADS, 1};

static int block_met, block_turn, warp_met[THREADS / 32], warp_turn[THREADS / 32];
static int lanes[THREADS];

static void meet(int& met, int& turn, int all) {
    int now = turn;
    if (++met == all) met = 0, turn++;
    while (turn == now) give_way();
}
static void __syncthreads() { meet(block_met, block_turn, THREADS); }
static void __threadfence() {}
static void meet_warp() { meet(warp_met[threadIdx.x / 32], warp_turn[threadIdx.x / 32], 32); }

template <class To, class From> static To bits(From x) {
    To y;
    memcpy(&y, &x, 4);
    return y;
}
static float __int_as_float(unsigned x) { return bits<float>(x); }
static int __float_as_int(float x) { return bits<int>(x); }
static float __uint_as_float(unsigned x) { return bits<float>(x); }
static unsigned __float_as_uint(float x) { return bits<unsigned>(x); }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static void sincospif(float x, float* sin, float* cos) {
    *sin = std::sin(M_PI * x);
    *cos = std::cos(M_PI * x);
}
static unsigned short half_bits(float x) {
    _Float16 half = x;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}
static int atomicAdd(int* sum, int x) { return (*sum += x) - x; }

static void __syncwarp() { meet_warp(); }

static const int* exchange(int x) {  // what the lanes of this warp hold
    static int seen[THREADS][32];
    int me = threadIdx.x;
    lanes[me] = x;
    meet_warp();
    memcpy(seen[me], lanes + me / 32 * 32, sizeof seen[me]);
    meet_warp();
    return seen[me];
}
template <class T> static T __shfl_sync(unsigned, T x, int lane) {
    return bits<T>(exchange(bits<int>(x))[lane]);
}
template <class T> static T __shfl_up_sync(unsigned all, T x, int step) {
    int lane = threadIdx.x % 32;
    return __shfl_sync(all, x, lane < step ? lane : lane - step);
}
template <class T> static T __shfl_xor_sync(unsigned all, T x, int step) {
    return __shfl_sync(all, x, threadIdx.x % 32 ^ step);
}
static int __reduce_add_sync(unsigned, int x) {
    const int* each = exchange(x);
    return std::accumulate(each, each + 32, 0);
}
static int __reduce_min_sync(unsigned, int x) {
    const int* each = exchange(x);
    return *std::min_element(each, each + 32);
}
static int __reduce_max_sync(unsigned, int x) {
    const int* each = exchange(x);
    return *std::max_element(each, each + 32);
}

#ifdef EMULATED
#include "cuda_ptx.h"
#endif
#if defined(UNPACK) || defined(FILLED)
#include "gemm_ptx.h"
#undef THREADS
#endif
#ifdef PLACEMENT
#define __grid_constant__
struct uint4 { unsigned x, y, z, w; };
#undef THREADS
#endif
#include SOURCE

static void run_blocks(int columns, int rows) {
    gridDim = {columns, rows};
    for (int block = 0; block < columns * rows; block++) {
        blockIdx = {block % columns, block / columns};
        run_fibers(THREADS, [](int t) { threadIdx = {t, 0}; });
    }
}

#ifdef VALUES
extern "C" void run(int columns, int rows, const float* scores, const int* names,
                    const int* positions, float* kept, int* ids, int use, int ratio, int entries,
                    int k, int segment, int stride, int out_stride) {
    body = [=] {
        choose(scores, names, positions, kept, ids, use, ratio, entries, k, segment, stride,
               out_stride);
    };
    run_blocks(columns, rows);
}
#elif defined(EMULATED)
extern "C" void run_linears(int columns, int rows, const Segments* all) {
    body = [=] { linears(*all); };
    run_blocks(columns, rows);
}
#ifndef KERNEL  // not of gemv_staged.cu
extern "C" void run_begin_experts(int columns, int rows, const Segments* router, const int* blocks, const Experts* e) {
    body = [=] { begin_experts(*router, *blocks, *e); };
    run_blocks(columns, rows);
}
#ifdef PAIRS
extern "C" void run_gate_up(int columns, int rows, const Experts* e) {
    body = [=] { gate_up(*e); };
    run_blocks(columns, rows);
}
extern "C" void run_down(int columns, int rows, const Experts* e) {
    body = [=] { down(*e); };
    run_blocks(columns, rows);
}
#endif
#endif
#elif defined(UNPACK)
extern "C" void run(int blocks, const Matrix* m, uint4** out) {
    body = [=] { unpack(*m, *out); };
    run_blocks(blocks, 1);
}
#elif defined(FILLED)
extern "C" void run_plan_tiles(int blocks, const int** order, const int** offsets,
                               const float** weights, const int* experts, int4** tiles, int** pairs,
                               float** shares, int2** groups) {
    body = [=] {
        plan_tiles(*order, *offsets, *weights, *experts, *tiles, *pairs, *shares, *groups);
    };
    run_blocks(blocks, 1);
}
extern "C" void run_fill_tiles(int columns, int rows, const uint4** x, const i64* stride,
                               const int4** tiles, const int** pairs, const int2** groups,
                               const int* choices, const int* width, uint4** out) {
    body = [=] { fill_tiles(*x, *stride, *tiles, *pairs, *groups, *choices, *width, *out); };
    run_blocks(columns, rows);
}
#elif defined(PLACEMENT)
extern "C" void run(const Layer* l, const int* expert, const int* count, int tiles) {
    body = [=] { decide(*l, expert, count, tiles); };
    run_blocks(1, 1);
    body = [=] { fetch(*l); };
    run_blocks(3, 1);
}
#else
extern "C" void run(int columns, int rows, const float* q, const float* weights,
                    const int* positions, const float* freqs, unsigned short* query, float* share,
                    int q_stride, int weights_stride, int heads, int padded, int rotary, int each) {
    body = [=] {
        prepare(q, weights, positions, freqs, query, share, q_stride, weights_stride, heads, padded,
                rotary, each);
    };
    run_blocks(columns, rows);
}
#endif
