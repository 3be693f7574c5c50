// Matrix products of experts of many tokens on Hopper. A cluster of two blocks takes a tile of
// part of a matrix' rows after the other. Each tile's inputs lie ready (gemm_tiles.cu): a copying
// thread of each block brings a half of every stage to both. Codes go from memory to the registers of
// the thread that multiplies them. Inputs and sums have gemm.cu's order. In a gated product a warp
// has 8 rows of w1 and the same 8 of w3.

constexpr int X_HALF = TOKENS * 128;  // 64 inputs of every token: the width of a swizzle
constexpr int STAGE_BYTES = 2 * X_HALF;
constexpr int PREFETCHED = TOKENS == 64 ? -1 : 6;  // steps ahead of the copies

struct Ring {  // of stages: where both sides are
    u32 stages, full, empty;
    int now;
    u32 parity;

    __device__ void advance() {
        if (++now == STAGES) now = 0, parity ^= 1;
    }
};

// The item at which `reader` is, for which it leaves the next one's, `item`.
template <int N>
__device__ void multiply_tile(const Matrix& m, const Work& work, Ring& ring, Reader& reader,
                              Item& item, int parts, int all, int rank) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    int4 tile = item.tile;
    int part = item.part;
    item.number += gridDim.x / 2;
    item.find(work, parts, all);
    Row(&rows)[2] = reader.rows;
    Codes& ahead = reader.ahead;
    float acc[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        acc[i] = 0;
        pin(acc[i]);  // else zeros may be set between two products
    }
    int steps = m.cols / STEP, before = -1;
    Codes c;
    u32 a[2][16];
#pragma unroll 1
    for (int s = 0; s < steps; s++) {
        c = ahead;
        if (s + 1 < steps) ahead.load(rows, s + 1);
        c.open_scales(rows);
        u64 x = described(ring.stages + ring.now * STAGE_BYTES);
#define UNPACK(m, i)                                        \
    a[u][i] = pair<(m)>(c.w[0], c.scale[0], c.bias[0]);     \
    a[u][i + 1] = pair<(m)>(c.w[1], c.scale[1], c.bias[1]);
#define UNIT(u_, m)                                                              \
    {                                                                            \
        constexpr int u = u_;                                                    \
        UNPACK(m, 0) UNPACK(m + 1, 2) UNPACK(m + 2, 4) UNPACK(m + 3, 6)          \
        UNPACK(m + 4, 8) UNPACK(m + 5, 10) UNPACK(m + 6, 12) UNPACK(m + 7, 14)   \
        if (u == 0) barrier_wait(ring.full + 8 * ring.now, ring.parity);         \
        mma_fence();                                                             \
        for (int j = 0; j < 4; j++)                                              \
            product<N>(acc, a[u] + 4 * j, x + (u * X_HALF + j * 32) / 16);       \
        mma_commit();                                                            \
        mma_wait<1>();                                                           \
    }
        UNIT(0, 0)
        if (before >= 0 && lane < 2) barrier_arrive(ring.empty + 8 * before, lane);
        before = ring.now;
        ring.advance();
#pragma unroll
        for (int i = 0; i < BITS; i++)  // nothing of the other unit may move up before that wait:
            pin(c.w[0][i]), pin(c.w[1][i]);  // its registers are in use
        UNIT(1, 8)
        if (s == 0) item.open(m, work);  // whose addresses have come by now
    }
    float unit[2] = {power_of_two(rows[0].base), power_of_two(rows[1].base)};
    reader.open(m, item, rank, work.out.spread);
    mma_wait<0>();
    if (lane < 2) barrier_arrive(ring.empty + 8 * before, lane);
    if constexpr (GATED) {
        u8* to = (u8*)work.out.at + (i64)tile.y * work.out.stride * 2;
        int chunk = Warp{part, rank, warp}.chunk() + part * 2 * WARPS;
        to += (i64)(chunk / 8) * N * 128 + g * 128 + (chunk % 8 ^ g) * 16 + t * 4;
        const float2* shares = (const float2*)(work.shares + tile.y + 2 * t);
        float limit = work.out.limit;
        float2 share[N / 8];
#pragma unroll
        for (int n = 0; n < N / 8; n++) share[n] = shares[4 * n];
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            u32 both = 0;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float gate = fminf(acc[4 * n + i] * unit[0], limit);
                float up = fminf(fmaxf(acc[4 * n + 2 + i] * unit[1], -limit), limit);
                float y = __fdividef(gate, 1 + __expf(-gate)) * up * (i ? share[n].y : share[n].x);
                both |= (u32)to_half(y) << 16 * i;
            }
            *(u32*)(to + n * 1024) = transposed(both);
        }
    } else {
        const int2* pairs = (const int2*)(work.pairs + tile.y + 2 * t);
        float* out = (float*)work.out.at + Warp{part, rank, warp}.row(g, 0, 1);
        int2 to[N / 8];
#pragma unroll
        for (int n = 0; n < N / 8; n++) to[n] = pairs[4 * n];
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int row = i ? to[n].y : to[n].x;
                if (row < 0) continue;
                out[row * work.out.stride] = acc[4 * n + i] * unit[0];
                out[row * work.out.stride + 8] = acc[4 * n + 2 + i] * unit[1];
            }
        }
    }
}

// A copying warp's part of a tile: codes on their way to the L2, and the first warp's copies.
__device__ void copy_tile(const Matrix& m, const Work& work, Ring& ring, int4 tile, int part,
                          int rank) {
    int thread = threadIdx.x - 32 * WARPS, half = tile.z * 128;
    const u8* from = work.x + (i64)tile.y * m.cols * 2 + rank * half;
    const u8* codes[ROWS / 128];
#pragma unroll
    for (int i = 0; i < ROWS / 128; i++) {
        int r = thread + 128 * i, h = r / 8 % 2;
        const u8* matrix = (const u8*)(GATED && h ? work.second_ptrs : m.ptrs)[tile.x];
        i64 row = Warp{part, rank, r / 16}.row(r % 8, h, work.out.spread);
        codes[i] = matrix + row * m.cols / 8 * BITS;
        int scales = m.cols / GROUP * (FORMAT == AFFINE ? 2 : 1);
        for (int at = 0; at < scales; at += 128) {
            prefetch(matrix + m.scales_at + row * scales + at);
            if (FORMAT == AFFINE) prefetch(matrix + m.biases_at + row * scales + at);
        }
    }
    int steps = m.cols / STEP;
#pragma unroll 1
    for (int s = 0; s < steps; s++) {
        int line = s ? s + PREFETCHED : 0;
        for (; line <= s + PREFETCHED && line < steps; line++) {
            if (CODE_BYTES < 128 && line % (128 / CODE_BYTES)) continue;
#pragma unroll
            for (int i = 0; i < ROWS / 128; i++) prefetch(codes[i] + line * CODE_BYTES);
        }
        if (thread == 0) {
            u32 to = ring.stages + ring.now * STAGE_BYTES + rank * X_HALF;
            u32 full = ring.full + 8 * ring.now;
            barrier_wait(ring.empty + 8 * ring.now, ring.parity ^ 1);
            barrier_expect(full, 2 * half);
            copy_to_both(to, from + (i64)s * 2 * half, half, full);
        }
        copiers_meet();
        ring.advance();
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(32 * WARPS + 128, 1)
    experts(const __grid_constant__ Matrix m, const __grid_constant__ Work work) {
    extern __shared__ u8 unaligned[];
    u8* shared = unaligned + (-shared_address(unaligned) & 1023);
    __shared__ u64 barriers[2 * STAGES];
    Ring ring = {shared_address(shared), shared_address(barriers), 0, 0, 0};
    ring.empty = ring.full + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(ring.full + 8 * i, 1);
            barrier_init(ring.empty + 8 * i, 2 * WARPS);
        }
        barriers_are_ready();
    }
    await_previous_kernel();
    __syncthreads();
    cluster_wait();
    int rank = cluster_rank(), parts = m.rows / (GATED ? ROWS : 2 * ROWS), all = work.tiles[0].x * parts;
    if (threadIdx.x >= 32 * WARPS) {
        fewer_registers<WARPS == 8 ? 40 : 32>();
        for (int i = blockIdx.x / 2; i < all; i += gridDim.x / 2)
            copy_tile(m, work, ring, work.tiles[1 + i / parts], i % parts, rank);
    } else {
        more_registers<WARPS == 8 ? 232 : 112>();
        Item item;
        Reader reader;
        item.number = blockIdx.x / 2;
        if (item.number < all) {
            item.find(work, parts, all);
            item.open(m, work);
            reader.open(m, item, rank, work.out.spread);
        }
        while (item.number < all) {
            int size = item.tile.z;
#define RUN(n) \
    if (size == n) multiply_tile<n>(m, work, ring, reader, item, parts, all, rank);
            SIZES(RUN)
        }
    }
    cluster_wait();
}
