// Matrix products of many tokens with packed weights, on tensor cores. One kernel serves dense
// matrices and experts; gemm.py and moe_gemm.py launch it, and say what each macro means.
//
// A block computes (weight rows) x (tokens), so that the packed matrix is the left operand, which
// tensor cores take from registers: codes go from global memory through shared memory into the
// registers of the thread that multiplies them, and no unpacked weight is ever stored. In a run of
// 128 inputs, lane t of four owns inputs 32 t .. 32 t + 31 of its row: one group, one scale. Which
// input stands where in a product is free as long as both sides agree, so the activations come in
// the order in which unpacking yields pairs (gemm.py, `permute`).

#define MXFP4 0
#define MXFP8 1
#define AFFINE 2
#define F16 3

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA 1
#define AHEAD (STAGES - 2)  // the product of the step before may still read its stage
#else
#define WGMMA 0
#define AHEAD (STAGES - 1)
#endif

constexpr int THREADS = 256;                // two warpgroups; each has 64 rows of every part
constexpr int STEP = 128;                   // inputs a step
constexpr int ROWS = 128 * PARTS;           // rows of codes in a stage
constexpr int CODE_BYTES = STEP * BITS / 8; // of one row in a step
constexpr int PLANES = FORMAT == AFFINE ? 2 : FORMAT == F16 ? 0 : 1;
constexpr int SCALE_BYTES = FORMAT == AFFINE ? 2 : 1;
constexpr int LIFT = FORMAT == AFFINE ? 14 : 0;  // uses more of fp16's range
constexpr int X_HALF = TOKENS * 128;         // 64 inputs of every token: the width of a swizzle
constexpr int X_BYTES = 2 * X_HALF;
constexpr int W_BYTES = ROWS * CODE_BYTES;
constexpr int STAGE_BYTES = (X_BYTES + W_BYTES + PLANES * ROWS * 4 + 1023) / 1024 * 1024;

struct Matrix {
    const i64* ptrs;  // an address for each expert; may be host memory
    u32 scales_at, biases_at, base_at;  // bytes into a matrix, which is smaller than 4 GB
    int rows, cols;
};

// copying

__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Zeros, and nothing is read, unless `real`.
__device__ void copy16(u32 to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(real ? 16 : 0));
}

__device__ void copy4(u32 to, const void* from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
                 "r"(real ? 4 : 0));
}

__device__ void end_of_copies() { asm volatile("cp.async.commit_group;"); }

template <int PENDING> __device__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#if WGMMA && FENCE
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// unpacking: pair m of a thread's 32 codes as two fp16 numbers

__device__ u32 mul2(u32 a, u32 b) {
    u32 y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

__device__ u32 affine2(u32 biased, u32 scale, u32 bias) {  // (1024 + q) - 1024 is exact
    u32 y;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(biased), "r"(0x64006400));
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(y), "r"(scale), "r"(bias));
    return y;
}

__device__ u32 shifted(u32 w, int left) { return left >= 0 ? w << left : w >> -left; }

template <int M> __device__ u32 pair(const u32 (&w)[BITS], u32 scale, u32 bias) {
    if constexpr (FORMAT == F16) {  // x 1: ptxas reuses registers that come straight from a load
        return mul2(w[M], scale);   // while a product still reads them
    } else if constexpr (FORMAT == MXFP4) {  // the bits of e2m1 in fp16's place are the value x 2^-14
        u32 word = w[M / 4];
        constexpr int left = 12 - 4 * (M % 4);
        return mul2((word << left & 0x80008000) | (shifted(word, left - 3) & 0x0E000E00), scale);
    } else if constexpr (FORMAT == MXFP8) {  // and those of e4m3 are the value x 2^-8
        u32 word = w[M / 2];
        constexpr int left = 8 - 8 * (M % 2);
        return mul2((word << left & 0x80008000) | (shifted(word, left - 1) & 0x3F803F80), scale);
    } else if constexpr (32 % BITS == 0) {
        constexpr int pairs = 16 / BITS;
        constexpr u32 mask = ((1u << BITS) - 1) * 0x10001;
        return affine2((w[M / pairs] >> (M % pairs * BITS) & mask) | 0x64006400, scale, bias);
    } else {
        constexpr int at = 2 * M * BITS, word = at / 32, shift = at % 32;
        constexpr u32 mask = (1u << BITS) - 1;
        u32 v = w[word] >> shift;
        if constexpr (shift + 2 * BITS > 32) v = __funnelshift_r(w[word], w[word + 1], shift);
        return affine2((v & mask) | (v << (16 - BITS) & mask << 16) | 0x64006400, scale, bias);
    }
}

__device__ void read_codes(u32 (&w)[BITS], const u8* at) {
    if constexpr (BITS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < BITS / 4; i++) {
            uint4 v = reinterpret_cast<const uint4*>(at)[i];
            w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
        }
    } else if constexpr (BITS % 2 == 0) {
#pragma unroll
        for (int i = 0; i < BITS / 2; i++) {
            uint2 v = reinterpret_cast<const uint2*>(at)[i];
            w[2 * i] = v.x, w[2 * i + 1] = v.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < BITS; i++) w[i] = reinterpret_cast<const u32*>(at)[i];
    }
}

__device__ u32 twice(float x) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(y) : "f"(x));
    return y;
}

__device__ float power_of_two(int e) { return __int_as_float((e + 127) << 23); }

__device__ float bf16(u32 bits) { return __uint_as_float(bits << 16); }

// An E8M0 byte as two fp16 factors, with what `pair` leaves out.
__device__ u32 power_scale(int byte, int base) {
    int field = byte - 127 - base + (FORMAT == MXFP4 ? 14 : 8) + 15;
    return (u32)min(max(field, 0), 30) * 0x04000400;
}

// The scale and bias of lane t's 32 codes, relative to 2^base.
__device__ void read_scale(u32& scale, u32& bias, const u32* words, int row, int t, int base,
                           int odd) {
    if constexpr (FORMAT == F16) {
        scale = 0x3C003C00, bias = 0;
    } else if constexpr (FORMAT == AFFINE) {
        int shift = (GROUP == 64 ? 1 - t / 2 : 1 - odd) * 16;
        float unit = power_of_two(-base);
        scale = twice(__uint_as_float(words[row] << shift & 0xFFFF0000) * unit);
        bias = twice(__uint_as_float(words[ROWS + row] << shift & 0xFFFF0000) * unit);
    } else {
        scale = power_scale(reinterpret_cast<const u8*>(words + row)[t], base);
        bias = 0;
    }
}

// products: d[rows of 16 or 64][TOKENS] += a[.., 16] x[16, TOKENS]

__device__ void mma_fence() {
#if WGMMA
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ void mma_commit() {
#if WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int PENDING> __device__ void mma_wait() {
#if WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}

// Accumulators of N tokens are N / 2 in a thread; `desc` describes 16 inputs of every token.
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
              "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define S8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define S16 S8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define S24 S16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define S32 S24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define S40 S32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define S48 S40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define S56 S48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define S64 S56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define MMA(n, accs, a0, a1, a2, a3, b, ...)                                                   \
    if constexpr (N == n)                                                                      \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" accs "}, {%" #a0 \
                     ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", 1, 1, 1, 0;"                      \
                     : __VA_ARGS__                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc));

// `x` is the shared address of the first token's 16 inputs; rows of 128 bytes, swizzled.
#if WGMMA
template <int N> __device__ void product(float (&d)[N / 2], const u32* a, u32 x) {
    u64 desc = (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16 | (x & 0x3FFFF) >> 4;
    MMA(16, S8, 8, 9, 10, 11, 12, D8(0))
    MMA(32, S16, 16, 17, 18, 19, 20, D8(0), D8(8))
    MMA(48, S24, 24, 25, 26, 27, 28, D8(0), D8(8), D8(16))
    MMA(64, S32, 32, 33, 34, 35, 36, D8(0), D8(8), D8(16), D8(24))
    MMA(80, S40, 40, 41, 42, 43, 44, D8(0), D8(8), D8(16), D8(24), D8(32))
    MMA(96, S48, 48, 49, 50, 51, 52, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40))
    MMA(112, S56, 56, 57, 58, 59, 60, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48))
    MMA(128, S64, 64, 65, 66, 67, 68, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56))
}
#else
template <int N> __device__ void product(float (&d)[N / 2], const u32* a, u32 x) {
    int lane = threadIdx.x % 32, token = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
    u32 at = x & ~127u, chunk = (x & 127) / 16 + half;
#pragma unroll
    for (int n = 0; n < N; n += 16) {
        u32 b[4], from = at + (n + token) * 128 + ((chunk ^ (token & 7)) * 16);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(from));
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float* c = d + n / 2 + 4 * h;
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
                         "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                         : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * h]),
                           "r"(b[2 * h + 1]));
        }
    }
}
#endif

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

    // Without a branch: products are under way, and ptxas would wait for them at one. Where there
    // are fewer pieces than threads, two copy the same.
    template <int N> __device__ void load(u32 stage, int step) const {
        int tid = threadIdx.x;
        bool real = step < m->cols / STEP;
#pragma unroll
        for (int i = 0; i < N / 16; i++) {
            int token = tid / 16 + 16 * i, chunk = tid % 16;
            u32 to = stage + chunk / 8 * X_HALF + token * 128;
            copy16(to + ((chunk ^ token) & 7) * 16,
                   x + ((i64)x_rows[token] + step * 16 + chunk) * 16, real);
        }
        u32 pitch = m->cols / 8 * BITS;
#pragma unroll
        for (int i = 0; i < (ROWS * BITS + THREADS - 1) / THREADS; i++) {
            int piece = (tid + i * THREADS) % (ROWS * BITS), r = piece / BITS, part = piece % BITS;
            const u8* matrix = GATED && r >= 128 ? second : first;
            u32 from = row(r) * pitch + step * CODE_BYTES + part * 16;
            copy16(stage + X_BYTES + piece * 16, matrix + from, real);
        }
        if constexpr (PLANES == 0) return;
        int r = tid % ROWS;
        const u8* matrix = GATED && r >= 128 ? second : first;
        u32 to = stage + X_BYTES + W_BYTES + r * 4;
        u32 at = (row(r) * (m->cols / GROUP) + step * (STEP / GROUP)) * SCALE_BYTES & ~3;
        copy4(to, matrix + m->scales_at + at, real);
        if (FORMAT == AFFINE) copy4(to + ROWS * 4, matrix + m->biases_at + at, real);
    }
};

// One step of inputs: 64 rows of each part x N tokens, in units of 64 inputs of one part; while the
// tensor cores work on one unit, the next is unpacked.
template <int N, typename Loads>
__device__ void multiply(float (&acc)[PARTS][N / 2], const u8* stage, const int (&base)[PARTS],
                         const int (&odd)[PARTS][2], Loads start_loads) {
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
        if (LATE && part == 0 && u == 0) start_loads();                                \
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
                float y = gate / (1 + __expf(-gate)) * up * weights[token];
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
        loader.load<N>(stages + s * STAGE_BYTES, s);
        end_of_copies();
    }
    int now = 0, next = AHEAD;
    for (int s = 0; s < steps; s++) {
        await_copies<AHEAD - 1>();
        __syncthreads();
        auto start_loads = [&] {
            loader.load<N>(stages + next * STAGE_BYTES, s + AHEAD);
            end_of_copies();
        };
        if (!LATE) start_loads();
        multiply<N>(acc, shared + now * STAGE_BYTES, base, odd, start_loads);
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
