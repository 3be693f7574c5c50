// The k largest of a row of scores, exactly: of equal scores the earlier wins, ids ascend.
//
// One block takes one row, or one segment of a row, and keeps its scores in registers: compiled for
// THREADS threads with VALUES scores each. It narrows the k-th largest score down by a histogram
// whose bins are even steps from a lower bound to the largest score, sorts out the one bin that
// holds it, and then lets every thread compare. Where that cannot work (all scores equal, infinite,
// or too many in one bin) the k-th largest is found bit by bit.

#define WARPS (THREADS / 32)
#define QUADS (VALUES / 4)
#define BUNCH (VALUES < 16 ? VALUES : 16)  // scores of which at least the largest is looked at
#define BINS 2048
#define LIST 1024
#define ALL 0xffffffffu
#define NEVER __int_as_float(0xff800000)
#define ABSENT __int_as_float(0xffffffff)  // a NaN: no comparison holds; `ordered` puts it last

struct Shared {
    int histogram[BINS];
    float list[LIST];
    int low[WARPS], lowest[WARPS], high[WARPS];
    int sums[2][32], chosen[QUADS][WARPS];
    int listed, bin, needed, ties;
    float threshold;
};

// Sum over the block; two calls in a row take different `turn`s.
__device__ int block_sum(Shared& s, int x, int turn) {
    x = __reduce_add_sync(ALL, x);
    if (threadIdx.x % 32 == 0) s.sums[turn][threadIdx.x / 32] = x;
    __syncthreads();
    int lane = threadIdx.x % 32;
    return __reduce_add_sync(ALL, lane < WARPS ? s.sums[turn][lane] : 0);
}

__device__ int inclusive_scan(int x) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int y = __shfl_up_sync(ALL, x, step);
        if (lane >= step) x += y;
    }
    return x;
}

// Sum over the threads before this one.
__device__ int block_scan(Shared& s, int x, int turn) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, up_to = inclusive_scan(x);
    if (lane == 31) s.sums[turn][warp] = up_to;
    __syncthreads();
    return up_to - x + __reduce_add_sync(ALL, lane < warp ? s.sums[turn][lane] : 0);
}

// Integers in the order of the floats, and back.
__device__ int ordered(float x) {
    int bits = __float_as_int(x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ float unordered(int x) { return __int_as_float(x ^ (x >> 31 & 0x7fffffff)); }

// Sets s.threshold, the k-th largest of the block's scores, and s.ties, how many equal to it count.
__device__ void bit_by_bit(Shared& s, const float (&x)[VALUES], int k) {
    unsigned found = 0;  // of the sign-flipped bits, which are unsigned
    int turn = 0, above = 0;
    for (int bit = 31; bit >= 0; bit--, turn ^= 1) {
        unsigned trial = found | 1u << bit;
        int count = 0;
#pragma unroll
        for (int i = 0; i < VALUES; i++) count += (ordered(x[i]) ^ 0x80000000u) >= trial;
        if (block_sum(s, count, turn) >= k) found = trial;
    }
#pragma unroll
    for (int i = 0; i < VALUES; i++) above += (ordered(x[i]) ^ 0x80000000u) > found;
    above = block_sum(s, above, turn);
    if (threadIdx.x == 0) {
        s.threshold = unordered(found ^ 0x80000000u);
        s.ties = k - above;
    }
}

// The same, false if bins cannot tell the scores apart. Counters in `s` must be zero.
__device__ bool by_histogram(Shared& s, const float (&x)[VALUES], float lowest, int k) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float low = -NEVER, high = NEVER;
#pragma unroll
    for (int from = 0; from < VALUES; from += BUNCH) {
        float top = NEVER;
#pragma unroll
        for (int i = from; i < from + BUNCH; i++) top = fmaxf(top, x[i]);
        low = fminf(low, top);
        high = fmaxf(high, top);
    }
    int l = __reduce_min_sync(ALL, ordered(low)), h = __reduce_max_sync(ALL, ordered(high));
    int ll = __reduce_min_sync(ALL, ordered(lowest));
    if (lane == 0) s.low[warp] = l, s.lowest[warp] = ll, s.high[warp] = h;
    __syncthreads();
    low = unordered(__reduce_min_sync(ALL, s.low[lane % WARPS]));
    lowest = unordered(__reduce_min_sync(ALL, s.lowest[lane % WARPS]));
    high = unordered(__reduce_max_sync(ALL, s.high[lane % WARPS]));
    // Each bunch has a score no less than the least of the bunches' largest: that makes k of them.
    if (THREADS * VALUES / BUNCH < k || low == NEVER) low = lowest;
    float scale = (BINS - 1) / (high - low);
    if (!(scale > 0 && scale < 1e38f)) return false;

#pragma unroll
    for (int i = 0; i < VALUES; i++)
        if (x[i] >= low) atomicAdd(&s.histogram[(int)((x[i] - low) * scale)], 1);
    __syncthreads();
    const int each = BINS / THREADS;
    int mine = 0, from = BINS - 1 - threadIdx.x * each;
#pragma unroll
    for (int i = 0; i < each; i++) mine += s.histogram[from - i];
    int above = block_scan(s, mine, 0);
    if (above < k && above + mine >= k) {
        int bin = from;
        while (above + s.histogram[bin] < k) above += s.histogram[bin--];
        s.bin = bin;
        s.needed = k - above;
    }
    __syncthreads();
    int bin = s.bin, needed = s.needed, n = s.histogram[bin];
    if (n > LIST) return false;

#pragma unroll
    for (int i = 0; i < VALUES; i++)
        if (x[i] >= low && (int)((x[i] - low) * scale) == bin) s.list[atomicAdd(&s.listed, 1)] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
        float candidate = s.list[i];
        int greater = 0, equal = 0;
        for (int j = 0; j < n; j++) {
            greater += s.list[j] > candidate;
            equal += s.list[j] == candidate;
        }
        if (greater < needed && needed <= greater + equal) {  // equal candidates write the same
            s.threshold = candidate;
            s.ties = needed - greater;
        }
    }
    return true;
}

// 1 if x is larger, 2^16 if it is equal: both are counted in one sum.
__device__ int against(float x, float threshold) {
    return (x > threshold) + ((x == threshold) << 16);
}

enum Use { WHOLE, SEGMENT, MERGE };

// Entry e of a row is visible if e < (position + 1) / ratio and e < entries. grid (segments, rows).
// scores is (rows, stride), stride a multiple of 4. By use:
//   WHOLE    ids (rows, out_stride = k) are chosen from a row of scores, -1 behind them;
//   SEGMENT  the k best of each segment go to kept and ids (rows, out_stride), one after another;
//   MERGE    scores and names are such choices, and ids (rows, k) are chosen from them.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
choose(const float* scores, const int* names, const int* positions, float* kept, int* ids,
       int use, int ratio, int entries, int k, int segment, int stride, int out_stride) {
    __shared__ Shared s;
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");  // the launch may overlap the one before
#endif
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long row = blockIdx.y;
    int visible = min((positions[row] + 1) / ratio, entries), first = 0, n = visible;
    bool partly = use == SEGMENT, merge = use == MERGE && visible > k;
    if (partly) {
        first = blockIdx.x * segment;
        n = visible > k ? max(0, min(visible - first, segment)) : 0;
    }
    if (merge) n = visible / segment * k + min(k, visible % segment);
    scores += row * stride + first;
    names += row * stride;
    ids += row * out_stride + blockIdx.x * k;
    kept += row * out_stride + blockIdx.x * k;
    // A lane has four neighbouring scores of each 4 * THREADS; read before n, which takes a load too.
    int at = 4 * threadIdx.x, limit = min(stride - first, partly ? segment : stride);
    float4 read[QUADS];
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int e = at + j * 4 * THREADS;
        read[j] = e < limit ? *(const float4*)(scores + e) : make_float4(0, 0, 0, 0);
    }
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.histogram[i] = 0;
    if (threadIdx.x == 0) s.listed = 0;
    if (n <= k) {  // all of them
        for (int i = threadIdx.x; i < (partly ? n : k); i += THREADS) {
            ids[i] = i >= n ? -1 : merge ? names[i] : first + i;
            if (partly) kept[i] = scores[i];
        }
        return;
    }

    float x[VALUES], lowest = -NEVER;
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        float quad[4] = {read[j].x, read[j].y, read[j].z, read[j].w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float y = quad[i] == quad[i] ? quad[i] + 0.0f : NEVER;  // -0 is 0, NaN comes last
            bool there = at + j * 4 * THREADS + i < n;
            x[4 * j + i] = there ? y : ABSENT;
            if (there) lowest = fminf(lowest, y);
        }
    }
    bool done = by_histogram(s, x, lowest, k);
    __syncthreads();
    if (!done) bit_by_bit(s, x, k);
    __syncthreads();

    float threshold = s.threshold;
    int ties = s.ties;
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int quad = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) quad += against(x[4 * j + i], threshold);
        quad = __reduce_add_sync(ALL, quad);
        if (lane == 0) s.chosen[j][warp] = quad;
    }
    __syncthreads();
    unsigned before = 0;
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int quad = 0, each = lane < WARPS ? s.chosen[j][lane] : 0;
#pragma unroll
        for (int i = 0; i < 4; i++) quad += against(x[4 * j + i], threshold);
        unsigned count = before + __reduce_add_sync(ALL, lane < warp ? each : 0);
        if (s.chosen[j][warp]) {
            count += inclusive_scan(quad) - quad;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float y = x[4 * j + i];
                int larger = count & 0xffff, equal = count >> 16;
                if (y > threshold || (y == threshold && equal < ties)) {
                    int place = larger + min(equal, ties), e = at + j * 4 * THREADS + i;
                    ids[place] = merge ? names[e] : first + e;
                    if (partly) kept[place] = y;
                }
                count += against(y, threshold);
            }
        }
        before += __reduce_add_sync(ALL, each);
    }
}
