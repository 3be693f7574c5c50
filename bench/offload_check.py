"""Experts in two memories on a GPU: is it the same model, and how fast are the parts?

    python -m bench.offload_check [--layers 4] [--experts 256] [--no-speed]

The same weights twice: all on the GPU, and with a quarter of the experts there. Logits of a prompt
and of decoded tokens, one and eight sequences, are compared to the bit while experts move; then
every address is followed to its bytes. Then: pinning by 1 to 16 threads; copies inside a step
against reads through the pointer; the ring. (bench.link and bench.cpu_experts time the ways.)
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds4.backend import open_backend
from ds4.errors import Ds4Error
from ds4.plan.placement import Budget, need_of
from ds4.quant.recipes import RECIPES
from ds4.runner import Runner
from ds4.weights import load_weights
from ds4.weights.synthetic import SyntheticCheckpoint

from .machine import Clock, wait
from .models import free
from .offload import shapes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="experts in two memories")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--synthetic", default="flash")
    parser.add_argument("--recipes", default="q8_0,q2")
    parser.add_argument("--no-speed", dest="speed", action="store_false")
    args = parser.parse_args(arguments)
    same = [check(args, recipe) for recipe in args.recipes.split(",")]
    if args.speed:
        attempt(pinning)
    sys.exit(0 if all(same) else "the two models differ")


def attempt(part: Any, *given: Any) -> None:
    """A part whose failure is no reason to lose the others' figures."""
    try:
        part(*given)
    except (RuntimeError, ValueError, OSError, Ds4Error) as error:
        print(f"{part.__name__}: {error}", flush=True)


def check(args: argparse.Namespace, recipe: str) -> bool:
    cfg = shapes(args.synthetic, args.layers, args.experts)
    source = SyntheticCheckpoint(cfg, recipe=RECIPES[recipe], routing="skewed")
    resident = open_backend("cuda", "auto", "native")
    whole = load_weights(resident, cfg, source)
    placed: Any = open_backend("cuda", "auto", "native")
    need, e = need_of(cfg, source, 2048, 8), args.experts
    slots = (e // 4,) * args.layers
    from ds4.backends.cuda.placement import Placement

    since = time.perf_counter()
    budget = Budget(need, slots, e - e // 8, 512, -(-e // 8), 0, lent=e // 8)
    placed.placement = Placement(budget, placed.device)
    parts = load_weights(placed, cfg, source)
    wait(placed.device)
    pool = placed.placement.pool
    print(f"{recipe}: {pool.nbytes / 1e9:.1f} GB pinned at {pool.nbytes / pool.seconds / 1e9:.1f} "
          f"GB/s, loaded in {time.perf_counter() - since:.1f} s", flush=True)  # fmt: skip
    same = True
    for slots_used in (1, 8):
        runners = [Runner(be, cfg, w, 2048, slots_used, 512)
                   for be, w in ((resident, whole), (placed, parts))]  # fmt: skip
        same &= _same(runners, slots_used)
    same &= _follow(placed.placement, whole)
    same &= _rings(resident, cfg, whole)
    print(recipe, placed.placement.report().line(), f"swaps {placed.placement.swaps.count}",
          f"passed {placed.placement.report().passed.sum()}", flush=True)  # fmt: skip
    if args.speed:
        attempt(_steps, placed, runners[1])
        attempt(_ring, placed.placement)
        attempt(_shrinks, placed, runners[1])
    return same


def _same(runners: list[Runner], slots: int) -> bool:
    rng = np.random.default_rng(slots)
    worst, alike, steps = 0.0, 0, 0
    for step in range(150):
        count = 300 if step in (0, 75) else 1
        ids = {
            s: [int(i) for i in rng.integers(3, runners[0].cfg.vocab_size, count)]
            for s in range(slots)
        }
        a, b = (r.be.download(r.run(ids, pad_to=slots)) for r in runners)
        worst = max(worst, float(np.abs(a - b).max() / np.abs(a).max()))
        alike += int((a == b).all())
        steps += 1
    print(f"{slots} sequences: {alike} of {steps} steps alike to the bit, largest difference "
          f"{worst:.1e}", flush=True)  # fmt: skip
    return worst < 1e-5


def _rings(be: Any, cfg: Any, weights: Any) -> bool:
    """A prompt longer than rings of open blocks are, against one that they have room for."""
    length, ids = 5000, np.random.default_rng(0).integers(3, cfg.vocab_size, 5040).tolist()
    logits = []
    for slack in (type(be).slack, length):
        be.slack = slack
        runner = Runner(be, cfg, weights, 6000, 1, length)
        steps = [ids[:length], *([x] for x in ids[length:])]
        logits.append([be.download(runner.run({0: step})) for step in steps])
    alike = sum(int((a == b).all()) for a, b in zip(*logits, strict=True))
    print(f"rings of {type(be).slack} rows and of {length}: {alike} of {len(steps)} steps alike to "
          "the bit", flush=True)  # fmt: skip
    be.slack = type(be).slack
    return alike == len(steps)


def _follow(placement: Any, whole: Any) -> bool:
    """Every expert's bytes, wherever the tables say that it is."""
    wrong = 0
    for layer, state in zip(placement.layers, placement.states(), strict=True):
        for m in ("w1", "w3", "w2"):
            blob = getattr(whole.layers[layer.number].ffn.experts, m).blob
            here = np.flatnonzero((state.slot_of >= 0) & (state.slot_of < layer.kept))
            slot = torch.from_numpy(state.slot_of[here]).long().cuda()
            wrong += int((layer.slots[m][slot] != blob[torch.from_numpy(here).cuda()]).sum())
            for e in np.flatnonzero(state.home_of >= 0)[::5]:
                wrong += int((layer.homes[m][state.home_of[e]].cuda() != blob[e]).sum())
            ptrs = placement.tables.ptrs[layer.number, ("w1", "w3", "w2").index(m)].tolist()
            wrong += int((np.array(ptrs) != layer.addresses(m, state)).sum())
            for e in np.flatnonzero(state.slot_of >= layer.kept):
                there = torch.as_tensor(_Bytes(ptrs[e], blob.shape[1]), device="cuda")
                wrong += int((there != blob[e]).sum())
    lent = placement.lent
    print(f"bytes or addresses that are wrong: {wrong}; lent memory is "
          f"{'there' if lent and lent.there else 'not there'}", flush=True)  # fmt: skip
    return wrong == 0


class _Bytes:
    """Memory of the GPU at an address, as PyTorch takes it."""

    def __init__(self, address: int, size: int) -> None:
        place = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
        self.__cuda_array_interface__ = place


def _steps(be: Any, runner: Runner) -> None:
    """Decode with copies inside the step, and with reads through the pointer alone."""
    copies = be.placement.fetch
    try:
        _each_way(be, runner)
    finally:
        be.placement.fetch = copies


def _each_way(be: Any, runner: Runner) -> None:
    for name, fetch in (("copied first", be.placement.fetch), ("read in place", lambda *_: None)):
        be.placement.fetch = fetch
        for slots in (1, 8):
            again = Runner(be, runner.cfg, runner.weights, 2048, slots, 64)
            rng = np.random.default_rng(0)

            def step(again: Runner = again, slots: int = slots, rng: Any = rng) -> None:
                ids = {s: [int(rng.integers(3, again.cfg.vocab_size))] for s in range(slots)}
                again.run(ids, pad_to=slots)

            for _ in range(6):
                step()
            before, clock = be.placement.report(), Clock(be.device)
            clock.mark()
            for _ in range(20):
                step()
                clock.mark()
            each, now = clock.intervals(), be.placement.report().since(before)
            layers = len(be.placement.layers)
            print(f"{name}, batch {slots}: {np.mean(each) / layers * 1e6:.0f} us a layer; hit rate "
                  f"{now.hit_rate:.2f}, copying {now.seconds.sum() / 20 / layers * 1e6:.0f} us, "
                  f"{now.host_rate / 1e9:.1f} GB/s", flush=True)  # fmt: skip


def _ring(placement: Any) -> None:
    stream = placement.stream()
    for _ in range(2):
        before = stream.copied
        wait(placement.device)
        since = time.perf_counter()
        stream.begin(placement.states())
        for layer in placement.layers:
            for _ in stream.groups(layer.number):
                pass
        wait(placement.device)
        seconds = time.perf_counter() - since
    print(f"ring: {(stream.copied - before) / seconds / 1e9:.1f} GB/s", flush=True)


def _shrinks(be: Any, runner: Runner) -> None:
    """Another process takes what is free: what does a long step say?"""

    def long_step() -> None:
        for slot in range(runner.slots):
            runner.rewind(slot, 0)
        runner.run({slot: [5] * runner.max_chunk for slot in range(runner.slots)})

    taking = (
        "import torch; free = torch.cuda.mem_get_info()[0] - (500 << 20);"
        "x = torch.empty(free, dtype=torch.uint8, device='cuda'); print(flush=True); input()"
    )
    long_step()  # lent memory is free now
    be.placement.stream().release()
    free(be.device)
    command, pipe = [sys.executable, "-c", taking], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            long_step()
            print("a card that shrank was not noticed", flush=True)
        except Ds4Error as error:
            print(f"a card that shrinks: {error}", flush=True)
        other.communicate("\n")


def pinning() -> None:
    """GB/s of ways to have pinned memory."""
    from ds4.backends.cuda.placement.pinned import PinnedPool, free_host_bytes

    torch.zeros(1, device="cuda")
    print(f"free host memory {free_host_bytes() / 1e9:.1f} GB, {os.cpu_count()} cores", flush=True)
    for path in ("/sys/kernel/mm/transparent_hugepage/enabled", "/proc/meminfo"):
        try:
            print(Path(path).read_text().split("\n")[0], flush=True)
        except OSError as error:
            print(error, flush=True)
    for threads in (1, 4, 8, 16):
        size = 2 << 30 if threads == 1 else 8 << 30
        pool = PinnedPool([size // 16] * 16, "cuda:0", threads)
        for _ in range(16):
            pool.take(size // 16)
        print(f"pinning, {threads} threads: {size / pool.seconds / 1e9:.1f} GB/s", flush=True)
        del pool
    since = time.perf_counter()
    torch.empty(2 << 30, dtype=torch.uint8, pin_memory=True)
    print(f"cudaHostAlloc: {(2 << 30) / (time.perf_counter() - since) / 1e9:.1f} GB/s", flush=True)


if __name__ == "__main__":
    main()
