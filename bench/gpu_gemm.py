"""Checks and times gemm.cu on a GPU: dense matrices and experts of many tokens.

python -m bench.gpu_gemm [check]
"""

# ruff: noqa: B023, E731, E501
import io
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import product

import torch
from ds4.backends.cuda import nvrtc, qmatrix
from ds4.backends.cuda.ahead import compile_only
from ds4.backends.cuda.kernels import dense, gemm, moe_gemm

from .machine import named_parts

DEV = "cuda"
FORMATS = [
    ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("f16", 16, 0), ("affine", 2, 64), ("affine", 2, 128),
    ("affine", 3, 64), ("affine", 3, 128), ("affine", 4, 64), ("affine", 5, 64),
    ("affine", 6, 64), ("affine", 8, 64), ("affine", 8, 128),
]  # fmt: skip


def u8(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEV)


def rand(fmt, bits, group, stack, rows, cols):
    if fmt == "f16":
        values = torch.randn(stack, rows, cols, device=DEV) / cols**0.5
        return qmatrix.from_values(values.bfloat16())
    codes = u8(stack, rows, cols * bits // 8)
    if fmt == "mxfp8":
        codes = (codes & 0x87) | (4 + u8(*codes.shape) % 6) << 3
    if fmt == "affine":
        s = (torch.rand(stack, rows, cols // group, device=DEV) - 0.5) * 0.08 / 2**bits
        z = -s * 2**bits * torch.rand_like(s)
        parts = (x.bfloat16().view(torch.uint8) for x in (s, z))
        return qmatrix.assemble(fmt, bits, group, (rows, cols), codes, *parts)
    scales = 112 + u8(stack, rows, cols // 32) % 9
    return qmatrix.assemble(fmt, bits, 32, (rows, cols), codes, scales)


def plan(ids, experts):
    pairs = ids.flatten()
    order = pairs.argsort(stable=True)
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=DEV)
    offsets[1:] = pairs.bincount(minlength=experts).cumsum(0)
    weights = torch.rand(len(pairs), device=DEV) + 0.1
    return gemm.Routed(order.int(), offsets, weights, ids.shape[1])


def uniform(tokens, choices, experts):
    return torch.rand(tokens, experts, device=DEV).topk(choices, -1)[1]


def one(m, e):
    return qmatrix.dequantize(replace(m, blob=m.blob[e : e + 1], ptrs=m.ptrs[e : e + 1]))[0]


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def reference(ws, x, limit, weight):
    w1, w3, w2 = ws
    gate, up = x.double() @ w1.double().T, x.double() @ w3.double().T
    h = torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return (h * weight[:, None]) @ w2.double().T


def check_dense():
    worst: dict[tuple, float] = {}
    for fmt, bits, group in FORMATS:
        m = rand(fmt, bits, group, 1, 320, 896)
        w = one(m, 0).double()
        for tokens in (1, 33, 100, 300):
            x = torch.randn(tokens, 896 + 64, device=DEV).half()[:, :896]
            want = x.double() @ w.T
            ordered = gemm.permute(x, m)
            for t in gemm.TILES if fmt == "mxfp4" else (16, 128) if tokens == 100 else (32,):
                for parts in (1, 2):
                    build = gemm.Build(fmt, bits, group, t, parts)
                    if not gemm.has_room(build, gemm.chip(0)):
                        continue
                    out = torch.full((tokens, 400), float("nan"), device=DEV)[:, 40:360]
                    gemm.product(m, None, ordered, out, tokens, t, parts)
                    e = error(out, want)
                    worst[fmt, bits, group] = max(worst.get((fmt, bits, group), 0), e)
                    if not e < 1e-3:
                        print("WRONG", fmt, bits, group, tokens, t, parts, e)
            out = torch.full((tokens, 320), float("nan"), device=DEV).half()
            gemm.linear(m, ordered, out)
            if not error(out, want) < 1e-3:
                print("WRONG fp16 out", fmt, bits, tokens, error(out, want))
            for way in (True, False):
                dense.unpacks = lambda *_: way
                out = torch.full((tokens, 400), float("nan"), device=DEV)[:, 40:360]
                dense.linears([m], x, [out])
                if not error(out, want) < 1e-3:
                    print("WRONG", "unpacked" if way else "packed", fmt, bits, error(out, want))
    print("dense, worst relative error:", {k: f"{v:.1e}" for k, v in worst.items()})
    m = rand("mxfp8", 8, 32, 1, 8 * 1024, 4096)
    x = torch.randn(133, 8 * 4096, device=DEV).half()
    w = one(m, 0).view(8, 1024, 4096)
    want = torch.einsum("tgi,goi->tgo", x.view(133, 8, 4096).double(), w.double()).flatten(1)
    for way in (True, False):
        dense.unpacks = lambda *_: way
        out = torch.full((133, 8192), float("nan"), device=DEV).half()
        dense.grouped(m, x, out, 8)
        wrong = "" if error(out, want) < 1e-3 else "WRONG "
        print(f"{wrong}wo_a in 8 groups, {'un' * way}packed: {error(out, want):.1e}")
    large = (x.float() * 6e4).clamp(-dense.LARGEST, dense.LARGEST).half()
    dense.unpacks = lambda *_: True
    dense.grouped(m, large, out, 8)
    want = torch.einsum("tgi,goi->tgo", large.view(133, 8, 4096).double(), w.double()).flatten(1)
    kept = want.clamp(-dense.LARGEST, dense.LARGEST)
    if torch.equal(kept, want) or not error(out, kept) < 1e-3:
        print("WRONG saturated", error(out, kept))


def check_experts():
    E = 8
    for (fmt, bits, group), width in product(FORMATS, (384, 512)):  # by gemm.cu, gemm_clusters.cu
        dims = (256, width)
        ws = [rand(fmt, bits, group, E, *s) for s in (dims, dims, dims[::-1])]
        other = ("affine", 6, 64) if fmt == "mxfp4" else ("mxfp8", 8, 32)
        shared = [rand(*other, 1, *s) for s in (dims, dims, dims[::-1])]
        skewed, one_expert = uniform(150, 3, E) // 3 * 3, torch.full((150, 3), 5, device=DEV)
        several = [uniform(T, 3, E) for T in (150, 235, 275)]  # tiles of other sizes
        for ids in (*several, skewed, one_expert):
            T = len(ids)
            p, x = plan(ids, E), torch.randn(T, width, device=DEV).half()
            out = torch.full((T, width), float("nan"), device=DEV)
            moe_gemm.experts(ws, shared, x, p, 1.5, out)
            want = reference((one(m, 0) for m in shared), x, 1.5, torch.ones(T, device=DEV))
            weights = p.weights.view(T, 3)
            for e in range(E):
                for k in range(3):
                    t = (ids[:, k] == e).nonzero()[:, 0]
                    want[t] += reference((one(m, e) for m in ws), x[t], 1.5, weights[t, k])
            if not error(out, want) < 1e-3:
                print("WRONG experts", fmt, bits, group, error(out, want))
    print(f"experts, last relative error: {error(out, want):.1e}")


def ms(f, rounds=7):
    f()
    times = []
    for _ in range(rounds):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(), f(), b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times)[rounds // 2]


def time_experts(fmt, bits, group, sizes, tiles):
    D, F, E, K = 4096, 2048, 256, 6
    w1, w3, w2 = (rand(fmt, bits, group, E, *s) for s in ((F, D), (F, D), (D, F)))
    for T in sizes:
        x, p = torch.randn(T, D, device=DEV).half(), plan(uniform(T, K, E), E)
        count, flops = T * K, 2 * T * K * F * D
        hidden = torch.empty(count, F, dtype=torch.float16, device=DEV)
        each = torch.full((count, D), float("nan"), device=DEV)
        out = torch.zeros(T, D, device=DEV)
        xp = gemm.permute(x, w1)
        for t in tiles or [moe_gemm.tile_tokens(w1, count)]:
            up = lambda: gemm.product(w1, w3, xp, hidden, count, t, 2, p, 10.0, gemm.spread(w2))
            down = lambda: gemm.product(w2, None, hidden, each, count, t, 2, p)
            a, b = ms(up), ms(down)
            print(
                f"{fmt}{bits} g{group} T={T:5} tile {t:3}: gate+up {a:6.3f} ms {2 * flops / a / 1e9:4.0f}"
                f" TFLOP/s, down {b:6.3f} ms {flops / b / 1e9:4.0f}, both {a + b:6.3f}"
            )
        c, d = ms(lambda: gemm.combine(each, out, K)), ms(lambda: gemm.permute(x, w1))
        print(f"    combine {c:.3f}, permute {d:.3f}")
        for e in (0, 255):
            rows = p.order[p.offsets[e] : p.offsets[e + 1]].long()
            want = reference((one(m, e) for m in (w1, w3, w2)), x[rows // K], 10.0, p.weights[rows])
            if len(rows) and not error(each[rows], want) < 1e-3:
                print("WRONG", fmt, T, e, error(each[rows], want))


def time_dense():
    a = torch.randn(8192, 8192, device=DEV).half()
    ceiling = 2 * 8192**3 / ms(lambda: a @ a) / 1e9
    print(f"cuBLAS fp16 8192^3: {ceiling:.0f} TFLOP/s")
    shapes = {"wq_b": (32768, 1024), "wo_b": (4096, 8192), "wq_a": (1024, 4096), "wkv": (512, 4096)}
    for fmt, bits, group in (("mxfp8", 8, 32), ("affine", 6, 64)):
        for name, (rows, cols) in shapes.items():
            m, w = rand(fmt, bits, group, 1, rows, cols), torch.randn(rows, cols, device=DEV).half()
            for T in (64, 512, 2048, 8192):
                x = torch.randn(T, cols, device=DEV).half()
                out, xp = torch.empty(T, rows, device=DEV), gemm.permute(x, m)
                line = f"{fmt}{bits} {name} T={T}: auto {gemm.tile(m, T, rows)}"
                for choice in (gemm.tile(m, T, rows), (128, 2), (64, 2), (64, 1), (32, 1)):
                    mine = ms(lambda: gemm.product(m, None, xp, out, T, *choice))
                    line += f" {choice} {mine * 1e3:.0f} us {2 * T * rows * cols / mine / 1e9:.0f},"
                blas = ms(lambda: torch.mm(x, w.T))
                print(
                    f"{line} cuBLAS fp16 {blas * 1e3:.0f} us {2 * T * rows * cols / blas / 1e9:.0f}"
                )


def warm():
    """Compile everything on all cores."""
    chip, builds = gemm.chip(0), set()
    for f in FORMATS:
        for t in gemm.TILES:
            for parts, gated, half, mixed in (
                *[(1, 0, 0, 0), (2, 0, 0, 0), (2, 1, 0, 0), (1, 0, 1, 0), (2, 0, 1, 0)],
                *[(2, 1, 0, 1), (2, 0, 0, 1)],
            ):
                b = gemm.Build(*f, t, parts, bool(gated), bool(half), bool(mixed))
                if gemm.has_room(b, chip):
                    builds.add(b)
    start = time.time()
    with ThreadPoolExecutor(16) as pool:
        arch = f"--gpu-architecture={nvrtc._architecture()}"
        compile = lambda b: nvrtc._cached(gemm.source(), (arch, *b.options(chip)))
        list(pool.map(compile, sorted(builds, key=lambda b: -b.tokens * b.parts * (1 + b.mixed))))
    print(f"{len(builds)} builds compiled in {time.time() - start:.1f} s")


CHECKS = check_dense, check_experts
TIMES = (
    lambda: time_experts("mxfp4", 4, 32, (64, 512, 2048, 8192), (32, 64, 128)),
    time_dense,
    lambda: time_experts("affine", 2, 128, (512, 2048, 8192), None),
    lambda: time_experts("affine", 3, 128, (8192,), None),
)

if __name__ == "__main__":
    given = named_parts(__doc__, "check")
    torch.manual_seed(int(time.time()))
    start = time.time()
    if given:
        with redirect_stdout(io.StringIO()), compile_only():  # of results that nothing made
            for part in CHECKS:
                part()
    else:
        warm()
    for part in CHECKS if given else CHECKS + TIMES:
        part()
        torch.cuda.synchronize()
        print(f"  [{time.time() - start:.0f} s]", flush=True)
