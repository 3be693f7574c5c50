// What a stage of shared memory holds, copies into it, and products on tensor cores: wgmma where
// the chip has it, else mma.sync. Two warpgroups work on a stage; each has 64 rows of every part.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA 1
#define AHEAD (STAGES - 2)  // the product of the step before may still read its stage
#else
#define WGMMA 0
#define AHEAD (STAGES - 1)
#endif

constexpr int STEP = 128;                    // inputs a stage
constexpr int ROWS = 128 * PARTS;            // rows of codes
constexpr int CODE_BYTES = STEP * BITS / 8;  // of one row
constexpr int PLANES = FORMAT == AFFINE ? 2 : FORMAT == F16 ? 0 : 1;  // scales, biases
constexpr int SCALE_BYTES = FORMAT == AFFINE ? 2 : 1;
constexpr int X_HALF = TOKENS * 128;  // 64 inputs of every token: the width of a swizzle
constexpr int X_BYTES = 2 * X_HALF;
constexpr int W_BYTES = ROWS * CODE_BYTES;
constexpr int STAGE_BYTES = (X_BYTES + W_BYTES + PLANES * ROWS * 4 + 1023) / 1024 * 1024;

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

