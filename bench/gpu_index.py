"""Checks and times index.py and topk.py on a GPU, at the real shapes.

python -m bench.gpu_index [checks] [time_index] [time_prefill]
"""

import itertools
from functools import partial

import torch
from ds4.backends.cuda import rows as R
from ds4.backends.cuda.kernels import index as I
from ds4.backends.cuda.kernels import remember as M
from ds4.backends.cuda.kernels import topk
from ds4.backends.cuda.ops import Cuda

from ds4.step import Chunk, plan

from .gpu_hyper import graph_us
from .gpu_rows import FREQS, IC, ROT, dev, g, on, poison, rnd, row, run, say
from .machine import named_parts

N, K = 64, 512


def check_index(mode, chunks, entries, span, pad=0):
    pool = R.alloc("index", 3, entries, IC, ROT, mode, dev)
    poison(pool)
    for c in chunks:
        n = (c.start + len(c.tokens)) // 4
        x = rnd(n, IC) * torch.exp(rnd(n, 1))
        at = torch.arange(n, dtype=torch.int32, device=dev)
        M.write(pool, x, torch.full_like(at, c.slot), at)
    step = on(plan(chunks, [4], pad_to=pad))
    t = len(step.pos)
    wide = rnd(t, N * IC + N + 8, scale=2.0)
    q, w = wide[:, : N * IC].unflatten(1, (N, IC)), wide[:, N * IC : N * IC + N]
    be = Cuda(dev, mode)
    rotated = be._rope(q, step.pos, FREQS)
    if mode == "native":
        want_q = be._rounded(be.alloc("index", 1, 1, IC), rotated.double().float())
    else:
        want_q = rotated
    query, share = I.prepare(q, w, step.pos, FREQS, mode == "native")
    flat = query.float()
    if mode == "native":
        power = torch.where(w != 0, share / w, 1.0)
        flat = (torch.stack(flat.chunk(2, -1), -1).flatten(-2)) * power[..., None]
    flips = (
        ((flat - want_q).abs() > 1e-5 * want_q.abs().amax(-1, keepdim=True)).float().mean().item()
    )
    say(flips < 1e-3, f"index {mode} query: {flips:.1e} flipped")
    n = min(span // 4, entries)
    scores = torch.full((t, -(-n // 128) * 128), float("nan"), device=dev)
    I.score(query, share, pool, step.slot, step.pos, n, 4, K, scores)
    far, untouched = 0.0, True
    ids = I.index(q, w, pool, step.slot, step.pos, span, FREQS, 4, K)
    right = True
    some = range(t) if t < 64 else [*range(0, t, 61), t - 1]
    for i in some:
        seen = max(0, (step.pos[i].item() + 1) // 4)
        if seen <= K:
            want = list(range(seen)) + [-1] * (K - seen)
            right &= ids[i].tolist() == want
            continue
        keys = pool.float32(step.slot[i].item(), 0, seen).double()
        want = w[i].double() @ (flat[i].double() @ keys.T).relu()
        far = max(far, ((scores[i, :seen] - want).abs().max() / want.abs().max()).item())
        untouched &= bool(scores[i, seen:].isnan().all()) if t <= 32 else True
        order = scores[i, :seen].sort(descending=True, stable=True)[1][:K].sort()[0]
        right &= torch.equal(ids[i].long(), order)
    say(
        far < (3e-6 if mode == "native" else 1e-5) and untouched,
        f"index {mode} T={t} of {n}: scores differ {far:.1e}",
    )
    say(right, f"index {mode} T={t} of {n}: the chosen")


def check_replay():
    """A graph replayed with other tokens, slots, positions and inputs does what a call does."""
    entries, span = 32768, 131072
    pool = R.alloc("index", 4, entries, IC, ROT, "native", dev)
    pool.codes.random_(0, 256, generator=g)
    pool.scales.random_(120, 130, generator=g)
    q, w = rnd(5, N, IC), rnd(5, N)
    slot = torch.zeros(5, dtype=torch.int32, device=dev)
    pos = torch.full_like(slot, 99999)

    def call():
        return I.index(q, w, pool, slot, pos, span, FREQS, 4, K)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    right = True
    for _ in range(4):
        q.copy_(rnd(5, N, IC))
        slot.random_(0, 4, generator=g)
        pos.random_(-1, span, generator=g)
        pos[0] = torch.randint(-1, 3000, (1,), device=dev, generator=g).int()
        graph.replay()
        got = out.clone()
        right &= torch.equal(got, call())
    say(right, "index replayed from a graph")


def check_topk():
    for entries, t, kind in itertools.product(
        (2048, 4100, 16384, 40000, 262144), (1, 70), range(4)
    ):
        if entries > 100000 and t > 1 and kind:
            continue
        stride = -(-entries // 128) * 128
        s = rnd(t, stride)
        if kind == 1:
            s = (s * 4).round()
        if kind == 2:
            s.zero_()
            s[:, ::7] = -0.0
        if kind == 3:
            s = torch.exp(8 * s)
            s[:, 5] = float("inf")
            s[:, 7] = float("nan")
            s[:, ::3] = float("-inf")
        seen = torch.randint(K - 2, entries + 1, (t,), device=dev, generator=g)
        seen[0] = entries
        if t > 3:
            seen[1:4] = torch.tensor([0, K, K + 1], device=dev)
        pos = (seen * 4 - 1 + torch.randint(0, 4, (t,), device=dev, generator=g)).int()
        pos = torch.where(seen == 0, -1, pos)
        ids = torch.full((t, K), -9, dtype=torch.int32, device=dev)
        hidden = torch.arange(stride, device=dev) >= seen[:, None]
        topk.choose(s.masked_fill(hidden, float("nan")), pos, 4, entries, ids)
        clean = torch.where(s.isnan(), float("-inf"), s) + 0.0
        good = True
        for i in range(t):
            n = int(seen[i])
            want = clean[i, :n].sort(descending=True, stable=True)[1][:K].sort()[0]
            want = torch.cat([want, torch.full((K - len(want),), -1, device=dev)])
            good &= torch.equal(ids[i].long(), want)
        say(good, f"topk {entries} T={t} kind {kind}")


def checks():
    check_index(
        "native",
        [Chunk(0, 9000, [0]), Chunk(2, 131000, [0, 0]), Chunk(1, 900, [0])],
        32768,
        131072,
        5,
    )
    check_index(
        "native",
        [Chunk(1, 2500, [0] * 300), Chunk(0, 0, [0] * 50), Chunk(2, 9000, [0] * 61)],
        4096,
        16384,
        420,
    )
    check_index("native", [Chunk(1, 1048570, [0])], 262144, 1048576)
    check_index("exact", [Chunk(0, 9000, [0]), Chunk(2, 4000, [0, 0])], 4096, 16384, 5)
    check_replay()
    check_topk()


# times


def time_index():
    for entries, slots in ((2048, 256), (8192, 128), (32768, 64), (262144, 10)):
        pool = R.alloc("index", slots, entries, IC, ROT, "native", dev)
        pool.codes.random_(0, 256)
        pool.scales.random_(120, 130)
        for t in (1, 32):
            if t > slots or (t > 1 and entries != 32768):
                continue
            span = entries * 4
            calls: list[partial] = []
            parts: tuple[list[partial], ...] = [], [], []
            for i in range(max(4, min(32, slots // t))):
                q, w = rnd(t, N, IC), rnd(t, N)
                slot = ((torch.arange(t, device=dev) + i * t) % slots).int()
                pos = torch.full_like(slot, span - 1)
                query, share = I.prepare(q, w, pos, FREQS, True)
                scores = rnd(t, entries)
                ids = torch.empty(t, K, dtype=torch.int32, device=dev)
                calls.append(partial(I.index, q, w, pool, slot, pos, span, FREQS, 4, K))
                parts[0].append(partial(I.prepare, q, w, pos, FREQS, True))
                parts[1].append(
                    partial(I.score, query, share, pool, slot, pos, entries, 4, K, scores)
                )
                parts[2].append(partial(topk.choose, scores, pos, 4, entries, ids))
            row(f"index T={t} of {entries}, in all", graph_us(calls), t * entries * 68)
            row(f"   prepare T={t}", graph_us(parts[0]), t * N * IC * 6)
            for tile in TILES:
                I.FEW_TILE = tile
                row(f"   score T={t} of {entries} {tile}", graph_us(parts[1]), t * entries * 72)
            I.FEW_TILE = TILES[0]
            for label, at_once, shape in TOPK:
                old = topk.AT_ONCE, topk.block_of
                topk.AT_ONCE = at_once
                if shape:
                    topk.block_of = shape
                try:
                    us = graph_us(parts[2])
                    row(f"   topk T={t} of {entries} {label}", us, t * entries * 4)
                except Exception as error:
                    print(label, repr(error)[:100])
                topk.AT_ONCE, topk.block_of = old


def fixed(threads):
    def shape(longest, rows):
        values = 4
        while threads * values < longest:
            values *= 2
        assert values <= 32
        return threads, values

    return shape


TOPK = [
    ("now", 16384, None),
    ("1024", 16384, fixed(1024)),
    ("512, segments from 4096", 4096, fixed(512)),
    ("1024 x 32", 32768, fixed(1024)),
]
TILES = [(128, 4, 2, 3), (128, 4, 1, 3), (64, 4, 3, 4), (128, 8, 2, 2)]


def time_prefill():
    for t, entries in ((8192, 2048), (2048, 8192), (256, 262144)):
        pool = R.alloc("index", 1, entries, IC, ROT, "native", dev)
        pool.codes.random_(0, 256)
        pool.scales.random_(120, 130)
        span = entries * 4
        q, w = rnd(t, N, IC), rnd(t, N)
        slot = torch.zeros(t, dtype=torch.int32, device=dev)
        pos = torch.arange(span - t, span, device=dev).int()
        seen = ((pos + 1) // 4).float().sum().item()
        flops = 2 * N * IC * seen
        query, share = I.prepare(q, w, pos, FREQS, True)
        scores = rnd(t, entries)
        ids = torch.empty(t, K, dtype=torch.int32, device=dev)
        all_us = graph_us([partial(I.index, q, w, pool, slot, pos, span, FREQS, 4, K)], 8)
        print(f"prefill T={t} of {entries}: in all {all_us / 1e3:.3f} ms")
        row("   prepare", graph_us([partial(I.prepare, q, w, pos, FREQS, True)], 8), t * N * IC * 6)
        us = graph_us([partial(I.score, query, share, pool, slot, pos, entries, 4, K, scores)], 8)
        print(f"   score: {us / 1e3:.3f} ms, {flops / us / 1e6:.0f} TFLOP/s")
        row("   topk", graph_us([partial(topk.choose, scores, pos, 4, entries, ids)], 8), 4 * seen)


if __name__ == "__main__":
    every = "checks", "time_index", "time_prefill"
    run(named_parts(__doc__, *every) or every, globals())
