
// A part of gemv.cu: the products of one token.
//
// The tensor core's 8 columns would hold the token once and nothing seven times. Here they keep the
// lanes of a row apart: column 2 q has the channels that lane q of a row reads, and 0 for the others.
// So a lane's sums are of its own codes alone, and scales multiply sums, not codes: that is half of
// the instructions. It is also exact: codes are whole numbers below fp16's normal range, sums fp32.

#ifdef ONE

template <int FORMAT> struct Raw {  // what multiplies x: value = raw * 2^UNIT * the group's scale
  static constexpr int F = Format<FORMAT>::F;
  static constexpr int UNIT = F == F16 ? 0 : F == MXFP8 ? -E4M3 : F == MXFP4 ? 14
                              : F == A2 || F == A6 || F == A8 ? 24 : 14 + Format<FORMAT>::BITS;
  static constexpr int SUMS = F == A2 ? 4 : 2;  // apart from each other
  static constexpr bool QUARTERED = F == A6;    // upper halves are 4 times too large
};

// The j-th 16 codes of a lane's words, as they lie. A2: register i has codes i and i + 8, times
// 4^(i % 4). A6: 6 bits at 0 and 18, the codes of `first` and `second`.
template <int FORMAT> __device__ __forceinline__ void raw16(const u32* w, int j, u32 (&a)[8]) {
  constexpr int F = Format<FORMAT>::F;
  if constexpr (F == A2) {
    const u32 v[2] = {w[j], w[j] >> 8};
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] = v[i / 4] & (0x00030003 << 2 * (i % 4));
  } else if constexpr (F == A6) {
    constexpr u32 LOW = 0x3f, HIGH = LOW << 18;
    const u32 *v = w + 3 * j;
#pragma unroll
    for (int i = 0; i < 6; i++) {
      const int bit = 6 * (i / 3 * 6 + i % 3), word = bit / 32, shift = bit % 32;
      a[i] = (shift > 8 ? __funnelshift_r(v[word], v[word + 1], shift) : v[word] >> shift) & (LOW | HIGH);
    }
    a[6] = (v[2] >> 8) & (LOW | HIGH);
    a[7] = ((v[2] >> 14) & LOW) | ((v[2] >> 2) & HIGH);
  } else if constexpr (F == A8) {
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] = prmt(w[4 * j + i / 2], 0, i % 2 ? 0x4342 : 0x4140);
  } else {
    decode16<FORMAT>(w, j, a);
  }
}

// The registers of raw16 that the k-th of four products takes are `left` and `right`.
template <int FORMAT> __device__ constexpr int left(int k) { return Format<FORMAT>::F == A2 ? k : 2 * k; }
template <int FORMAT> __device__ constexpr int right(int k) { return left<FORMAT>(k) + (Format<FORMAT>::F == A2 ? 4 : 1); }

// Which two of 16 channels register i of raw16 has.
template <int FORMAT> __device__ constexpr int first(int i) {
  using T = Format<FORMAT>;
  if (T::F == A6) return i == 7 ? 13 : i == 6 ? 12 : i / 3 * 6 + i % 3;
  return T::PAIR == 1 ? 2 * i : T::PAIR == 4 ? i / 4 * 8 + i % 4 : i;
}

template <int FORMAT> __device__ constexpr int second(int i) {
  using T = Format<FORMAT>;
  return first<FORMAT>(i) + (T::F == A6 ? (i == 7 ? 1 : 3) : T::PAIR);
}

// x in the order in which lanes read it: of a block of channels the j-th 16 of every lane, a quarter of
// 16 bytes a lane; and for affine codes the sum of each lane's channels, times 2^-UNIT.
struct __align__(128) Staged {
  uint4 x[MOST / 8], zeros[72];
  float sums[MOST / 32];
};

__device__ __forceinline__ Staged& staged() {
  __shared__ Staged all;
  return all;
}

template <int F> __device__ __forceinline__ void stage(const uint4* x, int width, int cols) {
  using T = Format<F>;
  if (threadIdx.x < 72) staged().zeros[threadIdx.x] = {0, 0, 0, 0};
  const int padded = (cols + T::BLOCK - 1) / T::BLOCK * T::BLOCK;
  for (int start = 0; start < padded; start += 16 * 32 * WARPS) {
    const int k = start + 16 * threadIdx.x;
    uint4 lo = {0, 0, 0, 0}, hi = {0, 0, 0, 0};
    if (k < cols) lo = x[k / 8 * width], hi = x[(k / 8 + 1) * width];
    const u32 given[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
    u32 b[8];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      constexpr u32 LOW[2] = {0x10, 0x32}, HIGH[2] = {0x5400, 0x7600};
      const int at = i % 2 ? right<F>(i / 2) : left<F>(i / 2), one = first<F>(at), two = second<F>(at);
      b[i] = prmt(given[one / 2], given[two / 2], LOW[one % 2] | HIGH[two % 2]);
      if (Raw<F>::QUARTERED) b[i] = mul2(b[i], 0x34003c00);
      if (T::AFFINE) sum += sum_of_halves(given[i]);
    }
    if (T::AFFINE) {
#pragma unroll
      for (int d = 1; d < T::CODES / T::GROUPS / 16; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    }
    if (k < padded) {
      uint4* to = staged().x + k / T::BLOCK * (T::BLOCK / 8) + k % T::CODES / 16 * 8 + k / T::CODES % 4;
      to[0] = {b[0], b[1], b[2], b[3]};
      to[4] = {b[4], b[5], b[6], b[7]};
      if (T::AFFINE && k % (T::CODES / T::GROUPS) == 0)
        staged().sums[k / (T::CODES / T::GROUPS)] = sum * power_of_2(-Raw<F>::UNIT);
    }
  }
  __syncthreads();
}

// total[r] += a lane's share of row r of a block. `at` is its x or zeros, `sums` those of its channels.
template <int F>
__device__ __forceinline__ void multiply(const Fetched<F>& from, const uint4* at, const float* sums, float (&total)[2]) {
  using T = Format<F>;
  constexpr int SUMS = Raw<F>::SUMS, EACH = T::CODES / 16 / T::GROUPS;
  float acc[SUMS][4];
#pragma unroll
  for (int j = 0; j < T::CODES / 16; j++) {
    if (j % EACH == 0)
#pragma unroll
      for (int i = 0; i < SUMS; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
    u32 a[2][8];
    const uint4 lo = at[8 * j], hi = at[8 * j + 4];
    const u32 x[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
    raw16<F>(from.words[0], j, a[0]);
    raw16<F>(from.words[1], j, a[1]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int k = left<F>(i), l = right<F>(i);
      mma(acc[i % SUMS], a[0][k], a[1][k], a[0][l], a[1][l], x[2 * i], x[2 * i + 1]);
    }
    if (j % EACH < EACH - 1) continue;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const Scale& s = from.scales[r][j / EACH % T::GROUPS];
      float t = acc[0][2 * r];
      if constexpr (T::F == A2)
        t += acc[1][2 * r] * 0x1p-2f + (acc[2][2 * r] * 0x1p-4f + acc[3][2 * r] * 0x1p-6f);
      else
        t += acc[1][2 * r];
      if constexpr (T::AFFINE)
        total[r] += __int_as_float(s.bias << 16) * sums[j / EACH] + __int_as_float(s.scale << 16) * t;
      else if constexpr (T::SCALED)
        total[r] += __int_as_float(s.scale << 23) * t;
      else
        total[r] += t;
    }
  }
}

// Several sets of 16 rows, `step` apart, x the channels of blocks [first, first + count); the sums of a
// set go to sums + set * WARPS * 16. Blocks, of the next set too, are on their way from memory while
// one is multiplied. All threads of a block must come here.
template <int F>
__device__ __forceinline__ void stream(const Matrix& m, int row0, int step, int sets, int first, int count,
                                       const uint4* x, int width, float* sums) {
  using T = Format<F>;
  constexpr int U = T::AHEAD;
  const int total = sets * count, row = threadIdx.x % 32 / 4, lane = threadIdx.x % 4;
  Reader<F> reader(m, row0, step, first, count);
  Fetched<F> ring[U];
#pragma unroll
  for (int u = 0; u < U; u++)
    if (u < total) reader.next(ring[u]);
  const float unit = power_of_2(T::F == F16 ? *(const int*)(m.codes + m.base_at) : Raw<F>::UNIT);
  if (WAITS) wait_for_inputs();
  stage<F>(x, width, m.cols);
  float sum[2] = {};
  // A lane serves column `row`: that of its own channels, or another one, for which it has zeros. These
  // lie so that eight lanes read from different banks.
  const bool mine = row == 2 * lane;
  const uint4 *start = mine ? staged().x + first * (T::BLOCK / 8) + lane : staged().zeros + row / 2 + 1, *at = start;
  const int ahead = mine ? T::BLOCK / 8 : 0;
  const float* of_x = staged().sums + (first * 4 + lane) * T::GROUPS;
  if (total == 0 && lane == 0)
    for (int set = 0; set < sets; set++) sums[set * WARPS * 16 + row] = sums[set * WARPS * 16 + row + 8] = 0;
  int left = count;
  for (int block = 0; block < total; block += U) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (block + u >= total) break;
      multiply<F>(ring[u], at, of_x + (count - left) * 4 * T::GROUPS, sum);
      at += ahead;
      if (block + u + U < total) reader.next(ring[u]);
      if (--left == 0) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
          sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
          if (lane == 0) sums[row + 8 * r] = sum[r] * unit;
          sum[r] = 0;
        }
        sums += WARPS * 16;
        left = count;
        at = start;
      }
    }
  }
}

// A warp's share `part` of `parts` of the rows' channels.
template <int F>
__device__ __forceinline__ void share(const Matrix& m, int row0, int step, int sets, int part, int parts,
                                      const uint4* x, int width, float* sums) {
  int blocks = (m.cols + Format<F>::BLOCK - 1) / Format<F>::BLOCK;
  int each = (blocks + parts - 1) / parts;
  int first = min(part * each, blocks);
  stream<F>(m, row0, step, sets, first, min(each, blocks - first), x, width, sums);
}

template <int WIDTH>
__device__ __forceinline__ void any_share(int format, const Matrix& m, int row0, int step, int sets, int part,
                                          int parts, const uint4* x, const int (&)[1], float* sums) {
  switch (format) {
#define CASE(F) case F: share<F>(m, row0, step, sets, part, parts, x, WIDTH, sums); break;
    FORMATS(CASE)
#undef CASE
  }
}

#endif
