"""Draws from the vocabulary on a GPU: checked against float64, or timed in CUDA graphs.

python -m bench.gpu_draw [check]
"""

import random

import numpy as np
import torch
from ds4.backends.cuda.kernels import draw as D
from ds4.backends.cuda.ops import Cuda

from bench.gpu_hyper import graph_us
from bench.machine import named_parts

V, dev = 129280, "cuda"


def possible(logits, t, k, top_p, min_p, u):
    """The tokens that the rule may draw if probabilities are rounded as the kernels round them.

    Of a logit d below the largest the kernel's exp(d / t) is off by at most |d / t| times the
    rounding of the difference, the product with log2(e) (2^-24 each) and the division (2^-22), and
    by that of ex2.approx (2^-22) and of a comparison (2^-23); and it is cut to a multiple of 2^-33.
    Sums are exact there. So running sums, and with them the cuts and the goal, lie between bounds.
    """
    x = logits.double().cpu().numpy()
    if t == 0:
        return [int(x.argmax())]
    order = np.argsort(-x, kind="stable")[: k or None]
    power = (x[order] - x.max()) / t
    p = np.exp(power)
    off = p * (-power * (2**-22 + 2**-23) + 2**-22 + 2**-23) + 2.0**-33
    least, most = np.maximum(p - off, 0), p + off
    low, high = least.cumsum(), most.cumsum()
    surely = (high - most < top_p * low[-1]) & (least >= min_p)
    perhaps = (low - least < top_p * high[-1]) & (most >= min_p)
    goal_low, goal_high = u * low[max(1, surely.sum()) - 1], u * high[perhaps.sum() - 1]
    drawn = perhaps & (low - least <= goal_high) & (high >= goal_low)
    return order[drawn].tolist()


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
        most = 0
        for r in range(rows):
            rule = [float(a[r]) for a in (p, m, u)]
            may = possible(logits[r], float(t[r]), int(k[r]) if top_k is not None else 0, *rule)
            most = max(most, len(may))
            assert got[r] in may, f"row {r}: {got[r]} not of {may[:5]}, t {t[r]} k {k[r]} {rule}"
        print(
            "rows", rows, "spread", spread, "ok;", most, "tokens may be drawn at most", flush=True
        )


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
    given = named_parts(__doc__, "check")
    torch.manual_seed(random.randrange(1 << 30))
    if given:
        for rows, spread in ((1, 1), (7, 0.1), (16, 3), (16, 10)):
            check(rows, spread)
    else:
        time_draw()
