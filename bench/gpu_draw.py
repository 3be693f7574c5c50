"""Draws from the vocabulary on a GPU: checked against float64, then timed in CUDA graphs."""

import sys

import numpy as np
import torch
from ds4.backends.cuda.kernels import draw as D
from ds4.backends.cuda.ops import Cuda

from bench.gpu_hyper import graph_us

V, dev = 129280, "cuda"


def exact(logits, t, k, top_p, min_p, u):
    """The rule in float64; and how far u is from the next token's share."""
    x = logits.double().cpu().numpy()
    if t == 0:
        return int(x.argmax()), 1.0
    order = np.argsort(-x, kind="stable")[: k or None]
    p = np.exp((x[order] - x.max()) / float(t))
    p /= p.sum()
    p = p[(p.cumsum() - p < top_p) & (p >= min_p * p[0])]
    running = p.cumsum()
    place = min(int((running <= u * running[-1]).sum()), len(p) - 1)
    return int(order[place]), float(np.abs(running / running[-1] - u).min())


def check(rows, spread):
    rng = np.random.default_rng()
    f = lambda *v: torch.tensor(rng.choice(v, rows), dtype=torch.float32, device=dev)
    logits = torch.randn(rows, V, device=dev) * spread
    if spread == 3:
        logits = (logits * 8).round() / 8
    t, p, m = f(0, 0.3, 1, 1, 2.5), f(0.3, 0.9, 0.95, 1), f(0, 0, 0.02, 0.5)
    u = torch.rand(rows, device=dev)
    k = torch.tensor(
        rng.choice([0, 1, 5, 50, 3000, V, 200000], rows), dtype=torch.int32, device=dev
    )
    for top_k in (None, k):
        got = D.draw(logits, t, top_k, p, m, u).tolist()
        for r in range(rows):
            rule = [float(a[r]) for a in (p, m, u)]
            want, gap = exact(logits[r], float(t[r]), int(k[r]) if top_k is not None else 0, *rule)
            if want != got[r]:
                near = "" if gap > 2e-7 else " (within rounding)"
                print(
                    f"row {r} got {got[r]} want {want} gap {gap:.1e} t {t[r]:.1f} k {k[r]} {rule}{near}"
                )
                assert gap < 3e-6
    print("rows", rows, "spread", spread, "ok")


def main():
    for rows, spread in ((1, 1), (7, 0.1), (16, 3), (16, 10)):
        check(rows, spread)
    be = Cuda()
    for rows in (1, 32):
        for spread in (4,):
            x = torch.randn(rows, V, device=dev) * spread
            a = [torch.full((rows,), v, device=dev) for v in (0.8, 0.95, 0.0, 0.3)]
            k = torch.full((rows,), 50, dtype=torch.int32, device=dev)
            for step, chunk, warps in (
                (128, 1024, 4),
                (64, 1024, 2),
                (64, 1024, 1),
                (32, 1024, 1),
                (128, 2048, 2),
            ):
                D.STEP, D.CHUNK, D.WARPS = step, chunk, warps
                us = graph_us([lambda: D.draw(x, a[0], None, *a[1:])] * 4)
                usk = graph_us([lambda: D.draw(x, a[0], k, *a[1:])] * 4)
                print(
                    f"R {rows} spread {spread} step {step} chunk {chunk} warps {warps}: {us:.1f} us, with top_k {usk:.1f}"
                )
            t = graph_us([lambda: be.sample(x, a[0], k, *a[1:])] * 2)
            print(f"R {rows} torch {t:.0f} us; greedy floor {rows * V * 4 / 3e6:.2f}")


if __name__ == "__main__":
    main()
