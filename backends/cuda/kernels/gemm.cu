// Matrix products of many tokens with packed weights, on tensor cores. One kernel serves dense
// matrices and experts; gemm.py and moe_gemm.py launch it, and say what each macro means.
//
// A block computes (weight rows) x (tokens), so that the packed matrix is the left operand, which
// tensor cores take from registers: codes go from global memory through shared memory into the
// registers of the thread that multiplies them, and no unpacked weight is ever stored. In a run of
// 128 inputs, lane t of four owns inputs 32 t .. 32 t + 31 of its row: one group, one scale. Which
// input stands where in a product is free as long as both sides agree, so the activations come in
// the order in which unpacking yields pairs (gemm.py, `permute`).

// which expert and which of its tokens

struct Tile {
    int expert, first, count;
};

// Tile number blockIdx.y, each expert's tokens being cut into the fewest tiles, of equal size;
// false past the last.
__device__ bool find_tile(Tile& tile, const int* offsets, int experts, int tokens) {
    if (!offsets) {
        int first = blockIdx.y * TOKENS;
        tile = {0, first, min(tokens - first, TOKENS)};
        return true;
    }
    __shared__ int totals[THREADS / 32];
    __shared__ Tile found;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wanted = blockIdx.y, before = 0;
    if (threadIdx.x == 0) found.count = 0;
    for (int start = 0; start < experts; start += THREADS) {
        int e = start + threadIdx.x, first = 0, end = 0;
        if (e < experts) first = offsets[e], end = offsets[e + 1];
        int mine = (end - first + TOKENS - 1) / TOKENS, sum = mine;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            int other = __shfl_up_sync(~0u, sum, d);
            if (lane >= d) sum += other;
        }
        __syncthreads();
        if (lane == 31) totals[warp] = sum;
        __syncthreads();
        for (int i = 0; i < THREADS / 32; i++) {
            if (i < warp) sum += totals[i];
        }
        int tile_in_expert = wanted - before - (sum - mine);
        if (tile_in_expert >= 0 && tile_in_expert < mine) {
            int size = ((end - first + mine - 1) / mine + 15) / 16 * 16;
            first += tile_in_expert * size;
            found = {e, first, min(end - first, size)};
        }
        for (int i = 0; i < THREADS / 32; i++) before += totals[i];
    }
    __syncthreads();
    tile = found;
    return tile.count > 0;
}

// the kernel

struct Loader {
    const u8 *first, *second;  // the matrix; when gated, w1 and w3
    const u8* x;
    const u32* x_rows;  // in shared memory, of each token in units of 16 bytes
    const Matrix* m;
    int row0;

    __device__ int row(int r) const {  // of the matrix, for row r of the stage
        return GATED ? row0 + r % 128 : min(row0 + r, m->rows - 1);
    }

    template <int N> __device__ void load(u32 stage, int step) const {
        int tid = threadIdx.x;
#pragma unroll
        for (int i = 0; i < N / 16; i++) {
            int token = tid / 16 + 16 * i, chunk = tid % 16;
            u32 to = stage + chunk / 8 * X_HALF + token * 128;
            copy16(to + ((chunk ^ token) & 7) * 16,
                   x + ((i64)x_rows[token] + step * 16 + chunk) * 16);
        }
        i64 pitch = (i64)m->cols / 8 * BITS;
#pragma unroll
        for (int i = 0; i < (ROWS * BITS + THREADS - 1) / THREADS; i++) {
            int piece = tid + i * THREADS, r = piece / BITS, part = piece % BITS;
            if (ROWS * BITS % THREADS && r >= ROWS) break;
            const u8* from = (GATED && r >= 128 ? second : first) + row(r) * pitch;
            copy16(stage + X_BYTES + piece * 16, from + step * CODE_BYTES + part * 16);
        }
        if (PLANES == 0 || tid >= ROWS) return;
        const u8* matrix = GATED && tid >= 128 ? second : first;
        u32 to = stage + X_BYTES + W_BYTES + tid * 4;
        i64 at = ((i64)row(tid) * (m->cols / GROUP) + step * (STEP / GROUP)) * SCALE_BYTES;
        copy4(to, matrix + m->scales_at + (at & ~(i64)3));
        if (FORMAT == AFFINE) copy4(to + ROWS * 4, matrix + m->biases_at + (at & ~(i64)3));
    }
};

// One step of inputs: 64 rows of each part x N tokens, in units of 64 inputs of one part; while the
// tensor cores work on one unit, the next is unpacked.
template <int N>
__device__ void multiply(float (&acc)[PARTS][N / 2], const u8* stage, const int (&base)[PARTS],
                         const int (&odd)[PARTS][2]) {
    int lane = threadIdx.x % 32, t = lane % 4, row = threadIdx.x / 32 * 16 + lane / 4;
    u32 x = shared_address(stage);
    const u8* codes = stage + X_BYTES;
    const u32* scales = reinterpret_cast<const u32*>(codes + W_BYTES);
    u32 a[2][16];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        u32 w[2][BITS], scale[2], bias[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int r = part * 128 + row + 8 * h;
            read_codes(w[h], codes + r * CODE_BYTES + t * 4 * BITS);
            read_scale(scale[h], bias[h], scales, r, t, base[part], odd[part][h]);
        }
#define UNPACK(m, i)                                          \
    a[u][i] = pair<(m)>(w[0], scale[0], bias[0]);             \
    a[u][i + 1] = pair<(m)>(w[1], scale[1], bias[1]);
#define UNIT(u_, m)                                                                    \
    {                                                                                  \
        constexpr int u = u_;                                                          \
        UNPACK(m, 0) UNPACK(m + 1, 2) UNPACK(m + 2, 4) UNPACK(m + 3, 6)                \
        UNPACK(m + 4, 8) UNPACK(m + 5, 10) UNPACK(m + 6, 12) UNPACK(m + 7, 14)         \
        mma_fence();                                                                   \
        for (int j = 0; j < 4; j++)                                                    \
            product<N>(acc[part], a[u] + 4 * j, x + u * X_HALF + j * 32);              \
        mma_commit();                                                                  \
        mma_wait<1>();                                                                 \
    }
        UNIT(0, 0)
#pragma unroll
        for (int i = 0; i < BITS; i++)  // nothing of the other unit may move up before that wait:
            asm volatile("" : "+r"(w[0][i]), "+r"(w[1][i]));  // its registers are in use until then
        UNIT(1, 8)
    }
}

__device__ u16 to_half(float x) {
    u16 y;
    x = fminf(fmaxf(x, -65504.f), 65504.f);
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// silu(min(gate, limit)) clamp(up) weight -> fp16 in the order that the next matrix reads, whose
// pairs of codes are `spread` apart.
template <int N>
__device__ void write_gated(const float (&acc)[PARTS][N / 2], const int (&base)[PARTS], u8* shared,
                            const float* weights, float limit, int spread, u16* out, i64 stride,
                            Tile tile) {
    constexpr int PITCH = 128 + 8;
    u16* staged = reinterpret_cast<u16*>(shared);
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    float gate_unit = power_of_two(base[0]), up_unit = power_of_two(base[PARTS - 1]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int c = (row + 8 * h) % 32, m = c / (2 * spread) * spread + c % spread;
        int place = 8 * m + (row + 8 * h) / 32 * 2 + c / spread % 2;
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int token = 8 * n + lane % 4 * 2 + i;
                float gate = fminf(acc[0][4 * n + 2 * h + i] * gate_unit, limit);
                float up = acc[PARTS - 1][4 * n + 2 * h + i] * up_unit;
                up = fminf(fmaxf(up, -limit), limit);
                float y = __fdividef(gate, 1 + __expf(-gate)) * up * weights[token];
                staged[token * PITCH + place] = to_half(y);
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile.count * 16; i += THREADS) {
        int token = i / 16, chunk = i % 16;
        u16* to = out + (i64)(tile.first + token) * stride + blockIdx.x * 128 + chunk * 8;
        *reinterpret_cast<uint4*>(to) =
            *reinterpret_cast<const uint4*>(staged + token * PITCH + chunk * 8);
    }
}

template <int N>
__device__ void write_plain(const float (&acc)[PARTS][N / 2], const int (&base)[PARTS],
                            const int* out_rows, void* out, i64 stride, int row0, int rows) {
    int lane = threadIdx.x % 32, row = row0 + threadIdx.x / 32 * 16 + lane / 4;
    float unit = power_of_two(base[0]);
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int to = out_rows[8 * n + lane % 4 * 2 + i];
            if (to < 0) continue;
#pragma unroll
            for (int p = 0; p < PARTS * 2; p++) {
                int r = row + p / 2 * 128 + p % 2 * 8;
                float y = acc[p / 2][4 * n + p % 2 * 2 + i] * unit;
                if (r >= rows) continue;
                if (HALF_OUT) reinterpret_cast<u16*>(out)[to * stride + r] = to_half(y);
                else reinterpret_cast<float*>(out)[to * stride + r] = y;
            }
        }
    }
}

struct Output {
    void* at;
    i64 stride;
    float limit;
    int spread;
};

// A tile of at most N tokens.
template <int N>
__device__ void run(const Loader& loader, u8* shared, const int* out_rows, const float* weights,
                    const Output& out, Tile tile) {
    const Matrix& m = *loader.m;
    int base[PARTS], odd[PARTS][2], thread_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const u8* matrix = GATED && part ? loader.second : loader.first;
        base[part] = *(const int*)(matrix + m.base_at) - LIFT;
        for (int h = 0; h < 2; h++)
            odd[part][h] = loader.row(part * 128 + thread_row + 8 * h) * (m.cols / GROUP) & 1;
    }
    float acc[PARTS][N / 2];
#pragma unroll
    for (int i = 0; i < PARTS * N / 2; i++) {
        float& sum = acc[i / (N / 2)][i % (N / 2)];
        sum = 0;
        asm volatile("" : "+f"(sum)::"memory");  // else zeros may be set between two products
    }
    int steps = m.cols / STEP;
    u32 stages = shared_address(shared);
    for (int s = 0; s < AHEAD; s++) {
        if (s < steps) loader.load<N>(stages + s * STAGE_BYTES, s);
        end_of_copies();
    }
    int now = 0, next = AHEAD;
    for (int s = 0; s < steps; s++) {
        await_copies<AHEAD - 1>();
        __syncthreads();
        if (s + AHEAD < steps) loader.load<N>(stages + next * STAGE_BYTES, s + AHEAD);
        end_of_copies();
        multiply<N>(acc, shared + now * STAGE_BYTES, base, odd);
        for (int i = 0; i < PARTS * 2; i++) odd[i / 2][i % 2] ^= 1;
        now = now + 1 == STAGES ? 0 : now + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
    mma_wait<0>();
    __syncthreads();
    if constexpr (GATED)
        write_gated<N>(acc, base, shared, weights, out.limit, out.spread, (u16*)out.at, out.stride,
                       tile);
    else
        write_plain<N>(acc, base, out_rows, out.at, out.stride, loader.row0, m.rows);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    gemm(const u8* x, i64 x_stride, const __grid_constant__ Matrix m, const i64* second_ptrs,
         const int* order, const int* offsets, int experts, int choices, const float* weights,
         const __grid_constant__ Output out, int tokens, int rows_a_group) {
    extern __shared__ u8 unaligned[];
    u8* shared = unaligned + (-shared_address(unaligned) & 1023);
    __shared__ u32 x_rows[TOKENS];
    __shared__ int out_rows[TOKENS];
    __shared__ float shares[TOKENS];
    await_previous_kernel();
    Tile tile;
    if (!find_tile(tile, offsets, experts, tokens)) return;
    int row0 = blockIdx.x * (GATED ? 128 : ROWS);
    if (threadIdx.x < TOKENS) {
        bool real = threadIdx.x < tile.count;
        int sorted = tile.first + (real ? threadIdx.x : 0), pair = order ? order[sorted] : sorted;
        // The first matrices read tokens in the order of experts; the last reads what they wrote.
        int from = GATED && order ? pair / choices : sorted;
        x_rows[threadIdx.x] = (u32)((from * x_stride + row0 / rows_a_group * m.cols) / 8);
        out_rows[threadIdx.x] = real ? pair : -1;
        shares[threadIdx.x] = GATED && weights ? weights[pair] : 1.f;
    }
    Loader loader = {(const u8*)m.ptrs[tile.expert], nullptr, x, x_rows, &m, row0};
    if (GATED) loader.second = (const u8*)second_ptrs[tile.expert];
    __syncthreads();
#define RUN(n) \
    if (tile.count <= n) return run<n>(loader, shared, out_rows, shares, out, tile);
    SIZES(RUN)
}
