
// A part of gemv.cu: the products of one token, or of the pairs of a tile of experts.
//
// With tokens as the tensor core's 8 columns most would hold nothing. Here columns keep the four lanes of a row
// apart: column 2 q has the channels that lane q of a row reads, and 0 for the others, column 2 q + 1 the same
// of another token. So a lane's sums are of its own codes alone, and scales multiply sums, not codes: half of
// the instructions. It is also exact: codes are whole numbers below fp16's normal range, sums fp32. Weights are
// unpacked once for all pairs; the sums of one are the same to the bit whatever the others are, and alone.

#ifdef PAIRS

constexpr int WAYS = PAIRS > 1 ? 2 : 1;  // pairs that share a product

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

// Pairs and the columns of a panel that they multiply.
struct Columns {
  const uint4* x;
  int width;         // of the panel
  const int* pairs;  // token * picks + pick, or null
  int picks, first, count;

  __device__ __forceinline__ const uint4* operator()(int pair) const {
    return x + (pairs ? pairs[first + pair] / picks : first + pair);
  }
};

// x of each pair in the order in which lanes read it: of a block of channels the j-th 16 of every lane,
// a quarter of 16 bytes a lane; and for affine codes the sum of each lane's channels, times 2^-UNIT.
// Two pairs lie so that their lanes read from different banks.
struct Staged {
  uint4 zeros[72], x[PAIRS][MOST / 8 + 4];
  float sums[PAIRS][MOST / 32];
};
static_assert(sizeof(Staged) <= SHARED);

__device__ __forceinline__ Staged& staged() { return *(Staged*)dynamic(); }

// 16 channels from the k-th on.
template <int F> __device__ __forceinline__ void stage16(const uint4& lo, const uint4& hi, int pair, int k, bool inside) {
  using T = Format<F>;
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
  if (!inside) return;
  uint4* to = staged().x[pair] + k / T::BLOCK * (T::BLOCK / 8) + k % T::CODES / 16 * 8 + k / T::CODES % 4;
  to[0] = {b[0], b[1], b[2], b[3]}, to[4] = {b[4], b[5], b[6], b[7]};
  if (T::AFFINE && k % (T::CODES / T::GROUPS) == 0)
    staged().sums[pair][k / (T::CODES / T::GROUPS)] = sum * power_of_2(-Raw<F>::UNIT);
}

template <int F> __device__ __forceinline__ void stage(const Columns& columns, int cols) {
  using T = Format<F>;
  if (threadIdx.x < 72) staged().zeros[threadIdx.x] = {0, 0, 0, 0};
  const int padded = (cols + T::BLOCK - 1) / T::BLOCK * T::BLOCK;
  for (int pair = 0; pair < columns.count; pair += WAYS) {
    const uint4* from[WAYS];
#pragma unroll
    for (int i = 0; i < WAYS; i++) from[i] = columns(min(pair + i, columns.count - 1));
    for (int start = 0; start < padded; start += 16 * 32 * WARPS) {
      const int k = start + 16 * threadIdx.x;
      uint4 lo[WAYS] = {}, hi[WAYS] = {};
#pragma unroll
      for (int i = 0; i < WAYS; i++)  // zeros beyond a row's end, and beside an odd pair
        if (k < cols && pair + i < columns.count)
          lo[i] = from[i][k / 8 * columns.width], hi[i] = from[i][(k / 8 + 1) * columns.width];
#pragma unroll
      for (int i = 0; i < WAYS; i++) stage16<F>(lo[i], hi[i], pair + i, k, k < padded);
    }
  }
  __syncthreads();
}

// total[c][r][i] += a lane's share of row r of a block x pair 2 c + i. `at` is its x or zeros for the first two
// pairs, the next two's `apart` from it; `sums` are those of its channels.
template <int F, int COUPLES>
__device__ __forceinline__ void multiply(const Fetched<F>& from, const uint4* at, int apart, const float* sums,
                                         float (&total)[COUPLES][2][WAYS]) {
  using T = Format<F>;
  constexpr int SUMS = Raw<F>::SUMS, EACH = T::CODES / 16 / T::GROUPS;
  float acc[COUPLES][SUMS][4];
#pragma unroll
  for (int j = 0; j < T::CODES / 16; j++) {
    u32 a[2][8];
    raw16<F>(from.words[0], j, a[0]);
    raw16<F>(from.words[1], j, a[1]);
#pragma unroll
    for (int c = 0; c < COUPLES; c++) {
      if (j % EACH == 0)
#pragma unroll
        for (int i = 0; i < SUMS; i++) acc[c][i][0] = acc[c][i][1] = acc[c][i][2] = acc[c][i][3] = 0;
      const uint4 lo = at[c * apart + 8 * j], hi = at[c * apart + 8 * j + 4];
      const u32 x[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int k = left<F>(i), l = right<F>(i);
        mma(acc[c][i % SUMS], a[0][k], a[1][k], a[0][l], a[1][l], x[2 * i], x[2 * i + 1]);
      }
      if (j % EACH < EACH - 1) continue;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const Scale s = one_of<F>(from.scales[r], j / EACH % T::GROUPS);
#pragma unroll
        for (int i = 0; i < WAYS; i++) {
          float t = acc[c][0][2 * r + i];
          if constexpr (T::F == A2)
            t += acc[c][1][2 * r + i] * 0x1p-2f + (acc[c][2][2 * r + i] * 0x1p-4f + acc[c][3][2 * r + i] * 0x1p-6f);
          else
            t += acc[c][1][2 * r + i];
          float& all = total[c][r][i];
          if constexpr (T::AFFINE)
            all += __int_as_float(s.bias << 16) * sums[(2 * c + i) * (MOST / 32) + j / EACH] +
                   __int_as_float(s.scale << 16) * t;
          else if constexpr (T::SCALED)
            all += __int_as_float(s.scale << 23) * t;
          else
            all += t;
        }
      }
    }
  }
}

// Several sets of 16 rows, `step` apart, x the channels of blocks [first, first + count); the sums of a
// set, row, then pair, go to sums + set * WARPS * 16 * COUPLES * WAYS. Blocks, of the next set too, are on
// their way from memory while one is multiplied. All threads of a block must come here.
template <int F, int COUPLES>
__device__ __forceinline__ void stream(const Matrix& m, int row0, int step, int sets, int first, int count,
                                       const Columns& columns, bool fresh, float* sums) {
  using T = Format<F>;
  constexpr int U = T::AHEAD, EACH = COUPLES * WAYS;
  const int total = sets * count, row = threadIdx.x % 32 / 4, lane = threadIdx.x % 4;
  Reader<F> reader(m, row0, step, first, count);
  Fetched<F> ring[U];
#pragma unroll
  for (int u = 0; u < U; u++)
    if (u < total) reader.next(ring[u]);
  const float unit = power_of_2(T::F == F16 ? *(const int*)(m.codes + m.base_at) : Raw<F>::UNIT);
  if (WAITS) wait_for_inputs();
  if (fresh) stage<F>(columns, m.cols);
  float sum[COUPLES][2][WAYS] = {};
  // A lane serves column `row`: that of its own channels, or another one, for which it has zeros, which lie so
  // that eight lanes read from different banks.
  const bool mine = row / 2 == lane && row % 2 < WAYS;
  const uint4 *start = mine ? staged().x[row % 2] + first * (T::BLOCK / 8) + lane : staged().zeros + row / 2 + 1, *at = start;
  const int ahead = mine ? T::BLOCK / 8 : 0, apart = mine ? WAYS * (MOST / 8 + 4) : 0;
  const float* of_x = staged().sums[0] + (first * 4 + lane) * T::GROUPS;
  if (total == 0 && lane == 0)
    for (int set = 0; set < sets; set++)
      for (int i = 0; i < EACH; i++)
        sums[(set * WARPS * 16 + row) * EACH + i] = sums[(set * WARPS * 16 + row + 8) * EACH + i] = 0;
  int left = count;
  for (int block = 0; block < total; block += U) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (block + u >= total) break;
      multiply<F>(ring[u], at, apart, of_x + (count - left) * 4 * T::GROUPS, sum);
      at += ahead;
      if (block + u + U < total) reader.next(ring[u]);
      if (--left == 0) {
#pragma unroll
        for (int c = 0; c < COUPLES; c++)
#pragma unroll
          for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < WAYS; i++) {
              float& all = sum[c][r][i];
              all += __shfl_xor_sync(~0u, all, 1);
              all += __shfl_xor_sync(~0u, all, 2);
              if (lane == 0) sums[(row + 8 * r) * EACH + c * WAYS + i] = all * unit;
              all = 0;
            }
        sums += WARPS * 16 * EACH;
        left = count;
        at = start;
      }
    }
  }
}

// A warp's share `part` of `parts` of the rows' channels.
template <int F, int COUPLES>
__device__ __forceinline__ void share(const Matrix& m, int row0, int step, int sets, int part, int parts,
                                      const Columns& columns, bool fresh, float* sums) {
  int blocks = (m.cols + Format<F>::BLOCK - 1) / Format<F>::BLOCK;
  int each = (blocks + parts - 1) / parts;
  int first = min(part * each, blocks);
  stream<F, COUPLES>(m, row0, step, sets, first, min(each, blocks - first), columns, fresh, sums);
}

template <int COUPLES>
__device__ __forceinline__ void any_share(int format, const Matrix& m, int row0, int step, int sets, int part, int parts,
                                          const Columns& columns, bool fresh, float* sums) {
  switch (format) {
#define CASE(F) case F: share<F, COUPLES>(m, row0, step, sets, part, parts, columns, fresh, sums); break;
    FORMATS(CASE)
#undef CASE
  }
}

constexpr int ROOM = WARPS * 16 * 8 * WAYS;  // floats for a block's sums: of 8 sets of one or two pairs

// A block's products with the pairs of `columns`. `finish(set, sets)` is called with the sums of so many sets
// from the set-th on in `room`, as many as fit at a time: of set, warp, row, and COUPLES * WAYS pairs.
template <int COUPLES, class Finish>
__device__ __forceinline__ void products(int format, const Matrix& m, int row0, int step, int sets, int part, int parts,
                                         const Columns& columns, float* room, Finish finish) {
  constexpr int EACH = COUPLES * WAYS, MOST_SETS = 8 / COUPLES;
  room += threadIdx.x / 32 * 16 * EACH;
  if constexpr (COUPLES == 1) {  // sets are no more than 8
    any_share<1>(format, m, row0, step, sets, part, parts, columns, true, room);
    __syncthreads();
    finish(0, sets);
  } else {
    for (int set = 0; set < sets; set += MOST_SETS) {
      const int here = min(MOST_SETS, sets - set);
      any_share<COUPLES>(format, m, row0 + set * step, step, here, part, parts, columns, set == 0, room);
      __syncthreads();
      finish(set, here);
      __syncthreads();
    }
  }
}

// `work.run<COUPLES>(first, count)` for all pairs, PAIRS at a time.
template <class Work> __device__ __forceinline__ void by_couples(int pairs, const Work& work) {
  if constexpr (PAIRS == 1) return work.template run<1>(0, 1);
  for (int first = 0; first < (PAIRS < 8 ? pairs : 1); first += PAIRS) {
    const int count = min(PAIRS, pairs - first);
    if (first) __syncthreads();
    if (count <= WAYS) work.template run<1>(first, count);
    else if constexpr (PAIRS > 2) {
      if (count <= 4) work.template run<2>(first, count);
      else if constexpr (PAIRS > 4) work.template run<4>(first, count);
    }
  }
}

#endif
