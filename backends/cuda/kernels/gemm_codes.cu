// Codes of a packed matrix, and how they become fp16 numbers. The macros say which format.

#define MXFP4 0
#define MXFP8 1
#define AFFINE 2
#define F16 3

constexpr int THREADS = 256;
constexpr int LIFT = FORMAT == AFFINE ? 14 : 0;  // uses more of fp16's range

struct Matrix {
    const i64* ptrs;  // an address for each expert; may be host memory
    i64 scales_at, biases_at, base_at;
    int rows, cols;
};

// unpacking: pair m of a thread's 32 codes as two fp16 numbers

__device__ u32 affine2(u32 biased, u32 scale, u32 bias) {  // (1024 + q) - 1024 is exact
    return fma2(sub2(biased, 0x64006400), scale, bias);
}

__device__ u32 shifted(u32 w, int left) { return left >= 0 ? w << left : w >> -left; }

template <int M> __device__ u32 pair(const u32 (&w)[BITS], u32 scale, u32 bias) {
    if constexpr (FORMAT == F16) {  // x 1: ptxas reuses registers that come straight from a load
        return mul2(w[M], scale);   // while a product still reads them
    } else if constexpr (FORMAT == MXFP4) {
        // The bits of e2m1 in fp16's place are the value x 2^-14: in its upper byte. Four codes of
        // a word get such bytes at once, those at even places (M even) and the others.
        u32 word = w[M / 4], sign = M % 2 ? word : word << 4, rest = M % 2 ? word >> 3 : word << 1;
        u32 bytes = (sign & 0x80808080) | (rest & 0x0E0E0E0E);
        return mul2(__byte_perm(bytes, 0, M % 4 < 2 ? 0x2404 : 0x3414), scale);
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

__device__ float power_of_two(int e) { return __int_as_float((e + 127) << 23); }

