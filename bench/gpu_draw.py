"""Draws from the vocabulary on a GPU: checked against float64, or timed in CUDA graphs.

python -m bench.gpu_draw [check]
"""

import random
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

    def f(*values):
        return torch.tensor(rng.choice(values, rows), dtype=torch.float32, device=dev)

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
                    f"row {r} got {got[r]} want {want} gap {gap:.1e} t {t[r]:.1f} k {k[r]}"
                    f" {rule}{near}"
                )
                assert gap < 1e-5  # of the total: float32 sums over a vocabulary
    print("rows", rows, "spread", spread, "ok")


def time_draw():
    be = Cuda("cuda")
    for rows in (1, 8, 32):
        x = torch.randn(rows, V, device=dev) * 4
        heat, *rule = [torch.full((rows,), v, device=dev) for v in (0.8, 0.95, 0.0, 0.3)]
        k, none = torch.full((2, rows), 50, dtype=torch.int32, device=dev)
        none.zero_()
        cold = torch.zeros_like(heat)
        line = f"R {rows:3d} draw"
        for name, args in {
            "top_p": (x, heat, None, *rule),
            "top_k and top_p": (x, heat, k, *rule),
            "top_k of 0": (x, heat, none, *rule),
            "temperature 0": (x, cold, none, *rule),
        }.items():
            line += f", {name} {graph_us([lambda a=args: D.draw(*a)] * 4):.1f} us"
        sorted_us = graph_us([lambda a=(x, heat, k, *rule): be.sample(*a)] * 2)
        print(f"{line}; sorting with torch {sorted_us:.0f} us")


if __name__ == "__main__":
    torch.manual_seed(random.randrange(1 << 30))
    if "check" in sys.argv:
        for rows, spread in ((1, 1), (7, 0.1), (16, 3), (16, 10)):
            check(rows, spread)
    else:
        time_draw()
