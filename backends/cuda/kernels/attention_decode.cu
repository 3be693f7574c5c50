
// Last of its parts (attention_decode_keys.cu, attention_decode_tile.cu): the kernels.

// Four channels, rotated back if they are rotary, as fp16.
__device__ __forceinline__ uint2 finished(float4 v, const float2 *turn) {
  if (turn) {
    float2 e = turn[0], f = turn[1];
    v = make_float4(v.x * e.x + v.y * e.y, v.y * e.x - v.x * e.y, v.z * f.x + v.w * f.y,
                    v.w * f.x - v.z * f.y);
  }
  constexpr float MOST = 65504;
  v.x = fminf(fmaxf(v.x, -MOST), MOST), v.y = fminf(fmaxf(v.y, -MOST), MOST);
  v.z = fminf(fmaxf(v.z, -MOST), MOST), v.w = fminf(fmaxf(v.w, -MOST), MOST);
  return make_uint2(half2_of(v.x, v.y), half2_of(v.z, v.w));
}

__device__ __forceinline__ u16 *place(const Args &p, int t, int channel) {
  return p.out + (u64)(channel / 8) * p.ps + (u64)t * p.ts + channel % 8;
}

// grid (splits, blocks of HEADS heads, tokens)
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) attend(Args p) {
  __shared__ Shared shared;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = blockIdx.z, split = blockIdx.x;
  let_next_start();
  wait_for_inputs();
  Keys keys(p, t);
  int each = (keys.tiles + p.splits - 1) / p.splits, tile = split * each;
  int last = min(tile + each, keys.tiles);
  u64 slot = p.slot[t];

  float high[ROUNDS], total[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) high[i] = LOWEST, total[i] = 0;
  float acc[MT][8][4] = {};
  if (tile < last || p.splits == 1) {
    Raw raw;
    fetch(raw, p, keys, tile, slot, warp, lane);
    u32 a[MT][4][4];
    query(a, shared, p, t, keys.pos, warp, lane);
    for (; tile < last; tile++) {
      u32 k[NT][4][2];
      decode(k, raw, warp);
      if (tile + 1 < last) fetch(raw, p, keys, tile + 1, slot, warp, lane);
      store_scores(shared, a, k, warp, lane);
      __syncthreads();
      weigh(shared, high, total, p, keys, tile);
      __syncthreads();
      add_values(acc, shared, k, lane);
    }
  }

#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    int row = i * ROWS_AT_ONCE + threadIdx.x / (KEYS / 2), head = blockIdx.y * HEADS + row;
    if (threadIdx.x % (KEYS / 2) || head >= p.heads) continue;
    if (p.splits > 1) {
      p.stats[((u64)t * p.splits + split) * p.heads + head] = make_float2(high[i], total[i]);
    } else {
      float sink = p.sink[head] * LOG2E, top = fmaxf(high[i], sink), fade = exp2_of(high[i] - top);
      shared.share[row] = fade / (total[i] * fade + exp2_of(sink - top));
    }
  }
  if (p.splits > 1 && total[0] == 0) return;  // no keys
  __syncthreads();
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = i * 16 + r * 8 + lane / 4, head = blockIdx.y * HEADS + row;
      int channel = warp * 64 + lane % 4 * 16;
      if (head >= p.heads) continue;
      float *to = p.part + (((u64)t * p.splits + split) * p.heads + head) * C + channel;
#pragma unroll
      for (int s = 0; s < 4; s++) {
        float(&x)[4] = acc[i][2 * s], (&y)[4] = acc[i][2 * s + 1];
        float4 v = make_float4(x[2 * r], x[2 * r + 1], y[2 * r], y[2 * r + 1]);
        if (p.splits > 1) {
          ((float4 *)to)[s] = v;
        } else {
          float f = shared.share[row];
          v = make_float4(v.x * f, v.y * f, v.z * f, v.w * f);
          const float2 *turn = warp == WARPS - 1 ? &shared.turn[lane % 4 * 8 + 2 * s] : nullptr;
          *(uint2 *)place(p, t, head * C + channel + 4 * s) = finished(v, turn);
        }
      }
    }
}

// The sum of a head's splits, with the sink, for 128 channels a warp. Either a warp for each 128
// channels of a head, grid (heads, tokens); or PARTS warps that share the splits (at least as many) of
// 128 channels, grid (heads * C / 128, tokens).
constexpr int PARTS = 4, SLICES = C / 128, MOST_SPLITS = 64;

extern "C" __global__ void __launch_bounds__(128) combine(Args p, int parts) {
  __shared__ float weights[MOST_SPLITS];
  __shared__ float2 turn[32];
  __shared__ float4 sums[PARTS][32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = blockIdx.y;
  int head = parts > 1 ? blockIdx.x / SLICES : blockIdx.x;
  int slice = parts > 1 ? blockIdx.x % SLICES : warp, channel = slice * 128 + lane * 4;
  let_next_start();
  wait_for_inputs();
  u64 first = (u64)t * p.splits * p.heads + head;
  if (warp == 0) {
    float2 s[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      s[j] = make_float2(LOWEST, 0);
      if (lane + 32 * j < p.splits) s[j] = p.stats[first + (u64)(lane + 32 * j) * p.heads];
    }
    turn[lane] = rotation((float)p.pos[t] * p.freqs[lane]);
    float sink = p.sink[head] * LOG2E, top = fmaxf(fmaxf(s[0].x, s[1].x), sink);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    float w[2] = {exp2_of(s[0].x - top), exp2_of(s[1].x - top)};
    float sum = w[0] * s[0].y + w[1] * s[1].y;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    float share = 1 / (sum + exp2_of(sink - top));
    weights[lane] = s[0].y > 0 ? w[0] * share : 0;
    weights[lane + 32] = s[1].y > 0 ? w[1] * share : 0;
  }
  const float4 *from = (const float4 *)(p.part + first * C + channel);
  u64 stride = (u64)p.heads * (C / 4);
  float4 v = make_float4(0, 0, 0, 0);
  constexpr int AT_ONCE = 8;  // loaded before the weights are known
  for (int s0 = parts > 1 ? warp : 0; s0 < p.splits; s0 += AT_ONCE * parts) {
    float4 x[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (s0 + i * parts < p.splits) x[i] = from[(s0 + i * parts) * stride];
    if (s0 < parts) __syncthreads();
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      float w = s0 + i * parts < p.splits ? weights[s0 + i * parts] : 0;
      if (w == 0) continue;  // nothing was written there
      v.x += w * x[i].x, v.y += w * x[i].y, v.z += w * x[i].z, v.w += w * x[i].w;
    }
  }
  if (parts > 1) {
    sums[warp][lane] = v;
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int w = 1; w < PARTS; w++) {
      float4 x = sums[w][lane];
      v.x += x.x, v.y += x.y, v.z += x.z, v.w += x.w;
    }
  }
  const float2 *back = channel >= PLAIN ? &turn[(channel - PLAIN) / 2] : nullptr;
  *(uint2 *)place(p, t, head * C + channel) = finished(v, back);
}
