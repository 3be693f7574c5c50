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

// The matrix in fp16, rows of inputs in their own order, relative to 2^(base - LIFT).
extern "C" __global__ void unpack(const __grid_constant__ Matrix m, uint4* out) {
    await_previous_kernel();
    int runs = m.cols / 32;  // a run of 32 codes is a thread's
    i64 at = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (at >= (i64)m.rows * runs) return;
    const u8* matrix = (const u8*)m.ptrs[0];
    u32 w[BITS], p[16], y[16], scale, bias;
    read_codes(w, matrix + at * 4 * BITS);
    int base = *(const int*)(matrix + m.base_at) - LIFT;
    i64 group = at * 32 / GROUP;
    if constexpr (FORMAT == AFFINE) {
        float unit = power_of_two(-base);
        scale = twice(bf16(reinterpret_cast<const u16*>(matrix + m.scales_at)[group]) * unit);
        bias = twice(bf16(reinterpret_cast<const u16*>(matrix + m.biases_at)[group]) * unit);
    } else {
        scale = power_scale(matrix[m.scales_at + group], base);
        bias = 0;
    }
#define PAIR(i) p[i] = pair<i>(w, scale, bias);
    PAIR(0) PAIR(1) PAIR(2) PAIR(3) PAIR(4) PAIR(5) PAIR(6) PAIR(7)
    PAIR(8) PAIR(9) PAIR(10) PAIR(11) PAIR(12) PAIR(13) PAIR(14) PAIR(15)
    constexpr int spread = BITS == 2 || BITS == 4 || BITS == 8 ? 16 / BITS : 1;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        int m = 2 * i / (2 * spread) * spread + 2 * i % spread;
        y[i] = spread == 1 ? p[i] : __byte_perm(p[m], p[m + 1], 2 * i / spread % 2 ? 0x7632 : 0x5410);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        out[at * 4 + i] = make_uint4(y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]);
}
