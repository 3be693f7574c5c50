"""Sparse attention on a GPU: checked against float64 at the real shapes, then timed in CUDA graphs.

python -m bench.gpu_attn [check] [decode] [prefill]
"""

import sys
from itertools import pairwise

import torch
from ds4.backends.cuda.kernels.attention import HOPPER, Split, Tiling

from .gpu_attn_inputs import C, H, Inputs, Way, inputs, poison, wanted
from .machine import named_parts

BANDWIDTH, FLOPS = 3.0e12, 700e12  # measured on an H100: copy, fp16 product


def error(x: Inputs, tokens: list[int], way: Way = None) -> float:
    x.out.fill_(torch.nan)
    x.run(way)
    got = x.result().double()
    if not got.isfinite().all():
        return float("nan")
    want = torch.stack([wanted(x, t) for t in tokens])
    return float((got[tokens] - want).norm() / want.norm())


M = 1_000_000
CHECKS: dict[str, tuple] = {  # slot, pos, ratio, k
    "SWA 1": ([0], [77], 0, 0),
    "SWA 3, 1M": ([0, 1, 0], [M, 5, 400], 0, 0),
    "CSA 1": ([0], [511], 4, 512),
    "CSA 1, 1M": ([0], [M], 4, 512),
    "CSA 7, padding": ([0, 1, 2, 0, 1, 2, 0], [0, 3, M, -1, 2051, 129, -1], 4, 512),
    "CSA 32": ([i % 4 for i in range(32)], [1000 * i for i in range(32)], 4, 512),
    "HCA 1": ([0], [127], 128, 0),
    "HCA 1, 1M": ([0], [M + 48575], 128, 0),
    "HCA 9": ([i % 3 for i in range(9)], [0, 126, 127, 128, M, 5, 70000, 255, -1], 128, 0),
    "CSA chunk 333": ([1] * 333, list(range(5, 338)), 4, 512),
    "CSA chunk 129, 1M": ([0] * 129, list(range(M, M + 129)), 4, 512),
    "HCA chunk 200": ([0] * 200, list(range(900, 1100)), 128, 0),
    "SWA chunk 65": ([0] * 65, list(range(65)), 0, 0),
}


SPLITS = [Split(1, 1), Split(1, 7), Split(2, 1), Split(2, 33), Split(1, 64, 2)]


def check() -> None:
    torch.manual_seed(0)
    for name, (slot, pos, ratio, k) in CHECKS.items():
        row = f"{name:20}"
        for exact in False, True:
            x = inputs(slot, pos, ratio, k, exact=exact, chunk=512)
            poison(x)
            tokens = list(range(0, len(pos), max(1, len(pos) // 16)))
            e = error(x, tokens)
            verdict = "" if e < (1e-5 if exact else 2e-3) else " WRONG"
            if not exact and len(pos) <= 32:
                e = max(e, *(error(x, tokens, way) for way in SPLITS))
            row += f"  {'exact' if exact else 'native'} {e:.1e}{verdict}"
        print(row, flush=True)


def timed(sets: list[Inputs], way: Way, calls: int = 48) -> float:
    """Microseconds of a call: the median of replays of a graph that goes round the input sets.

    Replays are queued together, so that the host's part of a launch is not in the figure.
    """
    for x in sets:
        x.run(way)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            sets[i % len(sets)].run(way)
    ticks = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
    for tick in ticks:
        graph.replay()
        tick.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(ticks)]
    return sorted(times)[len(times) // 2] * 1e3 / calls


def floor(x: Inputs) -> tuple[float, float]:
    """Bytes that must move (rows of a token once, query, output), and the floor in microseconds."""
    keys = [x.keys(t) for t in range(len(x.pos))]
    size = sum(keys) * 584 + len(keys) * H * C * 6
    return size, 1e6 * max(size / BANDWIDTH, sum(keys) * H * C * 4 / FLOPS)


def decode() -> None:
    print("decode: us a call (both launches)")
    for T in 1, 8, 32:
        for context in 512, 131072, 1 << 20:
            row = f"T {T:2} context {context:7}"
            for name, ratio, k in ("SWA", 0, 0), ("CSA", 4, 512), ("HCA", 128, 0):
                if T > 1 and context == 1 << 20 and ratio == 4:
                    continue
                k = min(k, context // 4)
                n = 8 if T < 32 else 3
                sets = [
                    inputs(list(range(T)), [context - 2 - i for i in range(T)], ratio, k, context)
                    for _ in range(n)
                ]
                size, least = floor(sets[0])
                took = {way: timed(sets, way) for way in (None, *variants(T))}
                best = sorted(variants(T), key=took.__getitem__)[:3]
                row += f" | {name} {took[None]:5.1f}"
                row += "".join(f", {took[way]:.1f} {'/'.join(map(str, way))}" for way in best)
                row += f" ({size / 1e6:.2f} MB, floor {least:.1f})"
                del sets
            print(row, flush=True)


def variants(T: int) -> list[Split]:
    """What may be the best way for T tokens."""
    if T == 1:
        return [Split(1, n) for n in (5, 10, 20, 33)] + [Split(2, 20), Split(1, 66, 2)]
    if T == 8:
        return [Split(1, 2), Split(1, 4), Split(1, 8, 2), Split(2, 4), Split(2, 8)]
    return [Split(1, 1), Split(1, 2, 2), Split(1, 4), Split(2, 1), Split(2, 2), Split(2, 4)]


WHOLE = [HOPPER, Split(2, 1)]


def warm() -> None:
    """Compile everything that the other parts run, in parallel processes."""
    todo = [
        (*kind, way, exact)
        for kind in ((0, 0), (4, 512), (128, 0))
        for way, exact in ((HOPPER, False), (Tiling(16, 16, 8, 4), True))
    ]
    todo += [(0, 0, Split(m, 2, r), False) for m, r in ((1, 1), (1, 2), (2, 1))]
    todo += [(4, 512, Tiling(16, 16, 1, 4), True), (128, 0, Tiling(16, 16, 1, 4), True)]
    this, all_of_them = map(int, sys.argv[2:4])
    for ratio, k, way, exact in todo[this::all_of_them]:
        inputs([0] * 2, [3000, 3001], ratio, k, exact=exact).run(way)


def prefill() -> None:
    print("prefill: ms a layer")
    for T in 64, 512, 2048, 8192:
        for name, ratio, k in ("SWA", 0, 0), ("CSA", 4, 512), ("HCA", 128, 0):
            k = min(k, T // 4)
            x = [inputs([0] * T, list(range(T)), ratio, k, chunk=T) for _ in range(2)]
            least = floor(x[0])[1]
            work = sum(x[0].keys(t) for t in range(0, T, 16)) * 16 * H * C * 4
            row = f"T {T:4} {name} floor {least / 1e3:.3f}"
            for way in WHOLE:
                us, called = timed(x, way, 6), way if way is HOPPER else tuple(way)
                row += f" | {called} {us / 1e3:.3f} ({work / us / 1e6:.0f} TF/s)"
            print(row, flush=True)
            del x


if __name__ == "__main__":
    if sys.argv[1:2] == ["warm"]:
        warm()
    else:
        every = {"check": check, "decode": decode, "prefill": prefill}
        for part in named_parts(__doc__, *every) or every:
            every[part]()
