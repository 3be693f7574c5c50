"""How fast experts come from host memory, by which way: what place.cu's `fetch` should do.

    python -m bench.link [--out bench/results/link.jsonl] [--gb 6]

Experts of the real size (three matrices of 4.46 MB) at random places of pinned memory are copied to
random slots: by the copy engine, and by kernels with several sizes of loads, blocks and pieces, by
plain loads or by Hopper's bulk copies through shared memory. One expert, and four, at a time; bytes
are compared after each way.
"""

import argparse
import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ds4.backends.cuda.nvrtc import Module
from ds4.backends.cuda.placement.pinned import PinnedPool
from torch import Tensor

from .machine import Clock, describe

MATRIX = 2048 * 4096 * 17 // 32 + 48  # bytes: mxfp4 with its scales and base
ROUNDS = 24

SOURCE = r"""
typedef unsigned long long u64;
#define READ(HOW, to, at) asm volatile("ld.global" HOW ".v4.u32 {%0, %1, %2, %3}, [%4];" \
    : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(at))
// Pieces of a block: as the threads lie, or (WARPS) each warp's together.
extern "C" __global__ void __launch_bounds__(THREADS)
loads(const u64* from, const u64* to, int jobs, int bytes) {
    const int piece = THREADS * PIECES, each = (bytes / 16 + piece - 1) / piece, end = bytes / 16;
#ifdef WARPS
    const int mine = threadIdx.x / 32 * 32 * PIECES + threadIdx.x % 32, step = 32;
#else
    const int mine = threadIdx.x, step = THREADS;
#endif
    for (int i = blockIdx.x; i < jobs * each; i += gridDim.x) {
        int job = i / each, first = i % each * piece + mine;
        const uint4* source = (const uint4*)from[job];
        uint4* target = (uint4*)to[job];
        uint4 held[PIECES];
#pragma unroll
        for (int j = 0; j < PIECES; j++)
            if (first + j * step < end) {
#ifdef HOW
                READ(HOW, held[j], source + first + j * step);
#else
                held[j] = source[first + j * step];
#endif
            }
#pragma unroll
        for (int j = 0; j < PIECES; j++)
            if (first + j * step < end) target[first + j * step] = held[j];
    }
}

// By way of shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
aside(const u64* from, const u64* to, int jobs, int bytes) {
    extern __shared__ uint4 kept[];
    const int piece = THREADS * PIECES, each = (bytes / 16 + piece - 1) / piece, end = bytes / 16;
    for (int i = blockIdx.x; i < jobs * each; i += gridDim.x) {
        int job = i / each, first = i % each * piece + threadIdx.x;
        const uint4* source = (const uint4*)from[job];
        uint4 *target = (uint4*)to[job], *mine = kept + threadIdx.x;
#pragma unroll
        for (int j = 0; j < PIECES; j++)
            if (first + j * THREADS < end)
                asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;"
                             ::"r"((unsigned)__cvta_generic_to_shared(mine + j * THREADS)),
                             "l"(source + first + j * THREADS) : "memory");
        asm volatile("cp.async.commit_group;\n cp.async.wait_all;" ::: "memory");
#pragma unroll
        for (int j = 0; j < PIECES; j++)
            if (first + j * THREADS < end) target[first + j * THREADS] = mine[j * THREADS];
    }
}

#if defined(BULK) && __CUDA_ARCH__ >= 900
__device__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// One thread a block: STAGES pieces of BULK bytes on their way.
extern "C" __global__ void bulk(const u64* from, const u64* to, int jobs, int bytes) {
    extern __shared__ __align__(128) unsigned char room[];
    __shared__ u64 full[STAGES];
    if (threadIdx.x) return;
    for (int s = 0; s < STAGES; s++)
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(full + s)));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    int each = (bytes + BULK - 1) / BULK, all = jobs * each;
    int mine = blockIdx.x < all ? (all - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
    auto load = [&](int k) {
        int i = blockIdx.x + k * gridDim.x, part = i % each, s = k % STAGES;
        unsigned size = part == each - 1 ? bytes - part * BULK : BULK;
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                     ::"r"(shared_address(full + s)), "r"(size) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                     " [%0], [%1], %2, [%3];"
                     ::"r"(shared_address(room + s * BULK)), "l"(from[i / each] + part * BULK),
                     "r"(size), "r"(shared_address(full + s)) : "memory");
    };
    for (int k = 0; k < STAGES && k < mine; k++) load(k);
    for (int k = 0; k < mine; k++) {
        int i = blockIdx.x + k * gridDim.x, part = i % each, s = k % STAGES;
        unsigned size = part == each - 1 ? bytes - part * BULK : BULK;
        unsigned done = 0, parity = k / STAGES & 1;
        while (!done)
            asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2;"
                         " selp.u32 %0, 1, 0, p; }"
                         : "=r"(done) : "r"(shared_address(full + s)), "r"(parity) : "memory");
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                     ::"l"(to[i / each] + part * BULK), "r"(shared_address(room + s * BULK)),
                     "r"(size) : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        if (k > 0 && k - 1 + STAGES < mine) {
            asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
            load(k - 1 + STAGES);
        }
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
#endif
"""

Way = Callable[[Tensor, Tensor, int], None]  # addresses from, addresses to, matrices


class Bench:
    def __init__(self, gb: float, out: str | None) -> None:
        self.out = out
        self.count = int(gb * 1e9) // MATRIX
        pool = PinnedPool([self.count * MATRIX + (1 << 20)], "cuda:0")
        self.homes = pool.take(self.count, MATRIX)
        self.slots = torch.zeros(min(self.count, 400), MATRIX, dtype=torch.uint8, device="cuda")
        for start in range(0, self.count, 64):
            some = self.homes[start : start + 64]
            some.copy_(torch.randint(0, 256, some.shape, dtype=torch.uint8, device="cuda"))
        self.rng = np.random.default_rng(0)
        print(f"pinned {pool.nbytes / 1e9:.1f} GB at {pool.nbytes / pool.seconds / 1e9:.1f} GB/s")

    def lists(self, experts: int) -> tuple[list[int], list[int], Tensor, Tensor]:
        """Homes and slots of so many experts' matrices, and their addresses on the device."""
        homes = self.rng.choice(self.count, 3 * experts, replace=False).tolist()
        slots = self.rng.choice(len(self.slots), 3 * experts, replace=False).tolist()
        at = [
            torch.tensor([base + i * MATRIX for i in rows], device="cuda")
            for base, rows in ((self.homes.data_ptr(), homes), (self.slots.data_ptr(), slots))
        ]
        return homes, slots, at[0], at[1]

    def measure(self, name: str, way: Callable[..., None], experts: int) -> None:
        every = [self.lists(experts) for _ in range(ROUNDS)]
        clock = Clock("cuda")
        for i, given in enumerate(every):
            if i >= 4:
                clock.mark()
            way(*given)
        clock.mark()
        seconds = float(np.median(clock.intervals()))
        homes, slots, *_ = every[-1]
        wrong = sum(
            int((self.slots[s].cpu() != self.homes[h]).sum())
            for h, s in zip(homes, slots, strict=True)
        )
        rate = 3 * experts * MATRIX / seconds / 1e9
        row = {"bench": "link", "way": name, "experts": experts, "us": round(seconds * 1e6, 1)}
        row |= {"gb_s": round(rate, 2), "wrong_bytes": wrong}
        print(row, flush=True)
        if self.out:
            Path(self.out).parent.mkdir(parents=True, exist_ok=True)
            with open(self.out, "a") as file:
                file.write(json.dumps(row | describe("cuda:0")) + "\n")

    def engine(self, homes: list[int], slots: list[int], *_: Any) -> None:
        for home, slot in zip(homes, slots, strict=True):
            self.slots[slot].copy_(self.homes[home], non_blocking=True)


def kernel(name: str, blocks: int, threads: int, shared: int, *options: str) -> Callable[..., None]:
    made = Module(SOURCE, [f"-DTHREADS={threads}", *options]).kernel(name, shared)

    def way(homes: list[int], slots: list[int], at: Tensor, to: Tensor) -> None:
        given = (ctypes.c_uint64(x.data_ptr()) for x in (at, to))
        made((blocks, 1, 1), threads, *given, ctypes.c_int(len(homes)), ctypes.c_int(MATRIX))

    return way


def main() -> None:
    parser = argparse.ArgumentParser(description="ways of copying experts to the GPU")
    parser.add_argument("--out")
    parser.add_argument("--gb", type=float, default=6.0)
    args = parser.parse_args()
    torch.zeros(1, device="cuda")
    bench = Bench(args.gb, args.out)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    ways: dict[str, Callable[..., None]] = {"copy engine": bench.engine}
    for blocks, threads, pieces, how in (
        (sms, 256, 8, ""), (sms, 256, 8, "WARPS"), (sms, 256, 8, ".L2::256B"), (sms, 256, 8, ".cv"),
        (sms, 256, 8, ".nc.L1::no_allocate.L2::256B"), (sms, 256, 8, ".L1::no_allocate"),
        (sms, 512, 8, ""), (2 * sms, 512, 4, ""), (sms, 128, 2, ""), (64, 256, 4, ""),
        (32, 256, 4, ""), (32, 256, 8, ""), (16, 512, 8, ""), (16, 1024, 4, ""), (8, 1024, 4, ""),
    ):  # fmt: skip
        name = f"loads {how}, {blocks} blocks of {threads}, {pieces} each"
        more = [] if not how else ["-DWARPS"] if how == "WARPS" else [f'-DHOW="{how}"']
        ways[name] = kernel("loads", blocks, threads, 0, f"-DPIECES={pieces}", *more)
    for blocks in (sms, 32):
        name = f"loads aside, {blocks} blocks of 256, 8 each"
        ways[name] = kernel("aside", blocks, 256, 256 * 8 * 16, "-DPIECES=8")
    for blocks, size, stages in ((sms, 16384, 8), (sms, 4096, 16), (16, 32768, 6)):
        name = f"bulk, {blocks} blocks, {stages} of {size} bytes"
        given = "-DPIECES=1", f"-DBULK={size}", f"-DSTAGES={stages}"
        ways[name] = kernel("bulk", blocks, 32, size * stages, *given)
    for name, way in ways.items():
        for experts in (4, 1):
            bench.measure(name, way, experts)


if __name__ == "__main__":
    main()
