"""The real model with a third or a half of its experts on the GPU: the 5090x2 stand-in.

    python -m bench.offload [--recipe native] [--experts 256] [--gpu-memory 64GB]
        [--host-memory 126GB] [--steps 40] [--warm 300] [--prompt 8192] [--batches 1,8]
        [--synthetic flash] [--layers all]
        [--out bench/results/offload.jsonl]

One process a model: its start-up is a figure too. All layers have weights of their own. Experts are
drawn by tables from token to experts, a table a layer (every layer is a hash layer), so that the
routing is what it is said to be: uniform, or skewed: popularity as rank^-0.8 in a random order, and
a token is the one before it in 30 % of steps, so that its experts repeat. The GPU is filled to
--gpu-memory and no further, which is checked. Decode is the mean of its steps, after others that
let the cache settle. Peer: llama.cpp with MXFP4 experts of 28 of 43 layers on the same kind of
host's CPU, 11.0 tok/s and 477 in prefill.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()  # imports count

import numpy as np  # noqa: E402
import torch  # noqa: E402

from ds4.backend import open_backend  # noqa: E402
from ds4.config import Config  # noqa: E402
from ds4.loader import Synthetic  # noqa: E402
from ds4.plan.placement import memory_bytes, need_of  # noqa: E402
from ds4.plan.report import describe as describe_budget  # noqa: E402
from ds4.quant.recipes import RECIPES  # noqa: E402
from ds4.runner import Runner  # noqa: E402
from ds4.weights import load_weights  # noqa: E402
from ds4.weights.synthetic import Popularity, SyntheticCheckpoint  # noqa: E402

from .machine import Clock, describe, wait  # noqa: E402
from .models import free  # noqa: E402
from .offload_targets import PEER, PREFILL_TARGET, TARGETS, expected  # noqa: E402

REPETITION = 0.3
BEFORE = 576  # tokens of context: far enough from the next power of two, where graphs change


def main(arguments: list[str] | None = None) -> None:
    args = _arguments(arguments)
    bench = Bench(args)
    bench.start()
    if args.prompt:
        bench.prefill(args.prompt)
    for routing in ("uniform", "skewed"):
        bench.route(routing)
        for batch in args.batches if routing == "skewed" else args.batches[:1]:
            bench.decode(routing, batch)
    if 8 in args.batches:
        bench.first_tokens(8, 512)
    bench.end()


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a model larger than the GPU's memory")
    parser.add_argument("--recipe", default="native")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--gpu-memory", default="64GB")
    parser.add_argument("--host-memory", default="126GB")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm", type=int, default=300, help="decoded first, to fill the cache")
    parser.add_argument("--prompt", type=int, default=8192, help="0: no prefill")
    parser.add_argument("--batches", type=lambda s: [int(x) for x in s.split(",")], default=[1, 8])
    parser.add_argument("--synthetic", default="flash")
    parser.add_argument("--layers", type=int, help="only so many")
    parser.add_argument("--out", help="append a JSON line for each row")
    return parser.parse_args(given)


def shapes(synthetic: str, layers: int | None, experts: int) -> Config:
    """The config, with every layer's experts drawn by a table."""
    cfg = Synthetic(synthetic, layers=layers).config()
    return replace(cfg, n_routed_experts=experts, num_hash_layers=cfg.num_hidden_layers)


class Bench:
    """A loaded model, and rows of results."""

    machine, cards = "one GPU", 1

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.cfg = shapes(args.synthetic, args.layers, args.experts)
        self.common: dict[str, Any] = {}
        self.rng = np.random.default_rng(0)
        self.last: dict[int, int] = {}

    # loading

    def start(self) -> None:
        args, cfg = self.args, self.cfg
        imported = time.perf_counter()
        be: Any = open_backend("cuda", "auto")
        self.be = be
        self.outside = _used(self.be.device) - torch.cuda.memory_reserved()
        recipe = RECIPES["q8_0" if args.recipe == "native" else args.recipe]
        self.source = SyntheticCheckpoint(cfg, recipe=recipe)
        context = max(args.prompt, 1024) + 1024
        held = cfg.n_routed_experts // self.cards
        need = need_of(cfg, self.source, context, max(args.batches), held)
        host = memory_bytes(args.host_memory)
        self.be.place(need, memory_bytes(args.gpu_memory), host_memory=host)
        self.placement = self.be.placement
        if self.placement is None:
            raise SystemExit("everything fits: give a smaller --gpu-memory")
        budget = self.placement.budget
        print(json.dumps(describe_budget(budget)), flush=True)
        opened = time.perf_counter()
        self.weights = load_weights(self.be, cfg, self.source)
        wait(self.be.device)
        loaded = time.perf_counter()
        self.context = context
        length = args.prompt or 1024
        known = cfg, args.recipe, length, budget.gpu_bytes, host or 0, self.cards
        self.expected = expected(*known)
        pool = self.placement.pool
        self.common = {
            "bench": "offload",
            "machine": f"5090x2 stand-in: {self.machine} kept to {args.gpu_memory}",
            "recipe": args.recipe,
            "experts": args.experts,
            "layers": cfg.num_hidden_layers,
            "resident": round(budget.resident, 4),
            "gpu_experts_gb": round(budget.slot_bytes / 1e9, 1),
            "host_gb": round(pool.nbytes / 1e9, 1),
            **describe(self.be.device),
        }
        self._keep(
            kind="startup",
            import_s=round(imported - BEGAN, 2),
            open_s=round(opened - imported, 2),
            load_s=round(loaded - opened, 2),
            pinned_gb_s=round(pool.nbytes / max(pool.seconds, 1e-9) / 1e9, 2),
            pinned_s=round(pool.seconds, 2),
            peak_reserved_gb=round(torch.cuda.max_memory_reserved() / 1e9, 2),
        )
        torch.cuda.reset_peak_memory_stats()

    def route(self, routing: Any) -> None:
        """Let other experts be chosen: the tables of a model that routes so."""
        popularity = Popularity(routing, self.cfg.n_routed_experts, self.cfg.num_experts_per_tok)
        rng = np.random.default_rng(7)
        for layer in self.weights.layers:
            table = popularity.table(rng, self.cfg.vocab_size)
            layer.ffn.gate.tid2eid.copy_(torch.from_numpy(table))

    # rows

    def prefill(self, length: int) -> None:
        runner = self._runner(1, self.placement.budget.chunk)
        stream = self.placement.stream()
        ids = [int(i) for i in self.rng.integers(3, self.cfg.vocab_size, length)]
        times, copied = [], stream.copied
        for _ in range(3):
            runner.rewind(0, 0)
            clock = Clock(self.be.device)
            clock.mark()
            for start in range(0, length, runner.max_chunk):
                runner.run({0: ids[start : start + runner.max_chunk]})
            clock.mark()
            times += clock.intervals()
        seconds = min(times[1:])
        nbytes = (stream.copied - copied) / 3
        self._keep(
            kind="prefill",
            routing="uniform",
            batch=1,
            tokens=length,
            chunk=runner.max_chunk,
            tok_s=round(length / seconds, 1),
            seconds=round(seconds, 3),
            copied_gb=round(nbytes / 1e9, 1),
            host_gb_s=round(nbytes / seconds / 1e9, 1),
            expected_tok_s=round(self.expected.prefill or 0, 1),
            target=PREFILL_TARGET.get((self.args.recipe, self.args.experts)),
            peer_tok_s=PEER["prefill"],
        )

    def decode(self, routing: str, batch: int) -> None:
        args = self.args
        runner = self._runner(batch, BEFORE)
        runner.run({slot: self._random(BEFORE) for slot in range(batch)})
        few = batch > 1
        warm = args.warm // 4 if few or routing == "uniform" else args.warm
        for _ in range(warm):
            runner.run(self._tokens(routing, batch), pad_to=batch)
        before = self.placement.report()
        # repeated tokens find everything: it takes more to have 30 % of them
        steps = args.steps // 2 if few else args.steps * (3 if routing == "skewed" else 1)
        clock = Clock(self.be.device)
        clock.mark()
        for _ in range(steps):
            runner.run(self._tokens(routing, batch), pad_to=batch)
            clock.mark()
        each = clock.intervals()
        report = self.placement.report().since(before)
        mean = statistics.fmean(each)
        self._keep(
            kind="decode",
            routing=routing,
            batch=batch,
            tokens=runner.lengths[0],
            tok_s=round(batch / mean, 2),
            ms=round(mean * 1e3, 2),
            median_ms=round(statistics.median(each) * 1e3, 2),
            hit_rate=round(report.hit_rate, 4),
            host_gb_a_step=round(float(report.bytes.sum()) / steps / 1e9, 3),
            gpu_gb_a_step=round(float(report.gpu_bytes.sum()) / steps / 1e9, 3),
            host_gb_s=round(report.host_rate / 1e9, 1),
            copy_ms=round(float(report.seconds.sum()) / steps * 1e3, 2),
            passed=int(report.passed.sum()),
            swaps=self.placement.swaps.count,
            used_gb=round(_used(self.be.device) / 1e9, 2),
            reserved_gb=round(torch.cuda.memory_reserved() / 1e9, 2),
            tensors_gb=round(torch.cuda.memory_allocated() / 1e9, 2),
            expected_tok_s=None if few else round(self._expected(routing), 1),
            target=TARGETS.get((args.recipe, args.experts, routing, batch)),
            peer_tok_s=PEER["decode"] if batch == 1 else None,
        )

    def _expected(self, routing: str) -> float:
        one = self.expected
        return (one.decode if routing == "uniform" else one.skewed) or 0.0

    def first_tokens(self, streams: int, length: int) -> None:
        """So many prompts at once, as one step: when does each have its first token?"""
        runner = self._runner(streams, length)
        times = []
        for _ in range(2):
            for slot in range(streams):
                runner.rewind(slot, 0)
            wait(self.be.device)
            since = time.perf_counter()
            logits = runner.run({slot: self._random(length) for slot in range(streams)})
            self.be.download(logits[:, :8])
            times.append(time.perf_counter() - since)
        self._keep(
            kind="first tokens",
            routing="skewed",
            batch=streams,
            tokens=length,
            seconds=round(times[-1], 3),
            target=1.0,
        )

    def end(self) -> None:
        used = _used(self.be.device)
        limit = memory_bytes(self.args.gpu_memory) or 0
        self._keep(
            kind="memory",
            used_gb=round(used / 1e9, 2),
            limit_gb=limit / 1e9,
            peak_tensors_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2),
            peak_reserved_gb=round(torch.cuda.max_memory_reserved() / 1e9, 2),
            outside_torch_gb=round(self.outside / 1e9, 2),
        )

    # helpers

    def _runner(self, slots: int, chunk: int) -> Runner:
        self.runner = None
        free(self.be.device)
        self.runner = runner = Runner(self.be, self.cfg, self.weights, self.context, slots, chunk)
        return runner

    def _random(self, count: int) -> list[int]:
        return [int(i) for i in self.rng.integers(3, self.cfg.vocab_size, count)]

    def _tokens(self, routing: str, batch: int) -> dict[int, list[int]]:
        for slot, token in enumerate(self._random(batch)):
            if routing != "skewed" or slot not in self.last or self.rng.random() >= REPETITION:
                self.last[slot] = token
        return {slot: [self.last[slot]] for slot in range(batch)}

    def _keep(self, **row: Any) -> None:
        print(json.dumps(row), flush=True)
        if self.args.out:
            Path(self.args.out).parent.mkdir(parents=True, exist_ok=True)
            with Path(self.args.out).open("a") as file:
                file.write(json.dumps(self.common | row) + "\n")


def _used(device: str) -> int:
    """Bytes of the GPU's memory that anything holds."""
    free_now, total = torch.cuda.mem_get_info(device)
    return total - free_now


if __name__ == "__main__":
    main()
