"""Checks and times rows.py, remember.py, index.py and topk.py on a GPU, at the real shapes."""

import itertools
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from ds4.backends.cuda import rows as R
from ds4.backends.cuda.kernels import index as I
from ds4.backends.cuda.kernels import remember as M
from ds4.backends.cuda.kernels import topk
from ds4.backends.cuda.ops import Cuda

from ds4.quant import formats
from ds4.step import Chunk, Step, plan

dev = "cuda"
C, ROT, IC, N, K = 512, 64, 128, 64, 512
EPS = 1e-6
g = torch.Generator(device=dev)
g.manual_seed(int(time.time()))
CFG = SimpleNamespace(rms_norm_eps=EPS)


def rnd(*shape, scale=1.0):
    return torch.randn(*shape, device=dev, generator=g) * scale


def poison(rows):
    for p in rows.planes:
        p.view(torch.uint8).fill_(255)


def on(step):
    return step.on(SimpleNamespace(upload=lambda x: torch.from_numpy(x).to(dev)))


def say(ok, *what):
    print("ok  " if ok else "BAD ", *what, flush=True)
    if not ok:
        FAILED.append(what)


FAILED: list = []
FREQS = torch.from_numpy(
    (1 / (np.float32(160000) ** (np.arange(0, ROT, 2, dtype=np.float32) / ROT))).astype(np.float32)
).to(dev)


# checks


def hard_rows(width, n=64):
    rng = np.random.default_rng(int(time.time()))
    rows = rng.standard_normal((n, width)) * np.exp(3 * rng.standard_normal((n, 1)))
    rows[0], rows[1], rows[6] = 0, 1e-20, 1e6
    rows[2] = np.resize(formats.E4M3[:127], width)
    rows[3] = np.resize((formats.E4M3[:126] + formats.E4M3[1:127]) / 2, width)
    rows[4] = np.resize([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -5, 6, -6], width)
    rows[5] = 448 * 2.0 ** rng.integers(-9, 9)
    return rows.astype(np.float32)


def check_write():
    pos = torch.arange(64, dtype=torch.int32, device=dev)
    slot = torch.zeros_like(pos)
    x = hard_rows(C)
    r = R.alloc("kv", 1, 64, C, ROT, "native", dev)
    M.write(r, torch.from_numpy(x).to(dev), slot, pos)
    got, want = r.float32(0).cpu().numpy(), formats.round_kv(x, ROT)
    say((got.view(np.int32) == want.view(np.int32)).all(), "kv rows to the bit")
    target = hard_rows(64)
    target = (np.round(target * 64) / 64).clip(-8, 8)
    r = R.alloc("index", 1, 64, 64, 0, "native", dev)
    M.write(
        r, torch.from_numpy((target @ formats.hadamard(64)).astype(np.float32)).to(dev), slot, pos
    )
    say((r.float32(0).cpu().numpy() == formats.round_q4(target)).all(), "index rows to the bit")
    x = rnd(64, IC)
    r = R.alloc("index", 1, 64, IC, 0, "native", dev)
    M.write(r, x, slot, pos)
    want = formats.round_q4(
        (x.cpu().double().numpy() @ formats.hadamard(IC).astype(np.float64)).astype(np.float32)
    )
    diff = (r.float32(0).cpu().numpy() != want).mean()
    say(diff < 1e-4, f"index rows of 128 against float64: {diff:.1e} of values differ")
    say(torch.equal(r.float32(0), restored(r)), "export and restore")


def restored(r):
    new = R.alloc(r.kind, 2, r.size, r.width, r.rotary, "native", dev)
    new.restore(1, 3, r.export(0, 3, r.size))
    new.restore(1, 0, r.export(0, 0, 3))
    return new.float32(1)


class Layer:
    """One layer's caches, packed and plain, and its weights."""

    def __init__(self, mode, ratio, slots, most, entries, plain=True):
        halves = 2 if ratio == 4 else 1
        self.ratio, self.mode, self.be = ratio, mode, Cuda(dev, mode)
        kinds = [("kv", 128 + most, C, ROT)]
        if ratio:
            kinds += [("float", 2 * ratio + most, 2 * halves * C, 0), ("kv", entries, C, ROT)]
        if ratio == 4:
            kinds += [("float", 2 * ratio + most, 4 * IC, 0), ("index", entries, IC, 0)]
        self.packed = [R.alloc(k, slots, n, w, r, mode, dev) for k, n, w, r in kinds]
        for p in self.packed:
            poison(p)
        if plain:
            self.plain = [self.be.alloc(k, slots, n, w, r) for k, n, w, r in kinds]
            for p in self.plain:
                p.data.fill_(float("nan"))
            self.plain += [None] * (5 - len(kinds))
        self.kv_norm = rnd(C)
        comp = SimpleNamespace(ape=rnd(max(ratio, 1), halves * C), norm=rnd(C))
        icomp = SimpleNamespace(ape=rnd(max(ratio, 1), halves * IC), norm=rnd(IC))
        self.w = SimpleNamespace(
            kv_norm=self.kv_norm,
            freqs=FREQS,
            ratio=ratio,
            compressor=comp if ratio else None,
            indexer=SimpleNamespace(compressor=icomp) if ratio == 4 else None,
        )
        self.widths = [C] + [2 * halves * C] * bool(ratio) + [4 * IC] * (ratio == 4)

    def inputs(self, tokens):
        wide = rnd(tokens, sum(self.widths) + 64)
        return wide[:, : sum(self.widths)].split(self.widths, 1)

    def fast(self, step, kv, *projected):
        w, p = self.w, self.packed
        comps = [w.compressor] * bool(self.ratio)
        comps += [w.indexer.compressor] if self.ratio == 4 else []
        M.remember(
            kv,
            self.kv_norm,
            FREQS,
            p[0],
            [
                M.Compressor(x, m.ape, m.norm, p[2 * i + 1], p[2 * i + 2])
                for i, (m, x) in enumerate(zip(comps, projected, strict=True))
            ],
            step.slot,
            step.pos,
            step.emit.get(self.ratio),
            max(1, self.ratio),
            EPS,
        )

    def slow(self, step, kv, *projected):
        window, rows, pool, index_rows, index_pool = self.plain
        c = SimpleNamespace(
            window=window, rows=rows, pool=pool, index_rows=index_rows, index_pool=index_pool
        )
        self.be.remember(self.w, c, step, kv, projected, CFG)

    def compare(self, label):
        for i, p in enumerate(self.packed):
            flips = seen = 0
            far = 0.0
            for slot in range(self.plain[i].data.shape[0]):
                want, got = self.plain[i].data[slot, :-1], p.float32(slot)
                wrote = ~want.isnan().any(1)
                clean = got[~wrote].isnan().any(1).all() if self.mode == "exact" else True
                want, got = want[wrote], got[wrote]
                seen += want.numel()
                scale = want.abs().amax(1, keepdim=True)
                d = (got - want).abs() / scale
                flips += (d > 1e-5).sum().item()
                far = max(far, d.max().item() if d.numel() else 0.0)
                if not clean or got.isnan().any():
                    far = float("nan")
            few = flips / max(seen, 1) < (2e-3 if self.mode == "native" else 1e-5)
            name = ("window", "rows", "pool", "index rows", "index pool")[i]
            say(
                few and far < 0.4,
                f"{label} {name}: {seen} values, {flips / max(seen, 1):.1e} flipped, far {far:.1e}",
            )


def check_remember(mode, ratio, starts, lengths):
    """Steps of several slots from far positions, with padding and wrap-around."""
    layer = Layer(mode, ratio, len(starts), max(map(sum, lengths)), 262144 if ratio == 4 else 8192)
    at = list(starts)
    for i, each in enumerate(lengths):
        chunks = [Chunk(s, at[s], [0] * n) for s, n in enumerate(each) if n]
        for s, n in enumerate(each):
            at[s] += n
        step = on(plan(chunks, [ratio] if ratio else [], pad_to=sum(each) + i % 3))
        # a block that began before the first step would pool rows that nobody wrote
        emit = {
            r: torch.where(
                (e[:, 1:] * r - (r if r == 4 else 0)).clamp_min(0)
                >= torch.tensor(starts, device=dev)[e[:, :1].long()],
                e,
                torch.cat([e[:, :1], torch.full_like(e[:, 1:], -1)], 1),
            ).to(torch.int32)
            for r, e in step.emit.items()
        }
        step = Step(step.tokens, step.slot, step.pos, emit, step.last, step.span)
        x = layer.inputs(len(step.pos))
        layer.fast(step, *x)
        layer.slow(step, *x)
    layer.compare(f"remember {mode} ratio {ratio}")


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


# times


def timed(fns, n=20):
    """us a call, of calls on rotating inputs in one graph."""
    for f in fns[:2]:
        f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for f in fns:
            f()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(n):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times)[n // 2] * 1e3 / len(fns)


def row(what, us, nbytes):
    floor = nbytes / 3.0e6
    print(f"{what:44} {us:9.2f} us {nbytes / 1e6:9.3f} MB floor {floor:8.2f} us", flush=True)


def time_remember():
    for ratio in (0, 4, 128):
        for t in (1, 8, 32, 2048, 8192):
            slots = t if t <= 32 else 1
            layer = Layer("native", ratio, slots, max(256, t), 8192 if ratio else 1, plain=False)
            sets = [layer.inputs(t) for _ in range(4 if t < 100 else 2)]
            for pooling in (False, True) if ratio and t < 100 else (True,):
                each = t // slots
                end = 1024 * max(1, ratio) - (0 if pooling else 1)
                start = end - each if t < 100 else 0
                step = on(
                    plan(
                        [Chunk(s, start, [0] * each) for s in range(slots)],
                        [ratio] * bool(ratio),
                        pad_to=t,
                    )
                )
                us = timed([partial(layer.fast, step, *x) for x in sets * (8 if t < 100 else 1)])
                read = 4 * t * sum(layer.widths)
                blocks = int((step.emit[ratio][:, 1] >= 0).sum()) if ratio else 0
                pooled = blocks * (ratio if ratio != 4 else 8) * 4 * sum(layer.widths[1:])
                row(
                    f"remember ratio {ratio} T={t} {'blocks ' + str(blocks) if ratio else ''}",
                    us,
                    read + 4 * t * sum(layer.widths[1:]) + 584 * t + pooled,
                )


def time_variants():
    """One token: whether launches overlap, warps, rows pooled at once."""
    for ratio, pooling in ((0, False), (4, False), (4, True), (128, False), (128, True)):
        layer = Layer("native", ratio, 1, 256, 8192 if ratio else 1, plain=False)
        sets = [layer.inputs(1) for _ in range(8)]
        end = 1024 * max(1, ratio) - (0 if pooling else 1)
        step = on(plan([Chunk(0, end - 1, [0])], [ratio] * bool(ratio), pad_to=1))
        variants = [(False, 4, 8, 16), (True, 4, 8, 16), (True, 1, 4, 8), (True, 4, 16, 32)]
        for pdl, store, pool, at_once in variants:
            M.PDL, M.STORE_WARPS, M.POOL_WARPS, M.POOL_ROWS = pdl, store, pool, at_once
            us = timed([partial(layer.fast, step, *x) for x in sets * 4])
            print(
                f"remember ratio {ratio} pooling {pooling} {pdl, store, pool, at_once}: {us:.2f} us"
            )
        M.PDL, M.STORE_WARPS, M.POOL_WARPS, M.POOL_ROWS = True, 4, 8, 16


def time_index():
    for entries, slots in ((2048, 256), (8192, 128), (32768, 64), (262144, 10)):
        pool = R.alloc("index", slots, entries, IC, ROT, "native", dev)
        pool.codes.random_(0, 256)
        pool.scales.random_(120, 130)
        for t in (1, 32):
            if t > slots or (t > 1 and entries != 32768):
                continue
            span = entries * 4
            calls, parts = [], ([], [], [])
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
            row(f"index T={t} of {entries}, in all", timed(calls), t * entries * 68)
            row(f"   prepare T={t}", timed(parts[0]), t * N * IC * 6)
            for tile in TILES:
                I.FEW_TILE = tile
                row(f"   score T={t} of {entries} {tile}", timed(parts[1]), t * entries * 72)
            I.FEW_TILE = TILES[0]
            for label, at_once, shape in TOPK:
                old = topk.AT_ONCE, topk.block_of
                topk.AT_ONCE = at_once
                if shape:
                    topk.block_of = shape
                try:
                    us = timed(parts[2])
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
        all_us = timed([partial(I.index, q, w, pool, slot, pos, span, FREQS, 4, K)], 8)
        print(f"prefill T={t} of {entries}: in all {all_us / 1e3:.3f} ms")
        row("   prepare", timed([partial(I.prepare, q, w, pos, FREQS, True)], 8), t * N * IC * 6)
        us = timed([partial(I.score, query, share, pool, slot, pos, entries, 4, K, scores)], 8)
        print(f"   score: {us / 1e3:.3f} ms, {flops / us / 1e6:.0f} TFLOP/s")
        row("   topk", timed([partial(topk.choose, scores, pos, 4, entries, ids)], 8), 4 * seen)


def checks():
    check_write()
    starts, far = [0, 1013, 999_990], [[5, 3, 9], [1, 1, 1], [8, 0, 4], [0, 2, 1]]
    check_remember("native", 0, starts, far)
    check_remember("native", 4, starts, far)
    check_remember("exact", 4, starts, far[:2])
    check_remember("native", 4, [0, 1000, 200], [[300, 0, 20], [64, 63, 1], [300, 70, 0]])
    check_remember("native", 128, [0, 1000, 0], [[300, 0, 20], [100, 63, 1], [20, 70, 108]])
    check_remember("native", 128, [0, 128 * 7800], [[24, 8]] * 5 + [[3, 20]] * 5)
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


if __name__ == "__main__":
    parts = sys.argv[1:] or [
        "checks",
        "time_variants",
        "time_remember",
        "time_index",
        "time_prefill",
    ]
    for part in parts:
        start = time.time()
        try:
            globals()[part]()
        except Exception as error:  # go on: time on a GPU is scarce
            import traceback

            traceback.print_exc()
            FAILED.append((part, error))
        print(f"{part}: {time.time() - start:.1f} s")
    print("FAILED" if FAILED else "all right", FAILED)
