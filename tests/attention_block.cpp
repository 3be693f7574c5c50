// Runs the kernels of attention_decode.cu on the CPU: a fiber for each CUDA thread, which gives way
// to the next one wherever threads meet, and the tensor core's products from their definition.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "fibers.h"

using std::max;
using std::min;

#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Place { int x, y, z; };
static Place threadIdx, blockIdx;
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

constexpr int MOST_THREADS = 128;
static int threads, block_met, block_turn, warp_met[MOST_THREADS / 32], warp_turn[MOST_THREADS / 32];

static void meet(int &met, int &turn, int all) {
  int now = turn;
  if (++met == all) met = 0, turn++;
  while (turn == now) give_way();
}
static void __syncthreads() { meet(block_met, block_turn, threads); }
static void meet_warp() { meet(warp_met[threadIdx.x / 32], warp_turn[threadIdx.x / 32], 32); }

template <class To, class From> static To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
static float __int_as_float(unsigned x) { return bits<float>(x); }
static float __uint_as_float(unsigned x) { return bits<float>(x); }
static float rsqrtf(float x) { return 1 / std::sqrt(x); }
static float exp2_of(float x) { return std::exp2(x); }

static unsigned half2_of(float a, float b) {
  return bits<unsigned short>((_Float16)a) | bits<unsigned short>((_Float16)b) << 16;
}
static float half_of(unsigned x, int i) { return bits<_Float16>((unsigned short)(x >> 16 * i)); }

static void decode4(unsigned codes, unsigned power, unsigned &low, unsigned &high) {
  float x[4];
  for (int i = 0; i < 4; i++) {
    int code = codes >> 8 * i & 255, exponent = code >> 3 & 15, mantissa = code & 7;
    x[i] = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    if ((code & 127) == 127) x[i] = NAN;
    x[i] *= (code & 128 ? -1 : 1) * half_of(power, 0);
  }
  low = half2_of(x[0], x[1]);
  high = half2_of(x[2], x[3]);
}

template <int N> struct Words { unsigned x[N]; };
template <int N> static const Words<N> *exchange(Words<N> mine) {  // what this warp's lanes hold
  static Words<N> lanes[MOST_THREADS], seen[MOST_THREADS][32];
  int me = threadIdx.x;
  lanes[me] = mine;
  meet_warp();
  memcpy(seen[me], lanes + me / 32 * 32, sizeof seen[me]);
  meet_warp();
  return seen[me];
}
static float __shfl_xor_sync(unsigned, float x, int step) {
  return bits<float>(exchange<1>({bits<unsigned>(x)})[threadIdx.x % 32 ^ step].x[0]);
}
static unsigned transposed(unsigned x) {
  auto all = exchange<1>({x});
  int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  auto at = [&](int i, int j) { return all[i * 4 + j / 2].x[0] >> j % 2 * 16 & 0xffff; };
  return at(column, row) | at(column + 1, row) << 16;
}
static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  auto all = exchange<6>({{a[0], a[1], a[2], a[3], b0, b1}});
  int lane = threadIdx.x % 32;
  for (int r = 0; r < 4; r++) {
    int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
    for (int k = 0; k < 16; k++)
      d[r] += half_of(all[row % 8 * 4 + k % 8 / 2].x[row / 8 + k / 8 * 2], k % 2) *
              half_of(all[column * 4 + k % 8 / 2].x[4 + k / 8], k % 2);
  }
}

#include SOURCE

static void run(int x, int y, int z, int count, std::function<void()> kernel) {
  threads = count;
  body = kernel;
  for (int block = 0; block < x * y * z; block++) {
    blockIdx = {block % x, block / x % y, block / x / y};
    block_met = 0;
    for (int &met : warp_met) met = 0;
    run_fibers(threads, [](int t) { threadIdx = {t, 0, 0}; });
  }
}

extern "C" void run_attend(int x, int y, int z, int count, const Args *args) {
  run(x, y, z, count, [=] { attend(*args); });
}
extern "C" void run_combine(int x, int y, int z, int count, const Args *args, const int *parts) {
  run(x, y, z, count, [=] { combine(*args, *parts); });
}
