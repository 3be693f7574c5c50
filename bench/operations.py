"""Where the time of a step goes: seconds of device work for each operation of the interface."""

import json
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds4 import model as definition
from ds4.backend import Weights
from ds4.plan.sizes import row_bytes
from ds4.runner import Runner
from ds4.step import Chunk, plan

from .floors import touched
from .machine import wait
from .models import Model

MARK = "ds4:"  # begins the names of operations in the record
UNTIMED = ("load", "alloc", "upload", "download")


@dataclass
class Cost:
    """One operation with the same weights in every layer that has it, for one step."""

    name: str
    calls: int = 0
    seconds: float = 0.0
    kernels: int = 0
    nbytes: float = 0.0  # of weights and cache rows that it must read


def operations(model: Model, runner: Runner, tokens: dict[int, list[int]]) -> list[Cost]:
    """The costs of one step, the largest first; the step is run again and again but not kept.

    On a GPU a time is the sum over the kernels that an operation launched, as the profiler saw
    them, so that waiting between kernels is in none. The step runs as written, not from a graph.
    """
    chunks = [Chunk(slot, runner.lengths[slot], ids) for slot, ids in tokens.items()]
    ratios = sorted({ratio for ratio in model.cfg.compress_ratios if ratio})
    step = plan(chunks, ratios, pad_to=len(chunks)).on(model.be)
    labels = Labels(model, runner, sum(map(len, tokens.values())))

    def run() -> None:
        be: Any = Marked(model.be, labels)
        definition.forward(be, model.cfg, model.weights, runner.cache, step)
        wait(model.be.device)

    run()
    labels.costs.clear()
    if model.be.device.startswith("cuda"):
        for label, seconds in attributed(trace(run)):
            labels.costs[label].seconds += seconds
            labels.costs[label].kernels += 1
    else:
        run()
    return sorted(labels.costs.values(), key=lambda cost: -cost.seconds)


class Labels:
    """What an operation is called in the table, and the bytes it must read."""

    def __init__(self, model: Model, runner: Runner, tokens: int) -> None:
        self.model, self.runner, self.tokens = model, runner, tokens
        self.costs: dict[str, Cost] = {}
        self._names: dict[int, str] = {}
        for layer, w in enumerate(model.weights.layers):
            for name, weight in _leaves(w, ""):
                self._names.setdefault(id(weight), f"layers.{layer}.{name}")
        for name, weight in _leaves(model.weights, ""):
            self._names.setdefault(id(weight), name)
        self._sizes: dict[str, int] = {}
        for name in model.source.shapes:
            module = _module(name)
            self._sizes[module] = self._sizes.get(module, 0) + model.source.nbytes(name)

    def find(self, operation: str, args: tuple[Any, ...]) -> tuple[str, float]:
        """A label, and bytes."""
        names = [self._names[id(leaf)] for leaf in _flat(args) if id(leaf) in self._names]
        short = [name.removeprefix("layers.").lstrip("0123456789").lstrip(".") for name in names]
        nbytes = float(sum(self._sizes.get(name, 0) for name in names))
        if operation in ("linear", "linears", "grouped_linear"):
            return f"{operation} {' '.join(part.removeprefix('attn.') for part in short)}", nbytes
        if operation == "experts":
            share = touched(self.model, self.tokens) / self.model.cfg.n_routed_experts
            routed = sum(self._sizes[n] for n in names if ".experts." in n)
            shared = sum(self._sizes[n] for n in names if ".shared_experts." in n)
            return "experts", routed * share + shared
        if operation in ("attention", "remember", "index"):
            return self._cached(operation, args)
        return operation, nbytes if operation not in ("embed", "route") else self._chosen(names)

    def _chosen(self, names: list[str]) -> float:
        """Whole matrices but of tables, of which a token reads a row."""
        total = 0.0
        for name in names:
            rows = self.model.cfg.vocab_size if name == "embed" or "tid2eid" in name else 0
            total += self._sizes[name] * (self.tokens / rows if rows else 1)
        return total

    def _cached(self, operation: str, args: tuple[Any, ...]) -> tuple[str, float]:
        """Operations on caches, by the layer's ratio."""
        cfg, slots = self.model.cfg, len(self.runner.lengths)
        kv, index = row_bytes(cfg)
        length = max(self.runner.lengths) + 1
        if operation == "index":
            return "index", slots * (length // 4) * index
        ratio = args[0].ratio
        if operation == "remember":
            return f"remember, ratio {ratio}", 0.0
        entries = length // ratio if ratio else 0
        chosen = min(entries, cfg.index_topk) if ratio == 4 else entries
        rows = min(length, cfg.sliding_window) + chosen
        return f"attention, ratio {ratio}", float(slots * rows * kv)


def _module(name: str) -> str:
    """The tree's name for an official tensor: weights/load.py joins and stacks some."""
    name = name.removesuffix(".weight")
    if ".ffn.experts." in name:
        head, _, matrix = name.rpartition(".")
        return f"{head.rpartition('.')[0]}.{matrix}"
    for part in (".wkv", ".wgate"):
        if "compressor" in name and name.endswith(part):
            return name.removesuffix(part) + ".wkv_gate"
    for part in ("fn", "base", "scale"):
        if name.endswith(f"_{part}"):
            return name.removesuffix(f"_{part}") + f".{part}"
    return name.replace("gate.weight", "gate")


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Weights of a tree by their official module names."""
    for name, value in vars(tree).items():
        if name in ("layers", "ratio") or value is None:
            continue
        if isinstance(value, Weights):
            yield from _leaves(value, f"{path}{name}.")
        else:
            full = path + name
            yield full.removesuffix(".weight") if full.endswith("gate.weight") else full, value


def _flat(args: Any) -> Iterator[Any]:
    for item in args:
        if isinstance(item, (list, tuple)):
            yield from _flat(item)
        elif isinstance(item, Weights):
            yield from _flat(vars(item).values())
        else:
            yield item


class Marked:
    """A backend whose operations leave their label in the profiler's record."""

    def __init__(self, be: Any, labels: Labels) -> None:
        self.be, self.labels = be, labels

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self.be, name)
        if name in UNTIMED or not callable(operation):
            return operation

        def marked(*args: Any) -> Any:
            label, nbytes = self.labels.find(name, args)
            cost = self.labels.costs.setdefault(label, Cost(label))
            cost.calls += 1
            cost.nbytes += nbytes
            with torch.profiler.record_function(MARK + label):
                start = time.perf_counter()
                result = operation(*args)
                if not self.be.device.startswith("cuda"):
                    cost.seconds += time.perf_counter() - start
            return result

        return marked


def attributed(record: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """(label, seconds) of each kernel that was launched while an operation ran on the host."""
    marks = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"][len(MARK) :])
        for event in record
        if event.get("cat") == "user_annotation" and event["name"].startswith(MARK)
    )
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in record
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }
    for event in kernels(record):
        at = launches.get(event["args"].get("correlation"))
        if at is None:
            continue
        place = bisect_right(marks, (at, float("inf"), "")) - 1
        if place >= 0 and at <= marks[place][1]:
            yield marks[place][2], event["dur"] / 1e6


def trace(run: Callable[[], None]) -> list[dict[str, Any]]:
    """The profiler's record of a call; times in microseconds."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if torch.cuda.is_available() else [kinds.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def kernels(record: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The work of the device: kernels, and copies and fills between them."""
    kinds = "kernel", "gpu_memcpy", "gpu_memset"
    return [event for event in record if event.get("cat") in kinds]


def by_kernel(record: list[dict[str, Any]]) -> dict[str, tuple[int, float]]:
    """Kernel name -> how many, and their seconds."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for event in kernels(record):
        found[event["name"]].append(event["dur"] / 1e6)
    return {name: (len(each), sum(each)) for name, each in found.items()}
