"""What bench.two_gpus measures, on every rank alike: decoding, a prompt, sums, energy."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ds4.backend import open_backend
from ds4.errors import PowerError
from ds4.loader import Synthetic
from ds4.power import PowerSource, Sampler
from ds4.power.nvidia import nvidia
from ds4.power.sampler import now
from ds4.runner import Runner
from ds4.weights import load_weights

from .machine import Clock, describe, wait
from .models import Model, free

WARM = 5
LENGTH = 520  # and up to 1,024 in the same graph
STEPS = {1: 60, 8: 30, 32: 20}
PROMPT = 8192
WINDOW_S = 2.5  # of energy: a board's counter takes a new value every tenth of a second


def speed(name: str, device: str, part: str) -> Iterator[dict[str, Any]]:
    """Rows: each is measured on all ranks at once."""
    model = _open(name, device, by_heads=part != "whole")
    at = describe(model.be.device)
    meters = [] if part == "slow" else _meters(model)
    if part in ("heads", "slow"):
        for row in _sums(model):
            yield row | at
    if meters:
        yield {"kind": "idle"} | _energy(model, meters, lambda: time.sleep(0.02), 0.02, 0) | at
    for batch in STEPS:
        yield _decode(model, batch, meters) | at
        free(model.be.device)
    yield _prefill(model, meters) | at


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


def _decode(model: Model, batch: int, meters: list[PowerSource]) -> dict[str, Any]:
    """One token for each of `batch` sequences a step: the median step, and joules a token."""
    be: Any = model.be
    runner = model.runner(batch, 1024, 256, length=LENGTH)
    seconds = _median(model, runner, batch, STEPS[batch])
    row = {
        "kind": "decode",
        "batch": batch,
        "tok_s": round(batch / seconds, 1),
        "ms": round(seconds * 1e3, 3),
    }
    row |= _energy(model, meters, lambda: _step(model, runner, batch), seconds, batch)
    if be.ranks.size > 1:
        with _without_sums(be):
            bare = model.runner(batch, 1024, 256, length=LENGTH)
            mine = _median(model, bare, batch, 20)
        each = _of_ranks(mine * 1e3)
        row["ms_without_sums_by_rank"] = [round(ms, 3) for ms in each]
        row["share_of_sums_and_waiting"] = round(1 - max(each) / (seconds * 1e3), 3)
    return row


@contextmanager
def _without_sums(be: Any) -> Iterator[None]:
    real = be.ranks.all_sum
    be.ranks.all_sum = lambda x: x
    try:
        yield
    finally:
        be.ranks.all_sum = real


def _of_ranks(mine: float) -> list[float]:
    """Every rank's number."""
    if not dist.is_initialized():
        return [mine]
    here = torch.tensor([mine], dtype=torch.float64)
    each = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(each, here)
    return [float(x) for x in each]


def _step(model: Model, runner: Runner, batch: int) -> None:
    if runner.lengths[0] == runner.context:
        runner.lengths = [LENGTH] * batch  # steps go on in the same graph
    runner.run(model.next_tokens(batch), pad_to=batch)


def _median(model: Model, runner: Runner, batch: int, steps: int) -> float:
    for _ in range(WARM):
        _step(model, runner, batch)
    wait(model.be.device)
    clock = Clock(model.be.device)
    clock.mark()
    for _ in range(steps):
        _step(model, runner, batch)
        clock.mark()
    return statistics.median(clock.intervals())


def _prefill(model: Model, meters: list[PowerSource], runs: int = 3) -> dict[str, Any]:
    prompt = PROMPT if model.synthetic.model == "flash" else 128
    runner = model.runner(1, prompt, prompt)
    ids, times = model.tokens(prompt), []

    def work() -> None:
        runner.rewind(0, 0)
        runner.run({0: ids})

    for _ in range(runs + 1):
        clock = Clock(model.be.device)
        clock.mark()
        work()
        clock.mark()
        times += clock.intervals()
    seconds = statistics.median(times[1:])
    row = {"kind": "prefill", "tokens": prompt, "tok_s": round(prompt / seconds, 1)}
    row["ms"] = round(seconds * 1e3, 2)
    return row | _energy(model, meters, work, seconds, prompt)


def _sums(model: Model) -> Iterator[dict[str, Any]]:
    """One sum after another, as in a step: in a CUDA graph for few tokens, eager for many."""
    be: Any = model.be
    for tokens in (1, 8, 32, PROMPT if model.synthetic.model == "flash" else 128):
        x = torch.zeros(tokens, model.cfg.hidden_size, device=be.device)
        chain = model.cfg.num_hidden_layers if tokens <= 32 else 4

        def several(x: torch.Tensor = x, chain: int = chain) -> None:
            for _ in range(chain):
                be.ranks.all_sum(x)

        several()
        recorded = be.ranks.recordable and tokens <= 32
        run: Callable[[], None] = several
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


def _meters(model: Model) -> list[PowerSource]:
    """Of the GPUs that the ranks use."""
    be: Any = model.be
    try:
        return [*nvidia()[: be.ranks.size]]
    except PowerError as error:
        print(f"   no energy: {error}", flush=True)
        return []


def _energy(
    model: Model,
    meters: list[PowerSource],
    work: Callable[[], None],
    seconds: float,
    tokens: int,
) -> dict[str, Any]:
    """Of `work`, which takes about `seconds` and makes so many tokens, again and again."""
    if max(_of_ranks(len(meters))) == 0:  # all ranks do the same
        return {}
    count = math.ceil(WINDOW_S / max(_of_ranks(seconds)))
    be: Any = model.be
    with Sampler(meters if be.ranks.rank == 0 else []) as sampler:
        time.sleep(0.3)
        wait(be.device)
        start = now()
        for _ in range(count):
            work()
        wait(be.device)
        end = now()
    found = sampler.energies(start, end)
    joules = [one.joules or math.nan for one in found]
    row: dict[str, Any] = {"watts": [round(j / (end - start), 1) for j in joules]}  # of each GPU
    row |= {"joules_a_token": round(sum(joules) / count / tokens, 4)} if tokens and found else {}
    return row | {"power_problems": [p for one in found for p in one.problems]}
