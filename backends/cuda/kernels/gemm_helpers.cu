// out[t] += y[t][0] + y[t][1] + ...: rows of `width` float32, in a fixed order
extern "C" __global__ void combine(const float4* y, float4* out, int choices, int width) {
    await_previous_kernel();
    int at = blockIdx.x * THREADS + threadIdx.x;
    if (at >= width / 4) return;
    i64 token = blockIdx.y;
    float4 sum = out[token * (width / 4) + at];
    for (int i = 0; i < choices; i++) {
        float4 v = y[(token * choices + i) * (width / 4) + at];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    out[token * (width / 4) + at] = sum;
}

// Runs of 128 inputs in the order in which codes are unpacked, pairs being `spread` apart.
extern "C" __global__ void permute(const uint4* x, i64 stride, uint4* out, int width, int spread) {
    await_previous_kernel();
    __shared__ uint4 run[THREADS];
    const u16* inputs = reinterpret_cast<const u16*>(run);
    int at = blockIdx.x * THREADS + threadIdx.x, inside = at < width / 8;
    i64 token = blockIdx.y;
    if (inside) run[threadIdx.x] = x[token * (stride / 8) + at];
    __syncthreads();
    if (!inside) return;
    int m = threadIdx.x % 16, first = threadIdx.x / 16 * 128;
    first += m / spread * 2 * spread + m % spread;
    u32 y[4];
#pragma unroll
    for (int t = 0; t < 4; t++)
        y[t] = inputs[first + 32 * t] | (u32)inputs[first + 32 * t + spread] << 16;
    out[token * (width / 8) + at] = make_uint4(y[0], y[1], y[2], y[3]);
}
