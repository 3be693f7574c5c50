"""Checks and times rows.py and remember.py on a GPU, at the real shapes; gpu_index.py: the indexer.

python -m bench.gpu_rows [checks] [time_variants] [time_remember]
"""

import sys
import time
import traceback
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from ds4.backends.cuda import rows as R
from ds4.backends.cuda.kernels import remember as M
from ds4.backends.cuda.ops import Cuda

from ds4.quant import formats
from ds4.step import Chunk, Step, plan

from .gpu_hyper import graph_us
from .machine import named_parts

dev = "cuda" if torch.cuda.is_available() else "cpu"  # for --help
C, ROT, IC = 512, 64, 128
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


def checks():
    check_write()
    starts, far = [0, 1013, 999_990], [[5, 3, 9], [1, 1, 1], [8, 0, 4], [0, 2, 1]]
    check_remember("native", 0, starts, far)
    check_remember("native", 4, starts, far)
    check_remember("exact", 4, starts, far[:2])
    check_remember("native", 4, [0, 1000, 200], [[300, 0, 20], [64, 63, 1], [300, 70, 0]])
    check_remember("native", 128, [0, 1000, 0], [[300, 0, 20], [100, 63, 1], [20, 70, 108]])
    check_remember("native", 128, [0, 128 * 7800], [[24, 8]] * 5 + [[3, 20]] * 5)


# times


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
                us = graph_us([partial(layer.fast, step, *x) for x in sets * (8 if t < 100 else 1)])
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
            us = graph_us([partial(layer.fast, step, *x) for x in sets * 4])
            print(
                f"remember ratio {ratio} pooling {pooling} {pdl, store, pool, at_once}: {us:.2f} us"
            )
        M.PDL, M.STORE_WARPS, M.POOL_WARPS, M.POOL_ROWS = True, 4, 8, 16


def run(parts, these):
    """The named functions of `these`, one after the other; exit status 1 if something was wrong."""
    for part in parts:
        start = time.time()
        try:
            these[part]()
        except Exception as error:  # go on: time on a GPU is scarce
            traceback.print_exc()
            FAILED.append((part, error))
        print(f"{part}: {time.time() - start:.1f} s", flush=True)
    print("FAILED" if FAILED else "all right", FAILED)
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    every = "checks", "time_variants", "time_remember"
    run(named_parts(__doc__, *every) or every, globals())
