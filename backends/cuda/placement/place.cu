// A layer's experts between GPU and host memory, decided and copied inside a step: policy.py says
// the rule. `decide` is one block; `fetch` copies what it lists. Compiled with EXPERTS, the most
// experts of a layer, and TILES, the most tiles of a step, defined.

typedef unsigned long long u64;

#define NOWHERE -1
#define BARRED -2
#define NEVER 0x7fffffff     // the key of a slot that must stay
#define EMPTY ((int)0x80000000)
#define THREADS 256
#define PIECES 4             // of 16 bytes that a thread has on their way

enum { HITS, MISSES, PASSED, STEPS, COPY_NS, PAIR_HITS, PAIRS };
// Of `jobs`: how many; whether w1 and w3 of all are there (gemv.cu waits for it); blocks of `fetch`
// that have copied their share of these; how many w2 are there; then of each job
enum { COUNT, READY, UP_DONE, DOWN_DONE, LIST };
enum { HOME, SLOT, EXPERT, PIECES_DONE, JOB };

struct Layer {
    u64* ptrs[3];          // of w1, w3 and w2: the address of each expert's matrix
    u64 slots[3];          // where the first slot is
    u64 lent[3];           // and slot number `kept`
    u64 homes[3];          // and the first home
    u64 bytes[3];          // of one matrix; a multiple of 16
    int *slot_of, *home_of, *owner;
    float* score;
    u64 *heat, *counts;
    int* arrived;          // of each expert: 0 while its w2 is on its way
    int* jobs;             // what to copy: see below
    u64* started;          // when, in ns
    float fade;
    int experts, slot_count, kept;
};

__device__ u64 slot_at(const Layer& l, int matrix, int slot) {
    return slot < l.kept ? l.slots[matrix] + slot * l.bytes[matrix]
                         : l.lent[matrix] + (slot - l.kept) * l.bytes[matrix];
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
    int slot_of[EXPERTS], home_of[EXPERTS], owner[EXPERTS], pairs[EXPERTS], key[EXPERTS];
    float score[EXPERTS];
    int expert[TILES], count[TILES], missing[TILES];
    int missed, hits, pair_hits, pairs_in_all;
};

// What no kernel since the last step has changed: read while the router is still at work.
__device__ void read_tables(Shared& s, const Layer& l) {
    for (int e = threadIdx.x; e < l.experts; e += THREADS) {
        s.slot_of[e] = l.slot_of[e], s.home_of[e] = l.home_of[e], s.score[e] = l.score[e];
        s.pairs[e] = 0;
    }
    for (int i = threadIdx.x; i < l.slot_count; i += THREADS) s.owner[i] = l.owner[i];
}

// The slot of the least key and, of equal ones, the lowest; its key in `low`. For one warp.
__device__ int least(const Shared& s, int slots, int& low) {
    int best = NEVER, slot = NEVER;
    for (int i = threadIdx.x; i < slots; i += 32)
        if (s.key[i] < best) best = s.key[i], slot = i;
    low = __reduce_min_sync(~0u, best);
    return __reduce_min_sync(~0u, best == low ? slot : NEVER);
}

// Experts that are missing, in order, and the sums of the step: one thread, a tile at a time.
__device__ void list_missing(Shared& s, const Layer& l, int tiles) {
    s.missed = s.hits = s.pair_hits = s.pairs_in_all = 0;
    for (int i = 0, last = NOWHERE; i < tiles; i++) {
        int e = s.expert[i];
        if (s.count[i] <= 0 || e < 0 || e >= l.experts || e == last) continue;
        last = e;
        s.pairs_in_all += s.pairs[e];
        if (s.slot_of[e] != NOWHERE) s.hits++, s.pair_hits += s.pairs[e];
        else s.missing[s.missed++] = e;
    }
}

__device__ void move_in(const Shared& s, const Layer& l, int expert, int slot) {
    int old = s.owner[slot];
    if (old != NOWHERE) {
        l.slot_of[old] = NOWHERE;
        for (int m = 0; m < 3; m++) l.ptrs[m][old] = l.homes[m] + s.home_of[old] * l.bytes[m];
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
    int me = threadIdx.x;
    read_tables(s, l);
    wait_for_inputs();
    for (int i = me; i < tiles; i += THREADS) s.expert[i] = expert[i], s.count[i] = count[i];
    __syncthreads();
    for (int i = me; i < tiles; i += THREADS)
        if (s.count[i] > 0 && s.expert[i] >= 0 && s.expert[i] < l.experts)
            atomicAdd(&s.pairs[s.expert[i]], s.count[i]);
    __syncthreads();
    for (int e = me; e < l.experts; e += THREADS) {
        l.score[e] = s.score[e] = s.score[e] * l.fade + s.pairs[e];
        if (s.pairs[e]) l.heat[e] += s.pairs[e];
    }
    if (me == 0) list_missing(s, l, tiles);
    __syncthreads();
    for (int i = me; i < l.slot_count; i += THREADS) {
        int e = s.owner[i];  // scores are not negative: their bits are in their order
        s.key[i] = e == NOWHERE ? EMPTY : e == BARRED ? NEVER
                 : s.pairs[e] || s.home_of[e] == NOWHERE ? NEVER : __float_as_int(s.score[e]);
    }
    __syncthreads();
    if (me >= 32) return;
    int copied = 0;
    for (; copied < s.missed; copied++) {
        int low, slot = least(s, l.slot_count, low);
        if (low == NEVER) break;
        if (me == 0) {
            int e = s.missing[copied];
            move_in(s, l, e, slot);
            s.key[slot] = NEVER;
            int* job = l.jobs + LIST + JOB * copied;
            job[HOME] = s.home_of[e], job[SLOT] = slot, job[EXPERT] = e, job[PIECES_DONE] = 0;
            l.arrived[e] = 0;
        }
        __syncwarp();
    }
    if (me) return;
    l.jobs[COUNT] = copied;
    l.jobs[READY] = 0;
    *l.started = now();
    l.counts[HITS] += s.hits;
    l.counts[MISSES] += copied;
    l.counts[PASSED] += s.missed - copied;
    l.counts[STEPS] += 1;
    l.counts[PAIR_HITS] += s.pair_hits;
    l.counts[PAIRS] += s.pairs_in_all;
}

__device__ void set(int* flag) {
    __threadfence();
    *(volatile int*)flag = 1;
}

// A block has written its share of w1 and w3: after the last one `gate_up` goes on.
__device__ void ups_written(const Layer& l) {
    __syncthreads();
    if (threadIdx.x) return;
    __threadfence();
    if (atomicAdd(l.jobs + UP_DONE, 1) != (int)gridDim.x - 1) return;
    l.jobs[UP_DONE] = 0;
    set(l.jobs + READY);
}

// And a piece of a w2: after its last one `down` takes it. By then nothing is left to do here.
__device__ void down_written(const Layer& l, int* job, int pieces) {
    __syncthreads();
    if (threadIdx.x) return;
    __threadfence();
    if (atomicAdd(job + PIECES_DONE, 1) != pieces - 1) return;
    if (atomicAdd(l.jobs + DOWN_DONE, 1) == l.jobs[COUNT] - 1) {
        l.jobs[DOWN_DONE] = 0;
        l.counts[COPY_NS] += now() - *l.started;
    }
    set(l.arrived + job[EXPERT]);
}

// Every listed expert from its home to its slot, by any number of blocks: first w1 and w3 of all,
// then w2, beside which gemv.cu's `gate_up` multiplies the others, and `down` what has arrived.
extern "C" __global__ void __launch_bounds__(THREADS) fetch(const __grid_constant__ Layer l) {
    wait_for_inputs();
    const int jobs = l.jobs[COUNT], piece = THREADS * PIECES;  // of 16 bytes
    let_next_start();  // only now: `gate_up` reads what was written before, without waiting
    if (jobs == 0) return;
    int pieces[3];
    for (int m = 0; m < 3; m++) pieces[m] = (int)((l.bytes[m] / 16 + piece - 1) / piece);
    const int up = pieces[0] + pieces[1], ups = jobs * up, all = ups + jobs * pieces[2];
    bool of_up = true;
    for (int i = blockIdx.x; i < all; i += gridDim.x) {
        if (of_up && i >= ups) {
            ups_written(l);
            of_up = false;
        }
        int job = of_up ? i / up : (i - ups) / pieces[2];
        int part = of_up ? i % up : (i - ups) % pieces[2], m = of_up ? part >= pieces[0] : 2;
        if (m == 1) part -= pieces[0];
        int* at = l.jobs + LIST + JOB * job;
        const uint4* from = (const uint4*)(l.homes[m] + at[HOME] * l.bytes[m]);
        uint4* to = (uint4*)slot_at(l, m, at[SLOT]);
        int end = (int)(l.bytes[m] / 16), first = part * piece + threadIdx.x;
        uint4 held[PIECES];
#pragma unroll
        for (int j = 0; j < PIECES; j++)
            if (first + j * THREADS < end) held[j] = from[first + j * THREADS];
#pragma unroll
        for (int j = 0; j < PIECES; j++)
            if (first + j * THREADS < end) to[first + j * THREADS] = held[j];
        if (!of_up) down_written(l, at, pieces[2]);
    }
    if (of_up) ups_written(l);
}
