
// Second of the parts of attention_decode.cu: a query, and what a block does with a tile of keys.

struct Shared {
  float scores[WARPS][HEADS][STRIDE];
  u16 weights[HEADS][STRIDE];
  float squares[WARPS][HEADS];
  float fade[HEADS], share[HEADS];
  float2 turn[32];
};

// The query of the block's heads as operand a[i][s], normed and rotated.
__device__ __forceinline__ void query(u32 (&a)[MT][4][4], Shared &shared, const Args &p, int t,
                                      int pos, int warp, int lane) {
  float4 x[MT][2][4];
  const float *from = p.q + (u64)t * p.q_stride + warp * 64 + lane % 4 * 16;
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = i * 16 + r * 8 + lane / 4, head = blockIdx.y * HEADS + row;
      float squares = 0;
#pragma unroll
      for (int s = 0; s < 4; s++) {
        float4 v = make_float4(0, 0, 0, 0);
        if (head < p.heads) v = ((const float4 *)(from + (u64)head * C))[s];
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        x[i][r][s] = v;
      }
      squares += __shfl_xor_sync(~0u, squares, 1);
      squares += __shfl_xor_sync(~0u, squares, 2);
      if (lane % 4 == 0) shared.squares[warp][row] = squares;
    }
  if (warp == 0) shared.turn[lane] = rotation((float)pos * p.freqs[lane]);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float squares = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) squares += shared.squares[w][i * 16 + r * 8 + lane / 4];
      float norm = rsqrtf(squares / C + p.eps);
#pragma unroll
      for (int s = 0; s < 4; s++) {
        float4 v = x[i][r][s];
        if (warp == WARPS - 1) {
          float2 e = shared.turn[lane % 4 * 8 + 2 * s], f = shared.turn[lane % 4 * 8 + 2 * s + 1];
          v = make_float4(v.x * e.x - v.y * e.y, v.x * e.y + v.y * e.x, v.z * f.x - v.w * f.y,
                          v.z * f.y + v.w * f.x);
        }
        a[i][s][r] = half2_of(v.x * norm, v.y * norm);
        a[i][s][r + 2] = half2_of(v.z * norm, v.w * norm);
      }
    }
}

// Scores summed over warps, to weights in shared memory. A thread has 2 keys of rows tid / 16 + ...
constexpr int ROWS_AT_ONCE = 32 * WARPS * 2 / KEYS, ROUNDS = HEADS / ROWS_AT_ONCE;

__device__ __forceinline__ void weigh(Shared &shared, float (&high)[ROUNDS], float (&total)[ROUNDS],
                                      const Args &p, const Keys &keys, int tile) {
  int key = threadIdx.x % (KEYS / 2) * 2;
  bool there[2] = {keys.row(p, tile, key) >= 0, keys.row(p, tile, key + 1) >= 0};
  const float scale = LOG2E * rsqrtf((float)C);
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    int row = i * ROWS_AT_ONCE + threadIdx.x / (KEYS / 2);
    float2 s = make_float2(0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      float2 v = *(const float2 *)&shared.scores[w][row][key];
      s.x += v.x;
      s.y += v.y;
    }
    s.x = there[0] ? s.x * scale : NEVER;
    s.y = there[1] ? s.y * scale : NEVER;
    float top = fmaxf(s.x, s.y);
#pragma unroll
    for (int d = 1; d < KEYS / 2; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    top = fmaxf(top, high[i]);
    s.x = exp2_of(s.x - top);
    s.y = exp2_of(s.y - top);
    float sum = s.x + s.y;
#pragma unroll
    for (int d = 1; d < KEYS / 2; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    float fade = exp2_of(high[i] - top);
    total[i] = total[i] * fade + sum;
    high[i] = top;
    *(u32 *)&shared.weights[row][key] = half2_of(s.x, s.y);
    if (key == 0) shared.fade[row] = fade;
  }
}

__device__ __forceinline__ void store_scores(Shared &shared, const u32 (&a)[MT][4][4],
                                             const u32 (&k)[NT][4][2], int warp, int lane) {
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float d[4] = {0, 0, 0, 0};
#pragma unroll
      for (int s = 0; s < 4; s++) mma(d, a[i][s], k[n][s][0], k[n][s][1]);
      float *to = &shared.scores[warp][i * 16 + lane / 4][n * 8 + lane % 4 * 2];
      *(float2 *)to = make_float2(d[0], d[1]);
      *(float2 *)(to + 8 * STRIDE) = make_float2(d[2], d[3]);
    }
}

// acc[i][2 s + h]: channels 4 s + 2 h, + 1 of the lane's 16, heads lane / 4 and that + 8 of tile i
__device__ __forceinline__ void add_values(float (&acc)[MT][8][4], const Shared &shared,
                                           const u32 (&k)[NT][4][2], int lane) {
  u32 p[MT][NT / 2][4];
#pragma unroll
  for (int i = 0; i < MT; i++) {
    int row = i * 16 + lane / 4;
    float fade = shared.fade[row], fade8 = shared.fade[row + 8];
#pragma unroll
    for (int n = 0; n < 8; n++) {
      acc[i][n][0] *= fade, acc[i][n][1] *= fade;
      acc[i][n][2] *= fade8, acc[i][n][3] *= fade8;
    }
#pragma unroll
    for (int s = 0; s < NT / 2; s++)
#pragma unroll
      for (int r = 0; r < 4; r++)
        p[i][s][r] = *(const u32 *)&shared.weights[row + r % 2 * 8][s * 16 + r / 2 * 8 + lane % 4 * 2];
  }
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int s = 0; s < NT / 2; s++) {
      u32 b0 = transposed(k[2 * s][n / 2][n % 2]), b1 = transposed(k[2 * s + 1][n / 2][n % 2]);
#pragma unroll
      for (int i = 0; i < MT; i++) mma(acc[i][n], p[i][s], b0, b1);
    }
}
