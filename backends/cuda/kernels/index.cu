// The indexer's queries as its score kernel takes them: rotated, through the Hadamard matrix,
// rounded to FP4. One warp has one head at a time, a lane C / 32 neighbouring channels of it.
// Compiled for C channels, a power of two from 32.

#define ALL 0xffffffffu
#define HAS (C / 32)

#ifdef __CUDACC__
__device__ unsigned short half_bits(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

// cos and sin of position * frequency, the angle rounded to float32 as the model's definition has
// it. Whole turns go in float64, where a million radians keep all their digits.
__device__ void rotation(int position, float frequency, float& cos, float& sin) {
    float angle = (float)position * frequency;
    double turns = (double)angle * 0.15915494309189535;
    sincospif((float)(2 * (turns - rint(turns))), &sin, &cos);
}

// The smallest e with 6 * 2^e >= largest, from -126.
__device__ int fp4_exponent(float largest) {
    unsigned bits = __float_as_uint(fmaxf(largest, 6 * 1.17549435e-38f));
    return (int)(bits >> 23) - 129 + ((bits & 0x7fffff) > 0x400000);
}

__device__ float power_of_two(int e) { return __uint_as_float((unsigned)(e + 127) << 23); }

// Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 for |x| <= 6, ties to the even code.
__device__ float fp4(float x) {
    float size = fabsf(x);
    float near = size < 2 ? rintf(2 * size) / 2 : size < 4 ? rintf(size) : 2 * rintf(size / 2);
    return copysignf(near, x);
}

// q: (T, heads, C), q_stride from token to token (both it and q aligned to 16 bytes if C >= 128);
// weights: (T, heads) with weights_stride.
// query: fp16 (T, padded, C) relative to a power of two, which goes into share (T, padded); even
// channels come first, then odd ones. grid (padded / (warps * each), T), blocks of whole warps.
extern "C" __global__ void prepare(const float* q, const float* weights, const int* positions,
                                   const float* freqs, unsigned short* query, float* share,
                                   int q_stride, int weights_stride, int heads, int padded,
                                   int rotary, int each) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");  // the launch may overlap the one before
#endif
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    long long t = blockIdx.y;
    int position = positions[t];
    float cos[HAS], sin[HAS];
#pragma unroll
    for (int i = 0; i < HAS; i++) {
        int pair = (lane * HAS + i - (C - rotary)) / 2;
        cos[i] = 1, sin[i] = 0;
        if (lane * HAS + i >= C - rotary) rotation(position, freqs[pair], cos[i], sin[i]);
    }
    for (int h = 0; h < each; h++) {
        int head = (blockIdx.x * warps + warp) * each + h;
        const float* row = q + t * q_stride + head * C + lane * HAS;
        float x[HAS], y[HAS];
#if HAS >= 4
#pragma unroll
        for (int i = 0; i < HAS; i += 4) {
            float4 quad = make_float4(0, 0, 0, 0);
            if (head < heads) quad = *(const float4*)(row + i);
            x[i] = quad.x, x[i + 1] = quad.y, x[i + 2] = quad.z, x[i + 3] = quad.w;
        }
#else
        for (int i = 0; i < HAS; i++) x[i] = head < heads ? row[i] : 0;
#endif
#pragma unroll
        for (int i = 0; i < HAS; i++) {
            float other = HAS > 1 ? x[i ^ (HAS > 1)] : __shfl_xor_sync(ALL, x[i], 1);
            bool odd = (lane * HAS + i) % 2;
            y[i] = odd ? other * sin[i] + x[i] * cos[i] : x[i] * cos[i] - other * sin[i];
        }
#pragma unroll
        for (int step = 1; step < HAS; step *= 2)
#pragma unroll
            for (int i = 0; i < HAS; i++)
                if (!(i & step)) {
                    float a = y[i], b = y[i | step];
                    y[i] = a + b, y[i | step] = a - b;
                }
#pragma unroll
        for (int step = 1; step < 32; step *= 2)
#pragma unroll
            for (int i = 0; i < HAS; i++) {
                float other = __shfl_xor_sync(ALL, y[i], step);
                y[i] = lane & step ? other - y[i] : y[i] + other;
            }
        float largest = 0, scale = 1 / sqrtf((float)C);
#pragma unroll
        for (int i = 0; i < HAS; i++) {
            y[i] *= scale;
            largest = fmaxf(largest, fabsf(y[i]));
        }
#pragma unroll
        for (int step = 1; step < 32 / HAS; step *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, step));
        int e = fp4_exponent(largest), most = __reduce_max_sync(ALL, e);
        float down = power_of_two(-e), up = e - most < -30 ? 0 : power_of_two(e - most);
        unsigned short* into = query + (t * padded + head) * C;
        unsigned short half[HAS];
#pragma unroll
        for (int i = 0; i < HAS; i++) half[i] = half_bits(fp4(y[i] * down) * up);
#if HAS >= 4
#pragma unroll
        for (int i = 0; i < HAS; i += 4) {
            unsigned* even = (unsigned*)(into + (lane * HAS + i) / 2);
            even[0] = half[i] | (unsigned)half[i + 2] << 16;
            even[C / 4] = half[i + 1] | (unsigned)half[i + 3] << 16;
        }
#else
        for (int i = 0; i < HAS; i++) {
            int c = lane * HAS + i;
            into[c % 2 * (C / 2) + c / 2] = half[i];
        }
#endif
        if (lane == 0)
            share[t * padded + head] =
                head < heads ? weights[t * weights_stride + head] * power_of_two(most) : 0;
    }
}
