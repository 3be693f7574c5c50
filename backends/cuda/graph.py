"""Steps recorded as CUDA graphs: one launch replays every kernel of a step.

A step of a shape that was seen before is recorded; from then on only its integers are copied to
the device. A single eager run comes first: it compiles what is new.
"""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds4.ranks import Alone
from ds4.step import Step

from .activation import SMALL
from .ahead import compile_only

Key = tuple[int, ...]


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    numbers: Tensor  # int32, on the device: every array of the step
    host: Tensor  # the same in pinned memory
    logits: Tensor
    copied: torch.cuda.Event  # the pinned memory may be written again


class Graphs:
    """A function of a host Step, run on the device. What it returns is valid until its next call.

    `recorded` counts the recordings.
    """

    def __init__(self, fn: Callable[[Step], Tensor], be: Any) -> None:
        self.fn, self.be = fn, be
        self.recorded = 0
        self._graphs: dict[Key, _Recorded | None] = {}
        self._compiled: set[int] = set()  # kinds of steps, by their tokens
        self._pool = torch.cuda.graph_pool_handle()
        if not isinstance(be.ranks, Alone):
            be.ranks.keep(self)

    def forget(self) -> None:
        """Drop what was recorded."""
        self._graphs.clear()

    def __call__(self, step: Step) -> Tensor:
        key = _key(step)
        if len(step.tokens) > SMALL or step.near or key not in self._graphs:
            if len(step.tokens) <= SMALL:
                self._graphs[key] = None
            self._compile(step)
            return self.fn(step.on(self.be))
        found = self._graphs[key]
        if found is None:
            found = self._graphs[key] = self._record(step)
        found.copied.synchronize()
        _flatten(step, found.host.numpy())
        found.numbers.copy_(found.host, non_blocking=True)
        found.copied.record()
        _overwrite(found.numbers, step.tokens)
        found.graph.replay()
        return found.logits

    def _compile(self, step: Step) -> None:
        """Compile at once what the first step of a kind would compile one by one."""
        tokens = len(step.tokens)
        kind = tokens if tokens <= SMALL else SMALL << tokens.bit_length()
        if kind in self._compiled or not getattr(self.be, "compiles_ahead", False):
            return
        self._compiled.add(kind)
        # what fails here, or is not tried, is compiled by the step itself, which then says why
        with suppress(Exception), compile_only():
            self.fn(step.on(self.be))

    def _record(self, step: Step) -> _Recorded:
        count = sum(math.prod(x.shape) for x in _arrays(step))
        host = torch.empty(count, dtype=torch.int32, pin_memory=True)
        _flatten(step, host.numpy())
        numbers = host.to(self.be.device)
        _overwrite(numbers, step.tokens)
        on_device = _spread(step, numbers)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # other threads, those of NCCL's watchdog, may go on
        how: dict[str, Any] = {"pool": self._pool, "capture_error_mode": "thread_local"}
        with _nothing_collected(), torch.cuda.graph(graph, **how):
            logits = self.fn(on_device)
        self.recorded += 1
        copied = torch.cuda.Event()
        copied.record()
        return _Recorded(graph, numbers, host, logits, copied)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Other graphs that are garbage stay: destroying one would spoil the recording of another."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _key(step: Step) -> Key:
    emits = (x for ratio, blocks in sorted(step.emit.items()) for x in (ratio, len(blocks)))
    return len(step.tokens), len(step.last), step.span, *emits


def _arrays(step: Step) -> list[Any]:
    emits = [blocks for _, blocks in sorted(step.emit.items())]
    before = [] if step.before is None else [step.before]
    return [step.tokens, step.slot, step.pos, step.last, *emits, *before]


def _flatten(step: Step, into: Any) -> None:
    """All arrays of a step; of tokens that are on the device already, their place is left."""
    first = len(step.tokens) if isinstance(step.tokens, Tensor) else 0
    arrays = _arrays(step)[bool(first) :]
    np.concatenate([x.reshape(-1) for x in arrays], out=into[first:])


def _overwrite(numbers: Tensor, tokens: Any) -> None:
    """Tokens that are on the device already take their place there."""
    if isinstance(tokens, Tensor):
        numbers[: len(tokens)].copy_(tokens)


def _spread(step: Step, numbers: Tensor) -> Step:
    """The step whose arrays are parts of one tensor."""
    arrays = _arrays(step)
    parts = numbers.split([math.prod(x.shape) for x in arrays])
    tokens, slot, pos, last, *more = (
        part.view(x.shape) for part, x in zip(parts, arrays, strict=True)
    )
    emit = dict(zip(sorted(step.emit), more, strict=False))
    before = None if step.before is None else more[-1]
    return replace(step, tokens=tokens, slot=slot, pos=pos, last=last, emit=emit, before=before)
