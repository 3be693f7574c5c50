"""What bench.two_gpus measures, on every rank alike: decoding, a prompt, sums, energy."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ds4.backend import open_backend
from ds4.loader import Synthetic
from ds4.runner import Runner
from ds4.weights import load_weights

from .machine import Clock, describe, wait
from .models import Model, free

WARM = 5
LENGTH = 520  # and up to 1,024 in the same graph
STEPS = {1: 300, 8: 100, 32: 40}
PROMPT = 8192


def speed(name: str, device: str, by_heads: bool) -> Iterator[dict[str, Any]]:
    """Rows: each is measured on all ranks at once."""
    model = _open(name, device, by_heads)
    at = describe(model.be.device)
    if by_heads and model.be.ranks.size > 1:  # type: ignore[attr-defined]
        for row in _sums(model):
            yield row | at
    for batch in STEPS:
        yield _decode(model, batch) | at
        free(model.be.device)
    yield _prefill(model) | at
    free(model.be.device)
    del model
    free(device)


def _open(name: str, device: str, by_heads: bool) -> Model:
    large = name == "flash"
    synthetic = Synthetic(name, "native", 7 if large else None)
    be: Any = open_backend("torch" if device == "cpu" else "cuda", device)
    be.split_heads = by_heads
    cfg, source = synthetic.config(), synthetic.source()
    start = time.perf_counter()
    model = Model(synthetic, cfg, be, load_weights(be, cfg, source), source)
    wait(be.device)
    used = torch.cuda.memory_allocated() / 1e9 if be.device != "cpu" else 0
    print(f"   loaded in {time.perf_counter() - start:.1f} s, {used:.1f} GB", flush=True)
    return model


def _decode(model: Model, batch: int) -> dict[str, Any]:
    """One token for each of `batch` sequences a step: the median step, and joules a token."""
    runner = model.runner(batch, 1024, 256, length=LENGTH)
    seconds, joules = _steps(model, runner, batch, STEPS[batch])
    row = {
        "kind": "decode",
        "batch": batch,
        "tok_s": round(batch / seconds, 1),
        "ms": round(seconds * 1e3, 3),
        "joules_a_token": joules,
    }
    be: Any = model.be
    if be.ranks.size > 1:
        with _without_sums(be):
            bare = model.runner(batch, 1024, 256, length=LENGTH)
            mine, _ = _steps(model, bare, batch, 20)
        here = torch.tensor([mine * 1e3], dtype=torch.float64)
        each = [torch.empty_like(here) for _ in range(be.ranks.size)]
        dist.all_gather(each, here)
        row["ms_without_sums_by_rank"] = [round(float(ms), 3) for ms in each]
        row["share_of_sums_and_waiting"] = round(1 - float(max(each)) / (seconds * 1e3), 3)
    return row


@contextmanager
def _without_sums(be: Any) -> Iterator[None]:
    real = be.ranks.all_sum
    be.ranks.all_sum = lambda x: x
    try:
        yield
    finally:
        be.ranks.all_sum = real


def _steps(model: Model, runner: Runner, batch: int, steps: int) -> tuple[float, float | None]:
    def step() -> None:
        runner.run(model.next_tokens(batch), pad_to=batch)

    for _ in range(WARM):
        step()
    wait(model.be.device)
    clock, before = Clock(model.be.device), energy()
    clock.mark()
    for _ in range(steps):
        step()
        clock.mark()
    times = clock.intervals()
    return statistics.median(times), _joules(before, energy(), steps * batch)


def _prefill(model: Model, runs: int = 3) -> dict[str, Any]:
    prompt = PROMPT if model.synthetic.model == "flash" else 128
    runner = model.runner(1, prompt, prompt)
    ids, times = model.tokens(prompt), []
    before = energy()
    for run in range(runs + 1):
        before = energy() if run == 1 else before
        runner.rewind(0, 0)
        clock = Clock(model.be.device)
        clock.mark()
        runner.run({0: ids})
        clock.mark()
        times += clock.intervals()
    seconds = statistics.median(times[1:])
    return {
        "kind": "prefill",
        "tokens": prompt,
        "tok_s": round(prompt / seconds, 1),
        "ms": round(seconds * 1e3, 2),
        "joules_a_token": _joules(before, energy(), prompt * runs),
    }


def _sums(model: Model, chain: int = 43) -> Iterator[dict[str, Any]]:
    """One sum after another, as in a step: in a CUDA graph for few tokens, eager for many."""
    be: Any = model.be
    for tokens in (1, 8, 32, PROMPT if model.synthetic.model == "flash" else 128):
        x = torch.zeros(tokens, model.cfg.hidden_size, device=be.device)

        def several(x: torch.Tensor = x) -> None:
            for _ in range(chain):
                be.ranks.all_sum(x)

        several()
        run, recorded = several, be.ranks.recordable and tokens <= 32
        if recorded:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                several()
            run = graph.replay
        clock = Clock(be.device)
        for _ in range(12):
            clock.mark()
            run()
        clock.mark()
        seconds = statistics.median(clock.intervals()[2:]) / chain
        yield {
            "kind": "sum",
            "tokens": tokens,
            "us": round(seconds * 1e6, 2),
            "gb_s": round(x.nbytes / seconds / 1e9, 2),
            "in_graph": recorded,
        }


def energy() -> list[dict[str, float]]:
    """Of every GPU of this host: joules since its driver started, and memory in use."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver
        return []
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        joules = pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3
        used = round(pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e9, 2)
        found.append({"joules": joules, "used_gb": used})
    return found


def _joules(before: list[Any], after: list[Any], tokens: int) -> Any:
    """A token's, of each GPU of the host: one that has nothing to do idles."""
    pairs = zip(before, after, strict=True)
    return [round((b["joules"] - a["joules"]) / tokens, 3) for a, b in pairs] or None
