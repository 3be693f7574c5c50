// A layer's experts between GPU and host memory, decided and copied inside a step: policy.py says
// the rule. `decide` is one block; `fetch` copies what it lists. Compiled with EXPERTS, the most
// experts of a layer, and TILES, the most tiles of a step, defined.

typedef unsigned long long u64;

#define NOWHERE -1
#define BARRED -2
#define NEVER 0x7fffffff     // the key of a slot that must stay
#define EMPTY ((int)0x80000000)
#define THREADS 256
#define PIECES 8             // of 16 bytes that a thread has on their way

enum { HITS, MISSES, PASSED, STEPS, COPY_NS, PAIR_HITS, PAIRS };

struct Layer {
    u64* ptrs[3];          // of w1, w3 and w2: the address of each expert's matrix
    u64 slots[3];          // where the first slot is
    u64 lent[3];           // and slot number `kept`
    u64 homes[3];          // and the first home
    u64 bytes[3];          // of one matrix; a multiple of 16
    int *slot_of, *home_of, *owner;
    float* score;
    u64 *heat, *counts;
    int* jobs;             // what to copy: count, blocks that have ended, then (home, slot) each
    u64* started;          // when, in ns
    float fade;
    int experts, slot_count, kept;
};

__device__ u64 slot_at(const Layer& l, int matrix, int slot) {
    return slot < l.kept ? l.slots[matrix] + slot * l.bytes[matrix]
                         : l.lent[matrix] + (slot - l.kept) * l.bytes[matrix];
}

__device__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ u64 now() {
#ifdef __CUDA_ARCH__
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
#else
    return 0;
#endif
}

struct Shared {
    int pairs[EXPERTS], key[EXPERTS], missing[TILES];
    int count, hits, pair_hits, pairs_in_all;
    int low[THREADS / 32], at[THREADS / 32];
};

// The slot of the least key and, of equal ones, the lowest; its key in `low`.
__device__ int least(Shared& s, int slots, int& low) {
    int best = NEVER, slot = NEVER, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < slots; i += THREADS)
        if (s.key[i] < best) best = s.key[i], slot = i;
    low = __reduce_min_sync(~0u, best);
    int found = __reduce_min_sync(~0u, best == low ? slot : NEVER);
    if (lane == 0) s.low[warp] = low, s.at[warp] = found;
    __syncthreads();
    bool real = lane < THREADS / 32;
    best = real ? s.low[lane] : NEVER, slot = real ? s.at[lane] : NEVER;
    low = __reduce_min_sync(~0u, best);
    return __reduce_min_sync(~0u, best == low ? slot : NEVER);
}

// Experts that are missing, in order, and the sums of the step: one thread, a tile at a time.
__device__ void list_missing(Shared& s, const Layer& l, const int* expert, const int* count,
                             int tiles) {
    s.count = s.hits = s.pair_hits = s.pairs_in_all = 0;
    for (int i = 0, last = NOWHERE; i < tiles; i++) {
        int e = expert[i];
        if (count[i] <= 0 || e < 0 || e >= l.experts || e == last) continue;
        last = e;
        s.pairs_in_all += s.pairs[e];
        if (l.slot_of[e] != NOWHERE) s.hits++, s.pair_hits += s.pairs[e];
        else s.missing[s.count++] = e;
    }
}

__device__ void move_in(const Layer& l, int expert, int slot) {
    int old = l.owner[slot];
    if (old != NOWHERE) {
        l.slot_of[old] = NOWHERE;
        for (int m = 0; m < 3; m++) l.ptrs[m][old] = l.homes[m] + l.home_of[old] * l.bytes[m];
    }
    l.owner[slot] = expert;
    l.slot_of[expert] = slot;
    for (int m = 0; m < 3; m++) l.ptrs[m][expert] = slot_at(l, m, slot);
}

// Tiles of pairs, sorted by expert (kernels/router.py) -> new addresses, and what to copy there.
extern "C" __global__ void __launch_bounds__(THREADS)
decide(const __grid_constant__ Layer l, const int* expert, const int* count, int tiles) {
    __shared__ Shared s;
    let_next_start();
    wait_for_inputs();
    int me = threadIdx.x;
    for (int e = me; e < l.experts; e += THREADS) s.pairs[e] = 0;
    __syncthreads();
    for (int i = me; i < tiles; i += THREADS)
        if (count[i] > 0 && expert[i] >= 0 && expert[i] < l.experts)
            atomicAdd(&s.pairs[expert[i]], count[i]);
    __syncthreads();
    for (int e = me; e < l.experts; e += THREADS) {
        l.score[e] = l.score[e] * l.fade + s.pairs[e];
        l.heat[e] += s.pairs[e];
    }
    if (me == 0) list_missing(s, l, expert, count, tiles);
    __syncthreads();
    for (int i = me; i < l.slot_count; i += THREADS) {
        int e = l.owner[i];  // scores are not negative: their bits are in their order
        s.key[i] = e == NOWHERE ? EMPTY : e == BARRED ? NEVER
                 : s.pairs[e] || l.home_of[e] == NOWHERE ? NEVER : __float_as_int(l.score[e]);
    }
    __syncthreads();
    int copied = 0;
    for (; copied < s.count; copied++) {
        int low, slot = least(s, l.slot_count, low);
        if (low == NEVER) break;
        if (me == 0) {
            int e = s.missing[copied];
            move_in(l, e, slot);
            s.key[slot] = NEVER;
            l.jobs[2 + 2 * copied] = l.home_of[e];
            l.jobs[3 + 2 * copied] = slot;
        }
        __syncthreads();
    }
    if (me) return;
    l.jobs[0] = copied;
    *l.started = now();
    l.counts[HITS] += s.hits;
    l.counts[MISSES] += copied;
    l.counts[PASSED] += s.count - copied;
    l.counts[STEPS] += 1;
    l.counts[PAIR_HITS] += s.pair_hits;
    l.counts[PAIRS] += s.pairs_in_all;
}

// Every listed expert from its home to its slot, by any number of blocks.
extern "C" __global__ void __launch_bounds__(THREADS) fetch(const __grid_constant__ Layer l) {
    let_next_start();
    wait_for_inputs();
    const int piece = THREADS * PIECES;  // of 16 bytes
    int jobs = l.jobs[0];
    if (jobs == 0) return;
    int pieces[3], each = 0;
    for (int m = 0; m < 3; m++) each += pieces[m] = (int)((l.bytes[m] / 16 + piece - 1) / piece);
    for (int i = blockIdx.x; i < jobs * each; i += gridDim.x) {
        int job = i / each, part = i % each, m = 0;
        while (part >= pieces[m]) part -= pieces[m++];
        const uint4* from = (const uint4*)(l.homes[m] + l.jobs[2 + 2 * job] * l.bytes[m]);
        uint4* to = (uint4*)slot_at(l, m, l.jobs[3 + 2 * job]);
        int end = (int)(l.bytes[m] / 16), first = part * piece + threadIdx.x;
        uint4 held[PIECES];
#pragma unroll
        for (int j = 0; j < PIECES; j++)
            if (first + j * THREADS < end) held[j] = from[first + j * THREADS];
#pragma unroll
        for (int j = 0; j < PIECES; j++)
            if (first + j * THREADS < end) to[first + j * THREADS] = held[j];
    }
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(&l.jobs[1], 1) == (int)gridDim.x - 1) {
        l.jobs[1] = 0;
        l.counts[COPY_NS] += now() - *l.started;
    }
}
