
// A part of gemv.cu: the products of up to 32 tokens, 8 columns at a time.

#ifdef N

constexpr int TILES = (N + 7) / 8, FEW_ROOM = 64 * WARPS * 16;  // floats for a block's sums: of 8 sets, or of 2

// acc += a block of 16 rows x its channels: x(tile, i) has the i-th 8 of this lane's column.
template <int F, class X>
__device__ __forceinline__ void multiply_few(const Fetched<F>& from, int base, const X& x, float (&acc)[TILES][4]) {
  using T = Format<F>;
  static_assert(T::GROUPS == 1);
  Scale scales[2] = {from.scales[0], from.scales[1]};
  prepare<F>(scales[0], base), prepare<F>(scales[1], base);
#pragma unroll
  for (int j = 0; j < T::CODES / 16; j++) {
    u32 a[2][8];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      decode16<F>(from.words[r], j, a[r]);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if constexpr (T::AFFINE) a[r][i] = fma2(a[r][i], scales[r].scale, scales[r].bias);
        else if constexpr (T::SCALED) a[r][i] = mul2(a[r][i], scales[r].scale);
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      u32 b[8];
      arrange<T::PAIR>(x(tile, 2 * j), x(tile, 2 * j + 1), b);
#pragma unroll
      for (int i = 0; i < 8; i += 2)
        mma(acc[tile], a[0][i], a[1][i], a[0][i + 1], a[1][i + 1], b[i], b[i + 1]);
    }
  }
}

// A warp's sums to shared memory: row, then token. Clears them.
__device__ __forceinline__ void spill(float* to, float (&acc)[TILES][4], float factor) {
  const int lane = threadIdx.x % 32, row = lane / 4, token = lane % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      to[(row + i / 2 * 8) * 8 * TILES + tile * 8 + token + i % 2] = acc[tile][i] * factor;
      acc[tile][i] = 0;
    }
}

// Several sets of 16 rows, `step` apart, x the channels of blocks [first, first + count), for 8
// tokens a tile; the sums of a set go to sums + set * WARPS * 16 * 8 * TILES. Lane l serves column l / 4 of a
// tile; `column[i]` is that column, in tile i, of a panel x that is N wide. Blocks, of the next
// set too, are on their way from memory while one is multiplied.
template <int F>
__device__ __forceinline__ void stream_few(const Matrix& m, int row0, int step, int sets, int first, int count,
                                       const uint4* x, const int (&column)[TILES], float* sums) {
  using T = Format<F>;
  constexpr int U = T::AHEAD;
  const int total = sets * count;
  Reader<F> reader(m, row0, step, first, count);
  Fetched<F> ring[U];
#pragma unroll
  for (int u = 0; u < U; u++)
    if (u < total) reader.next(ring[u]);
  if (WAITS) wait_for_inputs();
  const int base = *(const int*)(m.codes + m.base_at);
  float acc[TILES][4] = {};
  if (total == 0)
    for (int set = 0; set < sets; set++) spill(sums + set * WARPS * 16 * 8 * TILES, acc, 0);
  const uint4 *start[TILES], *at[TILES];
#pragma unroll
  for (int i = 0; i < TILES; i++)
    at[i] = start[i] = x + (first * T::BLOCK + threadIdx.x % 4 * T::CODES) / 8 * N + column[i];
  // Up to 8 tokens x is on its way with the weights: it comes from far, and a warp has few rows to read it for.
  constexpr bool TOGETHER = TILES == 1 && U == 2;
  // From 8 tokens on, two blocks are asked for at once: neighbours in memory, which it then gives sooner.
  constexpr bool PAIRED = N >= 8 && !(TOGETHER && T::SCALED);
  uint4 held[U][T::CODES / 8];
  int left = count, x_left = count;
  auto next_x = [&](uint4(&to)[T::CODES / 8]) {
    const uint4* from = at[0];
#ifdef RAGGED
    if ((first + count - x_left) * T::BLOCK + threadIdx.x % 4 * T::CODES >= m.cols) from = x + column[0];
#endif
#pragma unroll
    for (int i = 0; i < T::CODES / 8; i++) to[i] = from[i * N];
    at[0] += T::BLOCK / 8 * N;
    if (--x_left == 0) x_left = count, at[0] = start[0];
  };
  if constexpr (TOGETHER)
#pragma unroll
    for (int u = 0; u < U; u++)
      if (u < total) next_x(held[u]);
  for (int block = 0; block < total; block += U) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (block + u >= total) break;
      if constexpr (TOGETHER) {
        multiply_few<F>(ring[u], base, [&](int tile, int i) { return held[u][i]; }, acc);
      } else {
#ifdef RAGGED  // lanes beyond a row's end read anything finite: their weights are 0
        if ((first + count - left) * T::BLOCK + threadIdx.x % 4 * T::CODES >= m.cols)
          for (int i = 0; i < TILES; i++) at[i] = x + column[i];
#endif
        multiply_few<F>(ring[u], base, [&](int tile, int i) { return at[tile][i * N]; }, acc);
#pragma unroll
        for (int i = 0; i < TILES; i++) at[i] += T::BLOCK / 8 * N;
      }
#pragma unroll
      for (int v = !PAIRED ? u : u % 2 ? u - 1 : u + 1; v <= u; v++)
        if (block + v + U < total) {
          reader.next(ring[v]);
          if constexpr (TOGETHER) next_x(held[v]);
        }
      if (--left == 0) {
        spill(sums, acc, power_of_2(base));
        sums += WARPS * 16 * 8 * TILES;
        left = count;
        if constexpr (!TOGETHER)
#pragma unroll
          for (int i = 0; i < TILES; i++) at[i] = start[i];
      }
    }
  }
}

// A warp's share `part` of `parts` of the rows' channels.
template <int F>
__device__ __forceinline__ void share_few(const Matrix& m, int row0, int step, int sets, int part, int parts,
                                          const uint4* x, const int (&column)[TILES], float* sums) {
  int blocks = (m.cols + Format<F>::BLOCK - 1) / Format<F>::BLOCK;
  int each = (blocks + parts - 1) / parts;
  int first = min(part * each, blocks);
  stream_few<F>(m, row0, step, sets, first, min(each, blocks - first), x, column, sums);
}

// Sets of rows x all columns of a panel. The sums are in `room` then: of set, warp, row, and 8 * TILES tokens.
__device__ __forceinline__ void products_few(int format, const Matrix& m, int row0, int step, int sets, int part,
                                             int parts, const uint4* x, float* room) {
  int column[TILES];
#pragma unroll
  for (int i = 0; i < TILES; i++) column[i] = min(i * 8 + (int)threadIdx.x % 32 / 4, N - 1);
  float* sums = room + threadIdx.x / 32 * 16 * 8 * TILES;
  switch (format) {
#define CASE(F) case F: share_few<F | NARROW>(m, row0, step, sets, part, parts, x, column, sums); break;
    FEW_FORMATS(CASE)
#undef CASE
  }
  __syncthreads();
}

#endif
