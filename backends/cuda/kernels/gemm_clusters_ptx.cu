// What gemm_clusters.cu says in PTX: barriers in shared memory, bulk copies, products (wgmma).

__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ void cluster_wait() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

template <int N> __device__ void more_registers() {  // for a warpgroup
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> __device__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

__device__ void barrier_init(u32 at, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}

__device__ void barriers_are_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ void barrier_wait(u32 at, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(at), "r"(parity)
                     : "memory");
    } while (!done);
}

__device__ void barrier_expect(u32 at, int bytes) {  // and arrives
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                 : "memory");
}

__device__ void barrier_arrive(u32 at, u32 rank) {  // of block `rank` of the cluster
    asm volatile("{\n.reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(at),
                 "r"(rank)
                 : "memory");
}

// To the same address of both blocks of a cluster, and to their barriers.
__device__ void copy_to_both(u32 to, const void* from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "h"((u16)3)
                 : "memory");
}

__device__ void copiers_meet() { asm volatile("barrier.sync 1, 128;" ::: "memory"); }

__device__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ u32 transposed(u32 x) {  // 8 x 8 matrices of 16 bits
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ u16 to_half(float x) {
    u16 y;
    x = fminf(fmaxf(x, -65504.f), 65504.f);
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// What is computed of this is computed below.
__device__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }

__device__ void pin(u32& x) { asm volatile("" : "+r"(x)); }

__device__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING> __device__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// d[64][N] += a[64][16] x[16][N], of which gemm_clusters.py writes one for each size of a tile. `x`
// describes where the first token's 16 inputs are: rows of 128 bytes, swizzled.
template <int N> __device__ void product(float (&d)[N / 2], const u32* a, u64 x);

__device__ u64 described(u32 at) {  // plus 1 is 16 bytes further
    return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16 | at >> 4;
}
