"""Sparse attention on a GPU: checked against float64 at the real shapes, then timed in CUDA graphs.

python bench/gpu_attn.py [check] [decode] [prefill]
"""

import sys
from dataclasses import dataclass
from itertools import pairwise

import torch
from ds4.backends.cuda.kernels.attention import HOPPER, Split, Tiling, attention
from torch import Tensor

Way = Tiling | Split | str | None

H, C, R, WINDOW = 64, 512, 64, 128
BANDWIDTH, FLOPS = 3.0e12, 700e12  # measured on an H100: copy, fp16 product
DEVICE = "cuda"


def freqs(base: float) -> Tensor:
    return (base ** -(torch.arange(0, R, 2, device=DEVICE).double() / R)).float()


def planes(slots: int, size: int, exact: bool) -> list[Tensor]:
    shape = slots, size + 1
    if exact:
        return [torch.randn(*shape, C, device=DEVICE)]
    codes = torch.randn(*shape, C - R, device=DEVICE, dtype=torch.float16).mul_(100)
    codes = codes.clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.randint(118, 122, (*shape, 8), device=DEVICE, dtype=torch.uint8)
    return [codes, scales, torch.randn(*shape, R, device=DEVICE).bfloat16()]


def decoded(rows: list[Tensor], slot: int, at: Tensor) -> Tensor:
    """Rows `at` of a slot in float64."""
    if len(rows) == 1:
        return rows[0][slot, at].double()
    codes, scales, tail = (p[slot, at] for p in rows)
    power = torch.exp2(scales[:, : (C - R) // 64].double() - 127)
    plain = codes.view(torch.float8_e4m3fn).float().double().unflatten(-1, (-1, 64))
    return torch.cat([(plain * power[..., None]).flatten(-2), tail.double()], -1)


@dataclass
class Inputs:
    """Arguments of `attention`, with an output in panel (T <= 32) or row layout."""

    q: Tensor
    freqs: Tensor
    sink: Tensor
    slot: Tensor
    pos: Tensor
    ids: Tensor | None
    ring: list[Tensor]
    pool: list[Tensor] | None
    ratio: int
    out: Tensor

    def run(self, way: Way = None) -> None:
        T = len(self.q)
        ps, ts = (8 * T, 8) if T <= 32 else (8, H * C)
        given = self.q, self.freqs, self.sink, self.slot, self.pos, self.ids, self.ring, self.pool
        attention(*given, self.ratio, WINDOW, 1e-6, self.out, ps, ts, way)

    def result(self) -> Tensor:
        T = len(self.q)
        if T <= 32:
            return self.out.view(-1, T, 8).permute(1, 0, 2).reshape(T, H, C)
        return self.out.view(T, H, C)

    def keys(self, t: int) -> int:
        p = int(self.pos[t])
        entries = (p + 1) // self.ratio if self.ratio else 0
        return min(p + 1, WINDOW) + (entries if self.ids is None else int((self.ids[t] >= 0).sum()))


def inputs(
    slot: list[int],
    pos: list[int],
    ratio: int,
    k: int = 0,
    context: int = 0,
    exact: bool = False,
    chunk: int = 32,
) -> Inputs:
    T, slots = len(pos), max(slot) + 1
    ring = planes(slots, WINDOW + chunk, exact)
    entries = max(context, max(pos) + 1) // ratio if ratio else 0
    pool = planes(slots, entries, exact) if ratio else None
    ids = None
    if k:
        visible = (torch.tensor(pos, device=DEVICE) + 1) // ratio
        ids = torch.full((T, k), -1, dtype=torch.int32, device=DEVICE)
        for n in visible.unique().tolist():
            rows = (visible == n).nonzero()[:, 0]
            m = min(n, k)
            if m == n:
                ids[rows, :m] = torch.rand(len(rows), n, device=DEVICE).argsort(-1).int()
            else:  # different entries: a stride apart, from a random start
                start = torch.randint(0, n, (len(rows), 1), device=DEVICE)
                step = torch.arange(m, device=DEVICE) * (n // m)
                ids[rows] = ((start + step) % n).int()
    wide = torch.randn(T, H * C + 8192, device=DEVICE)
    out = torch.full((T * H * C,), torch.nan, device=DEVICE)
    return Inputs(
        wide[:, : H * C].unflatten(1, (H, C)),
        freqs(160000.0 if ratio else 10000.0),
        torch.randn(H, device=DEVICE),
        torch.tensor(slot, dtype=torch.int32, device=DEVICE),
        torch.tensor(pos, dtype=torch.int32, device=DEVICE),
        ids,
        ring,
        pool,
        ratio,
        out if exact else out.half(),
    )


def poison(x: Inputs) -> None:
    """NaN in every row that no token may read."""
    for rows, seen in (x.ring, window_rows), (x.pool, entry_rows):
        if rows is None:
            continue
        keep = torch.zeros(rows[0].shape[:2], dtype=torch.bool, device=DEVICE)
        for t in range(len(x.pos)):
            if int(x.pos[t]) >= 0:
                keep[int(x.slot[t]), seen(x, t)] = True
        for plane in rows:
            plane[~keep] = 255 if plane.dtype == torch.uint8 else torch.nan


def window_rows(x: Inputs, t: int) -> Tensor:
    p = int(x.pos[t])
    return torch.arange(max(0, p - WINDOW + 1), p + 1, device=DEVICE) % (x.ring[0].shape[1] - 1)


def entry_rows(x: Inputs, t: int) -> Tensor:
    if x.ids is not None:
        return x.ids[t][x.ids[t] >= 0].long()
    return torch.arange((int(x.pos[t]) + 1) // x.ratio if x.ratio else 0, device=DEVICE)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    plain, tail = x[..., : C - R], x[..., C - R :]
    a, b, cos, sin = tail[..., ::2], tail[..., 1::2], angle.cos(), angle.sin()
    return torch.cat(
        [plain, torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)], -1
    )


def wanted(x: Inputs, t: int) -> Tensor:
    """One token's result in float64, from the definition."""
    p, slot = int(x.pos[t]), int(x.slot[t])
    if p < 0:
        return torch.zeros(H, C, dtype=torch.float64, device=DEVICE)
    angle = (x.pos[t].float() * x.freqs).double()
    q = x.q[t].double()
    q = turned(q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt(), angle)
    keys = decoded(x.ring, slot, window_rows(x, t))
    if x.pool is not None:
        keys = torch.cat([keys, decoded(x.pool, slot, entry_rows(x, t))])
    logits = torch.cat([q @ keys.T * C**-0.5, x.sink.double()[:, None]], -1)
    return turned(logits.softmax(-1)[:, :-1] @ keys, -angle)


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
                us, name = timed(x, way, 6), way if way is HOPPER else tuple(way)
                row += f" | {name} {us / 1e3:.3f} ({work / us / 1e6:.0f} TF/s)"
            print(row, flush=True)
            del x


if __name__ == "__main__":
    if sys.argv[1:2] == ["warm"]:
        warm()
    else:
        for part in sys.argv[1:] or ["check", "decode", "prefill"]:
            {"check": check, "decode": decode, "prefill": prefill}[part]()
