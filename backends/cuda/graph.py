"""Steps recorded as CUDA graphs: one launch replays every kernel of a step.

A step of a shape that was seen before is recorded; from then on only its integers are copied to
the device. A single eager run comes first: it compiles what is new. Chunks of prompts, of up to 256
tokens, are padded to a few sizes, so that their shapes repeat: launched one by one their kernels
take the host longer than the GPU. So they do where guesses are verified or drafted, whose shapes
repeat by themselves, up to VERIFIED tokens. Longer steps keep the GPU busy, and are not recorded.

Logits of all recordings lie in the same memory, one place for few rows and one for many: however
many shapes there are, they take no more.
"""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds4.plan.memory import RECORDED, SHAPES, VERIFIED
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
    written: NDArray[np.int32]  # which is written through this
    logits: Tensor
    copied: torch.cuda.Event  # the pinned memory may be written again


class Graphs:
    """A function of a host Step, run on the device. What it returns is valid until its next call.

    `recorded` counts the recordings. SHAPES of them are kept, those used last.
    """

    def __init__(self, fn: Callable[[Step], Tensor], be: Any) -> None:
        self.fn, self.be = fn, be
        self.recorded = 0
        self._graphs: dict[Key, _Recorded | None] = {}  # what was used last comes last
        self._logits: dict[int, Tensor | None] = {}  # of recordings of up to so many rows
        self._compiled: set[int] = set()  # kinds of steps, by their tokens
        self._pool = torch.cuda.graph_pool_handle()
        if not isinstance(be.ranks, Alone):
            be.ranks.keep(self)

    def forget(self) -> None:
        """Drop what was recorded."""
        self._graphs.clear()
        self._logits.clear()

    def __call__(self, step: Step) -> Any:
        if len(step.last) == 1 and self.be.cache == "exact":
            made: Any = self._any(accompanied(step))
            return tuple(x[:1] for x in made) if isinstance(made, tuple) else made[:1]
        return self._any(step)

    def _any(self, step: Step) -> Tensor:
        if len(step.tokens) <= SMALL:
            return self._run(step, step.near is None)
        unread = getattr(self.be, "compiles_ahead", False)  # by host code, while it runs
        if unread and verifies(step):
            return self._run(step, True)
        # padding may change how a matrix is cut up, and so bits
        if not (unread and self.be.cache == "native" and repeats(step)):
            return self._run(step, False)
        rows = len(step.last)
        return self._run(padded(step), True)[:rows]

    def _run(self, step: Step, recordable: bool) -> Tensor:
        key = _key(step)
        if not recordable or key not in self._graphs:
            if recordable:
                self._graphs[key] = None
            self._compile(step, recordable)
            return self.fn(step.on(self.be))
        found = self._graphs.pop(key)
        if found is None:
            found = self._record(step)
        self._graphs[key] = found
        found.copied.synchronize()
        _flatten(step, found.written)
        found.numbers.copy_(found.host, non_blocking=True)
        found.copied.record()
        _overwrite(found.numbers, step.tokens)
        found.graph.replay()
        return found.logits

    def _compile(self, step: Step, recordable: bool) -> None:
        """Compile at once what the first step of a kind would compile one by one."""
        tokens = len(step.tokens)
        often = recordable or tokens <= SMALL or tokens in RECORDED
        kind = tokens if often else SMALL << tokens.bit_length()
        if kind in self._compiled or not getattr(self.be, "compiles_ahead", False):
            return
        self._compiled.add(kind)
        # what fails here, or is not tried, is compiled by the step itself, which then says why
        with suppress(Exception), compile_only():
            self.fn(step.on(self.be))

    def _record(self, step: Step) -> _Recorded:
        host = torch.zeros(sum(_rooms(step)), dtype=torch.int32, pin_memory=True)
        written = host.numpy()
        _flatten(step, written)
        numbers = host.to(self.be.device)
        _overwrite(numbers, step.tokens)
        on_device = _spread(step, numbers)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        self._make_room()
        # other threads, those of NCCL's watchdog, may go on
        how: dict[str, Any] = {"pool": self._pool, "capture_error_mode": "thread_local"}
        with _nothing_collected(), self._in_place(len(step.last)), torch.cuda.graph(graph, **how):
            logits = self.fn(on_device)
        self.recorded += 1
        copied = torch.cuda.Event()
        copied.record()
        return _Recorded(graph, numbers, host, written, logits, copied)

    def _make_room(self) -> None:
        """Drop the recording that was not used for longest, if there are too many."""
        kept = [key for key, found in self._graphs.items() if found is not None]
        if len(kept) >= SHAPES:
            self._graphs[kept[0]] = None  # of a shape that was seen

    def _in_place(self, rows: int) -> Any:
        """While it lasts a backend that can puts its logits where those of all recordings are."""
        if not hasattr(self.be, "logits_in"):
            return nullcontext()
        most = SMALL if rows <= SMALL else VERIFIED
        if most not in self._logits:
            self._logits[most] = self.be.empty_logits(most)
        return self.be.logits_in(self._logits[most])


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


def verifies(step: Step) -> bool:
    """Whether the shape will come again: guesses, or single tokens of many sequences.

    Every row has logits then, or the step is a drafter's own: it completes no blocks.
    """
    tokens, drafts = len(step.tokens), step.before is not None and not step.emit
    return step.near is None and tokens <= VERIFIED and (tokens == len(step.last) or drafts)


def repeats(step: Step) -> bool:
    """Whether a chunk can be padded to a size that others have too."""
    return step.near is None and len(step.tokens) <= RECORDED[-1] and len(step.last) <= SMALL


def accompanied(step: Step) -> Step:
    """A single token, and a single row of logits, each with another that nobody wants: they then
    take the kernels that they have in company, and come out of them with the same bits."""
    step = replace(step, last=_and(step.last, 0))
    if len(step.tokens) > 1:
        return step
    return replace(
        step,
        tokens=_and(step.tokens, 0),
        slot=_and(step.slot, 0),
        pos=_and(step.pos, -1),
        before=None if step.before is None else _and(step.before, -1),
    )


def _and(x: Any, value: int) -> Any:
    if isinstance(x, Tensor):
        return torch.nn.functional.pad(x, (0, 1), value=value)
    return np.pad(x, (0, 1), constant_values=value)


def padded(step: Step) -> Step:
    """A chunk with padding up to a size of RECORDED, and as many blocks as it may complete.

    The first rows of its logits are the chunk's.
    """
    size = next(size for size in RECORDED if size >= len(step.tokens))
    more = size - len(step.tokens)
    rows = 1 << (len(step.last) - 1).bit_length()
    return replace(
        step,
        tokens=np.pad(step.tokens, (0, more)),
        slot=np.pad(step.slot, (0, more)),
        pos=np.pad(step.pos, (0, more), constant_values=-1),
        emit={ratio: _filled(blocks, -(-size // ratio)) for ratio, blocks in step.emit.items()},
        last=np.pad(step.last, (0, rows - len(step.last))),
        before=None if step.before is None else np.pad(step.before, (0, more), constant_values=-1),
    )


def _filled(blocks: Any, count: int) -> Any:
    """(E, 2) -> (max(E, count), 2), with blocks that are none."""
    none = np.tile(np.array([0, -1], np.int32), (max(0, count - len(blocks)), 1))
    return np.concatenate([blocks, none])


def _key(step: Step) -> Key:
    emits = (x for ratio, blocks in sorted(step.emit.items()) for x in (ratio, len(blocks)))
    draws = (0, 0) if step.draws is None else step.draws.shape[:2]
    kind = int(step.before is None), *draws
    return len(step.tokens), len(step.last), step.span, *kind, *emits


def _arrays(step: Step) -> list[Any]:
    emits = [blocks for _, blocks in sorted(step.emit.items())]
    more = [x for x in (step.before, step.draws) if x is not None]
    return [step.tokens, step.slot, step.pos, step.last, *emits, *more]


def _rooms(step: Step) -> list[int]:
    """Integers that each array gets: whole 16 bytes, as arrays of their own have in other steps.

    Triton compiles a kernel again for a pointer that is no multiple of 16.
    """
    return [_room(x) for x in _arrays(step)]


def _room(x: Any) -> int:
    return -(-math.prod(x.shape) // 4) * 4


def _flatten(step: Step, into: Any) -> None:
    """All arrays of a step; of tokens that are on the device already, their place is left."""
    start = 0
    for x in _arrays(step):
        if not isinstance(x, Tensor):
            into[start : start + x.size] = x.reshape(-1).view(np.int32)
        start += _room(x)


def _overwrite(numbers: Tensor, tokens: Any) -> None:
    """Tokens that are on the device already take their place there."""
    if isinstance(tokens, Tensor):
        numbers[: len(tokens)].copy_(tokens)


def _spread(step: Step, numbers: Tensor) -> Step:
    """The step whose arrays are parts of one tensor."""
    arrays = _arrays(step)
    parts = numbers.split(_rooms(step))
    tokens, slot, pos, last, *more = (
        part[: math.prod(x.shape)].view(x.shape) for part, x in zip(parts, arrays, strict=True)
    )
    draws = None if step.draws is None else more.pop().view(torch.float32)
    before = None if step.before is None else more.pop()
    emit = dict(zip(sorted(step.emit), more, strict=True))
    made = {"last": last, "emit": emit, "before": before, "draws": draws}
    return replace(step, tokens=tokens, slot=slot, pos=pos, **made)
