"""Checks and times gemv.cu on a GPU."""

import sys, time
import numpy as np, torch
from ds4.backends.cuda import qmatrix
from ds4.backends.cuda.kernels import gemv

dev = "cuda"
torch.manual_seed(0)


def rand(fmt, bits, group, stack, rows, cols):
    def u8(*s):
        return torch.randint(0, 256, s, dtype=torch.uint8, device=dev)

    if fmt == "f16":
        return qmatrix.from_values(
            (torch.randn(stack, rows, cols, device=dev) / cols**0.5).bfloat16()
        )
    codes = u8(stack, rows, cols * bits // 8)
    if fmt == "mxfp8":
        codes = (codes & 0x87) | torch.randint(
            4, 10, codes.shape, dtype=torch.uint8, device=dev
        ) << 3
    if fmt == "affine":
        s = (torch.rand(stack, rows, cols // group, device=dev) * 0.02 / 2**bits + 1e-4).bfloat16()
        z = -(s.float() * 2**bits * torch.rand_like(s.float())).bfloat16()
        return qmatrix.assemble(
            fmt, bits, group, (rows, cols), codes, s.view(torch.uint8), z.view(torch.uint8)
        )
    sc = torch.randint(116, 121, (stack, rows, cols // 32), dtype=torch.uint8, device=dev)
    return qmatrix.assemble(fmt, bits, 32, (rows, cols), codes, sc)


FMTS = [
    ("f16", 16, 0),
    ("mxfp8", 8, 32),
    ("mxfp4", 4, 32),
    ("affine", 2, 64),
    ("affine", 2, 128),
    ("affine", 3, 128),
    ("affine", 3, 64),
    ("affine", 4, 64),
    ("affine", 5, 64),
    ("affine", 6, 64),
    ("affine", 8, 64),
]


def rel(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def timed(fns, n=20):
    """us a call of a list of calls on rotating inputs, in a graph."""
    s = torch.cuda.Stream()
    with torch.cuda.stream(s):
        for f in fns:
            f()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for f in fns:
            f()
    for _ in range(3):
        g.replay()
    ts = []
    for _ in range(n):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        g.replay()
        b.record()
        b.synchronize()
        ts.append(a.elapsed_time(b))
    return sorted(ts)[n // 2] * 1e3 / len(fns)


def check():
    for fmt, bits, group in FMTS:
        for rows, cols, T in (
            (64, 256, 3),
            (512, 4096, 1),
            (1040, 1024, 5),
            (128, 2048, 17),
            (256, 8192, 32),
            (64, 128, 1),
        ):
            if fmt == "affine" and cols % group:
                continue
            m = rand(fmt, bits, group, 1, rows, cols)
            w = qmatrix.dequantize(m)[0]
            x = torch.randn(T, cols, device=dev) * torch.exp(torch.randn(T, 1, device=dev))
            out = torch.full((T, rows + 5), float("nan"), device=dev)
            half = gemv.panel(rows, T, dev).fill_(float("nan"))
            p = gemv.to_panel(x)
            gemv.linears([gemv.Product(m, p, out[:, :rows]), gemv.Product(m, p, half)], T)
            want = x.double() @ w.double().T
            exact = x.half().double() @ w.double().T
            e1, e2 = rel(out[:, :rows], want), rel(out[:, :rows], exact)
            e3 = rel(half[:, :T].transpose(0, 1).reshape(T, rows), exact)
            ok = e1 < 6e-4 and e2 < (3e-4 if fmt == "affine" else 2e-6) and e3 < 5e-4
            if not ok:
                print(
                    f"{fmt}{bits} g{group} {rows}x{cols} T={T}: {e1:.1e} to exact x {e2:.1e} half {e3:.1e} {'' if ok else 'WRONG'}",
                    flush=True,
                )


def tiles_of(ids):
    T, P = ids.shape
    groups = {}
    for t in range(T):
        for p in range(P):
            groups.setdefault(int(ids[t, p]), []).append(t * P + p)
    ts = []
    for e, pairs in sorted(groups.items()):
        for i in range(0, len(pairs), 8):
            ts.append((e, pairs[i : i + 8]))
    n = T * P
    ex = torch.zeros(n, dtype=torch.int32)
    ct = torch.zeros(n, dtype=torch.int32)
    pr = torch.full((n, 8), -7, dtype=torch.int32)
    for i, (e, pairs) in enumerate(ts):
        ex[i], ct[i] = e, len(pairs)
        pr[i, : len(pairs)] = torch.tensor(pairs)
    return gemv.Tiles(ex.cuda(), ct.cuda(), pr.cuda()), len(ts)


def moe_ref(routed, shared, x, ids, wts, limit):
    W = [qmatrix.dequantize(m).double() for m in routed]
    S = [qmatrix.dequantize(m)[0].double() for m in shared]

    def ex(a, b, c, x, w):
        g = (x @ a.T).clamp(max=limit)
        u = (x @ b.T).clamp(-limit, limit)
        return (torch.nn.functional.silu(g) * u * w) @ c.T

    y = ex(*S, x, 1.0)
    for t in range(len(x)):
        for p in range(ids.shape[1]):
            e = int(ids[t, p])
            y[t] += ex(W[0][e], W[1][e], W[2][e], x[t : t + 1], wts[t, p].double())[0]
    return y


def check_moe():
    for f1, f2, fs in (
        (("mxfp4", 4, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32)),
        (("affine", 2, 128), ("affine", 2, 64), ("affine", 6, 64)),
    ):
        for T in (1, 3, 20):
            E, D, I = 16, 1024, 512
            routed = (rand(*f1, E, I, D), rand(*f1, E, I, D), rand(*f2, E, D, I))
            shared = (rand(*fs, 1, I, D), rand(*fs, 1, I, D), rand(*fs, 1, D, I))
            x = torch.randn(T, D, device=dev)
            ids = torch.stack([torch.randperm(E)[:6] for _ in range(T)])
            wts = torch.rand(T, 6, device=dev)
            tiles, _ = tiles_of(ids)
            y = torch.full((T, D), float("nan"), device=dev)
            gemv.experts(routed, shared, gemv.to_panel(x), tiles, wts, 10.0, y)
            print(
                "moe",
                f1,
                f2,
                T,
                f"{rel(y, moe_ref(routed, shared, x.half().double(), ids, wts, 10.0)):.1e}",
                flush=True,
            )


def bench():
    print("copy:", end=" ")
    a = torch.empty(1 << 30, dtype=torch.uint8, device=dev)
    b = torch.empty_like(a)
    us = timed([lambda: b.copy_(a)])
    bw = 2 * a.numel() / us / 1e6
    print(f"{bw:.2f} TB/s")
    del a, b
    shapes = {
        "wq_b": (32768, 1024),
        "wo_b": (4096, 8192),
        "wq_a": (1024, 4096),
        "head": (129280, 4096),
    }
    import os

    for fmt, bits, group in FMTS:
        if (fmt, bits, group) not in (
            ("f16", 16, 0),
            ("mxfp8", 8, 32),
            ("mxfp4", 4, 32),
            ("affine", 2, 128),
            ("affine", 6, 64),
        ):
            continue
        line = f"{fmt}{bits} g{group}: "
        for name, (rows, cols) in shapes.items():
            nb = rows * cols * bits // 8
            k = max(3, min(12, int(400e6 / nb)))
            ms = [rand(fmt, bits, group, 1, rows, cols) for _ in range(k)]
            for T in (1, 8, 32):
                if T > 1 and name not in ("wo_b",):
                    continue
                if T > 8 and fmt != "mxfp8":
                    continue
                x = [gemv.to_panel(torch.randn(T, cols, device=dev)) for _ in ms]
                out = [torch.empty(T, rows, device=dev) for _ in ms]
                us = timed(
                    [
                        lambda m=m, x=x, o=o: gemv.linears([gemv.Product(m, x, o)], T)
                        for m, x, o in zip(ms, x, out)
                    ]
                )
                line += f"{name} T{T} {us:.1f}us {ms[0].nbytes / us / 1e3:.0f} | "
            del ms
        print(line, flush=True)
    # joined CSA inputs
    sets = []
    for _ in range(8):
        mats = [
            rand("mxfp8", 8, 32, 1, 1024, 4096),
            rand("mxfp8", 8, 32, 1, 512, 4096),
            rand("f16", 16, 0, 1, 2048, 4096),
            rand("f16", 16, 0, 1, 512, 4096),
            rand("f16", 16, 0, 1, 64, 4096),
        ]
        x = gemv.to_panel(torch.randn(1, 4096, device=dev))
        o = torch.empty(1, 4160, device=dev)
        ps, at = [], 0
        for m in mats:
            ps.append(gemv.Product(m, x, o[:, at : at + m.rows]))
            at += m.rows
        sets.append(ps)
    us = timed([lambda ps=ps: gemv.linears(ps, 1) for ps in sets])
    nb = sum(p.matrix.nbytes for p in sets[0])
    print(
        f"joined CSA inputs: {us:.1f} us, {nb / us / 1e3:.0f} GB/s of {nb / 1e6:.1f} MB; floor {nb / bw / 1e6:.1f}"
    )
    del sets
    for f1, f2, fs, label in (
        (("mxfp4", 4, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), "native"),
        (("affine", 2, 128), ("affine", 2, 64), ("affine", 6, 64), "q2"),
    ):
        routed = (
            rand(*f1, 256, 2048, 4096),
            rand(*f1, 256, 2048, 4096),
            rand(*f2, 256, 4096, 2048),
        )
        shared = (rand(*fs, 1, 2048, 4096), rand(*fs, 1, 2048, 4096), rand(*fs, 1, 4096, 2048))
        for T in (1, 8, 32):
            calls, tot = [], 0
            for _ in range(8):
                ids = torch.stack([torch.randperm(256)[:6] for _ in range(T)])
                tl, n = tiles_of(ids)
                d = len(set(ids.flatten().tolist()))
                tot += d * sum(m.blob.shape[1] for m in routed) + sum(m.nbytes for m in shared)
                x = gemv.to_panel(torch.randn(T, 4096, device=dev))
                y = torch.empty(T, 4096, device=dev)
                w = torch.rand(T, 6, device=dev)
                calls.append(
                    lambda x=x, tl=tl, w=w, y=y: gemv.experts(routed, shared, x, tl, w, 10.0, y)
                )
            us = timed(calls)
            nb = tot / 8
            print(
                f"moe {label} T={T}: {us:.1f} us, {nb / us / 1e3:.0f} GB/s, floor {nb / bw / 1e6:.1f} us",
                flush=True,
            )
        del routed, shared
    t0 = time.time()


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__)
    for i, blocks in enumerate((3, 4, 2)):
        gemv._A_MULTIPROCESSOR = blocks
        gemv._resident_blocks.cache_clear()
        print("##### blocks", blocks)
        if i == 0:
            check()
            check_moe()
        bench()
