
// A part of gemv.cu's source: dense matrices of 9 to 32 tokens, whose x a block of threads keeps in shared memory.
//
// In gemv_few.cu every 16 rows read x through the L2: at 32 tokens that is four times the bytes of FP8 weights, and
// what bounds it. Here 64 rows or more share it. A block's warps are WAYS times GROUP: a warp takes 16 rows and the
// channels of its way, whose x the warps of that way copy into a ring of their own. The order of a token's sums is
// gemv_few.cu's, and so are its bits: over a part of the channels, then over the parts.

constexpr int AHEAD = 1;  // blocks of x on their way
constexpr int BLOCK_WARPS = 16, THREADS_HERE = 32 * BLOCK_WARPS;
constexpr int GROUP = BLOCK_WARPS / WAYS, OF_A_WAY = 32 * GROUP;  // warps, and threads, that share x
constexpr int STEP = 16 * GROUP;                                  // rows that a block takes at a time
constexpr int PITCH = STEP + 4, SUMS = N * PITCH;                 // of sums in shared memory: a token's, a way's

struct Segment {
  Matrix matrix;
  int format;
  int kept;         // parts of the channels that a warp takes, one after the other: 1 or 2
  int halves;       // 2: a pair of blocks share rows, the first has the lower half of the channels
  int stages;       // of a way's ring; whole: all of its channels
  int sums_at;      // where in shared memory the sums of first parts are, if two are kept: bytes
  int last_at;      // and those of last parts: 0, where the ring was, if sets is 1
  int sets;         // how often a block takes STEP rows
  int first_block;  // of the grid
  int out_half;     // 1: fp16 panel, 0: fp32 rows
  int out_stride;   // fp32: elements from token to token; fp16: tokens of the panel
  const uint4* x;
  void* out;
  float* lower;     // with halves: the lower one's sums of each set, (N, STEP)
  int* done;        // and of each set whether they are there
};

struct Segments {
  int count, tokens;
  Segment each[8];
};

#ifndef EMULATED

__device__ __forceinline__ void copy16(uint4* to, const uint4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void meet_way(int way) {
  asm volatile("bar.sync %0, %1;" ::"r"(way + 1), "n"(OF_A_WAY) : "memory");
}
__device__ __forceinline__ void tell(int* flag) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
}
__device__ __forceinline__ float4 read_of_others(const float* at) { return __ldcg((const float4*)at); }

#endif

// Blocks of channels of 16 rows, from memory: `count` of them from the first-th on, then of the rows STEP below.
template <int F> struct Rows {
  using T = Format<F>;
  const Matrix& m;
  const int first, count;
  int row, left;
  u32 codes, scales, lower_codes, lower_scales;  // bytes from the matrix's start; from a row to 8 below it

  __device__ __forceinline__ Rows(const Matrix& m, int row0, int first, int count)
      : m(m), first(first), count(count), row(row0 + threadIdx.x % 32 / 4) {
    start();
  }

  __device__ __forceinline__ void start() {
    const int k = first * T::BLOCK + threadIdx.x % 4 * T::CODES;
    const u32 r = min(row, m.rows - 1), down = row + 8 < m.rows ? 8 : 0, pitch = m.cols / 8 * T::BITS;
    const u32 scale_pitch = m.cols / T::GROUP * SCALE_BYTES;
    left = count;
    codes = r * pitch + k / 8 * T::BITS, lower_codes = down * pitch;
    scales = m.scales_at + r * scale_pitch + k / T::GROUP * SCALE_BYTES, lower_scales = down * scale_pitch;
  }

  __device__ __forceinline__ void next(Fetched<F>& to) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      fetch(m.codes + codes + r * lower_codes, to.words[r]);
      const u8* scale = m.codes + scales + r * lower_scales;
      if constexpr (T::SCALED) to.scales[r].scale = fetch_scale<SCALE_BYTES>(scale);
      if constexpr (T::AFFINE) to.scales[r].bias = fetch_scale<SCALE_BYTES>(scale + (m.biases_at - m.scales_at));
    }
    codes += T::BLOCK / 8 * T::BITS, scales += T::BLOCK / T::GROUP * SCALE_BYTES;
    if (--left == 0) {
      row += STEP;
      start();
    }
  }

  static constexpr int SCALE_BYTES = T::AFFINE ? 2 : 1;
  static_assert(!T::SCALED || T::BLOCK % T::GROUP == 0 && T::GROUPS == 1);
};

// A block of channels of x: what each of a row's four lanes reads, and 32 bytes, so that 8 lanes read from all banks.
template <int F> struct Stage {
  static constexpr int EACH = Format<F>::CODES / 8 * N, PITCH = EACH + 2, SIZE = 4 * PITCH;  // in 16 bytes
};

// A warp's sums to shared memory: token, then row.
__device__ __forceinline__ void put(float* to, const float (&acc)[TILES][4], float factor) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      to[(tile * 8 + lane % 4 * 2 + i % 2) * PITCH + lane / 4 + i / 2 * 8] = acc[tile][i] * factor;
}

// Sums of all parts for a set's rows from row0 on, in their order, to where they belong: 4 rows of a token a thread.
struct Finish {
  const Segment& s;
  const float *early, *last;
  int tokens, half;

  __device__ __forceinline__ void add(float4& sum, const float* at) const {
    const float4 more = *(const float4*)at;
    sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
  }

  __device__ __forceinline__ void run(int row0, float* lower, int* done) const {
    const bool lower_half = s.halves == 2 && !half;
    if (half) {  // the block before this one in the grid, which therefore runs or has run
      if (threadIdx.x == 0)
        while (!ready(done)) {}
      __syncthreads();
    }
    for (int i = threadIdx.x; i < STEP / 4 * tokens; i += THREADS_HERE) {
      const int at = i * 4 % STEP, c = i * 4 / STEP, r = row0 + at;
      if (r >= s.matrix.rows) continue;
      float4 sum = {};
      if (half) sum = read_of_others(lower + i * 4);
#pragma unroll
      for (int way = 0; way < WAYS; way++) {
        if (s.kept == 2) add(sum, early + way * SUMS + c * PITCH + at);
        add(sum, last + way * SUMS + c * PITCH + at);
      }
      if (lower_half)
        *(float4*)(lower + i * 4) = sum;
      else if (s.out_half)
        *(uint2*)((u16*)s.out + ((r / 8 * s.out_stride + c) * 8 + r % 8)) =
            {(u32)half_of(sum.x) | (u32)half_of(sum.y) << 16, (u32)half_of(sum.z) | (u32)half_of(sum.w) << 16};
      else
        *(float4*)((float*)s.out + ((u64)c * s.out_stride + r)) = sum;
    }
    if (lower_half) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) tell(done);
    } else if (half && threadIdx.x == 0) {
      *done = 0;  // for the next launch
    }
  }
};

template <int F> __device__ __forceinline__ void run(const Segment& s, int tokens, int block, uint4* room) {
  using T = Format<F>;
  using S = Stage<F>;
  constexpr int U = T::WORDS > 4 ? 2 : 512 / T::BLOCK;  // blocks of weights on their way, a warp
  const int warp = threadIdx.x / 32, way = warp / GROUP;
  const int half = block % s.halves, row0 = block / s.halves * s.sets * STEP;
  const int sets = min(s.sets, (s.matrix.rows - row0 + STEP - 1) / STEP);
  const int chunk = s.matrix.cols / T::BLOCK / (WAYS * s.halves), count = chunk / s.kept;
  const int first = (half * WAYS + way) * chunk;
  int wanted = sets * chunk;  // blocks of weights, and then of x, that are still to be asked for

  Rows<F> rows(s.matrix, row0 + warp % GROUP * 16, first, chunk);
  Fetched<F> ring[U];
#pragma unroll
  for (int u = 0; u < U; u++) rows.next(ring[u]);

  wait_for_inputs();
  const int base = *(const int*)(s.matrix.codes + s.matrix.base_at);
  const int stages = s.stages;
  int copies = stages == chunk ? chunk : wanted;  // if all fits, it is copied once
  wanted -= U;
  uint4* const mine = room + way * stages * S::SIZE;
  const int in_way = threadIdx.x % OF_A_WAY;
  const uint4* from = s.x + (u64)first * (4 * S::EACH) + in_way;
  uint4* to = mine + in_way;
  int until_stage = stages, until_chunk = chunk;
  auto copy = [&] {
    if (copies-- > 0) {
#pragma unroll
      for (int i = 0; i < 4 * S::EACH; i += OF_A_WAY)
        if (4 * S::EACH % OF_A_WAY == 0 || in_way + i < 4 * S::EACH)
          copy16(to + i + (in_way + i) / S::EACH * 2, from + i);
      to += S::SIZE, from += 4 * S::EACH;
      if (--until_stage == 0) to -= (until_stage = stages) * S::SIZE;
      if (--until_chunk == 0) from -= (until_chunk = chunk) * (4 * S::EACH);
    }
    end_of_copies();
  };
  for (int i = 0; i < AHEAD; i++) copy();

  float *early = (float*)room + s.sums_at / 4, *last = (float*)room + s.last_at / 4;
  const int my_sums = way * SUMS + warp % GROUP * 16;
  const uint4* x = mine + threadIdx.x % 4 * S::PITCH + threadIdx.x % 32 / 4;
  int stage = stages;
  for (int set = 0; set < sets; set++) {
    for (int part = 0; part < s.kept; part++) {
      float acc[TILES][4] = {};
      for (int block = 0; block < count; block += U) {
#pragma unroll
        for (int u = 0; u < U; u++) {
          await_copies<AHEAD - 1>();
          meet_way(way);
          copy();
          multiply_few<F>(ring[u], base, [&](int tile, int i) { return x[i * N + 8 * tile]; }, acc);
          x += S::SIZE;
          if (--stage == 0) x -= (stage = stages) * S::SIZE;
          if (wanted-- > 0) rows.next(ring[u]);
        }
      }
      const bool more = part + 1 < s.kept;
      if (set ? !part : !(more || s.last_at)) __syncthreads();  // what is in this place is no longer read
      put((more ? early : last) + my_sums, acc, power_of_2(base));
    }
    __syncthreads();
    const int tile = row0 / STEP + set;
    Finish{s, early, last, tokens, half}.run(row0 + set * STEP, s.lower + (u64)tile * STEP * N, s.done + tile);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS_HERE, 1) linears(const __grid_constant__ Segments all) {
  let_next_start();
  int which = 0;
  while (which + 1 < all.count && (int)blockIdx.x >= all.each[which + 1].first_block) which++;
  const Segment& s = all.each[which];
  const int block = blockIdx.x - s.first_block;
  uint4* room = (uint4*)dynamic();
  switch (s.format) {
#define CASE(F) case F: run<F>(s, all.tokens, block, room); break;
    FEW_FORMATS(CASE)
#undef CASE
  }
}
