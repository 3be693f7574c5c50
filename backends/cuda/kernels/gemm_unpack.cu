// A packed matrix as fp16 values relative to its power of two: 32 of a row a thread.
extern "C" __global__ void unpack(const __grid_constant__ Matrix m, uint4* out) {
    await_previous_kernel();
    i64 mine = (i64)blockIdx.x * THREADS + threadIdx.x, all = (i64)m.rows * (m.cols / 32);
    i64 at = mine < all ? mine : all - 1;
    int runs = m.cols / 32, row = (int)(at / runs), run = (int)(at % runs);
    const u8* matrix = (const u8*)m.ptrs[0];
    u32 w[BITS], scale = 0x3C003C00, bias = 0;
    read_codes(w, matrix + at * 4 * BITS);
    int base = *(const int*)(matrix + m.base_at) - LIFT;
    if constexpr (FORMAT == AFFINE) {
        i64 group = (i64)row * (m.cols / GROUP) + run * 32 / GROUP;
        float unit = power_of_two(-base);
        const u16* scales = (const u16*)(matrix + m.scales_at);
        const u16* biases = (const u16*)(matrix + m.biases_at);
        scale = twice(__uint_as_float((u32)scales[group] << 16) * unit);
        bias = twice(__uint_as_float((u32)biases[group] << 16) * unit);
    } else if constexpr (FORMAT != F16) {
        int lift = FORMAT == MXFP4 ? 14 : 8;
        int field = (int)matrix[m.scales_at + at] - 127 - base + lift + 15;
        scale = (u32)min(max(field, 0), 30) * 0x04000400;
    }
    __shared__ uint4 staged[THREADS][5];  // a fifth of it empty: no bank conflicts
    u16 values[32];
    constexpr int SPREAD = 16 % BITS == 0 && BITS < 16 ? 16 / BITS : 1;
#define PAIR(i)                                                         \
    {                                                                   \
        u32 both = pair<i>(w, scale, bias);                             \
        int first = i / SPREAD * 2 * SPREAD + i % SPREAD;               \
        values[first] = (u16)both, values[first + SPREAD] = both >> 16; \
    }
    PAIR(0) PAIR(1) PAIR(2) PAIR(3) PAIR(4) PAIR(5) PAIR(6) PAIR(7)
    PAIR(8) PAIR(9) PAIR(10) PAIR(11) PAIR(12) PAIR(13) PAIR(14) PAIR(15)
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 y[4];
        for (int j = 0; j < 4; j++) y[j] = values[8 * i + 2 * j] | (u32)values[8 * i + 2 * j + 1] << 16;
        staged[threadIdx.x][i] = make_uint4(y[0], y[1], y[2], y[3]);
    }
    __syncwarp();
    int lane = threadIdx.x % 32, warp = threadIdx.x - lane;
#pragma unroll
    for (int i = lane; i < 128; i += 32) {
        i64 to = (mine - lane) * 4 + i;
        if (to < 4 * all) out[to] = staged[warp + i / 4][i % 4];
    }
}
