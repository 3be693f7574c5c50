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

// d[64][N] += a[64][16] x[16][N]; `x` is the shared address of the first token's 16 inputs.
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
              "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define S0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define S8 S0 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define S16 S8 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define S24 S16 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define S32 S24 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define S40 S32 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define S48 S40 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define S56 S48 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define S64 S56 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define S72 S64 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define S80 S72 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define S88 S80 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define S96 S88 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define S104 S96 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define S112 S104 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define S120 S112 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define MMA(n, accs, a0, a1, a2, a3, b, ...)                                                   \
    if constexpr (N == n)                                                                      \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" accs "}, {%" #a0 \
                     ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", 1, 1, 1, 0;"                      \
                     : __VA_ARGS__                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc));

template <int N> __device__ void product(float (&d)[N / 2], const u32* a, u32 x) {
    u64 desc = (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16 | (x & 0x3FFFF) >> 4;
    MMA(16, S0, 8, 9, 10, 11, 12, D8(0))
    MMA(32, S8, 16, 17, 18, 19, 20, D8(0), D8(8))
    MMA(48, S16, 24, 25, 26, 27, 28, D8(0), D8(8), D8(16))
    MMA(64, S24, 32, 33, 34, 35, 36, D8(0), D8(8), D8(16), D8(24))
    MMA(80, S32, 40, 41, 42, 43, 44, D8(0), D8(8), D8(16), D8(24), D8(32))
    MMA(96, S40, 48, 49, 50, 51, 52, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40))
    MMA(112, S48, 56, 57, 58, 59, 60, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48))
    MMA(128, S56, 64, 65, 66, 67, 68, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56))
    MMA(144, S64, 72, 73, 74, 75, 76, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64))
    MMA(160, S72, 80, 81, 82, 83, 84, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72))
    MMA(176, S80, 88, 89, 90, 91, 92, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72), D8(80))
    MMA(192, S88, 96, 97, 98, 99, 100, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72), D8(80), D8(88))
    MMA(208, S96, 104, 105, 106, 107, 108, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72), D8(80), D8(88), D8(96))
    MMA(224, S104, 112, 113, 114, 115, 116, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72), D8(80), D8(88), D8(96), D8(104))
    MMA(240, S112, 120, 121, 122, 123, 124, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72), D8(80), D8(88), D8(96), D8(104), D8(112))
    MMA(256, S120, 128, 129, 130, 131, 132, D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72), D8(80), D8(88), D8(96), D8(104), D8(112), D8(120))
}
