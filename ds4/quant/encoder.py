"""The new bytes of a target's weights, in pieces, a few of which are made at once and ahead.

Memory holds those pieces and, for GPTQ, one layer's recorded inputs: nothing grows with the number
of experts or of layers.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from ..config import Config
from ..weights.load import Source
from ..weights.tensor import Array, HostTensor, stack
from .arrays import Arrays
from .convert import Method, convert
from .formats import FP8_BLOCK
from .gptq import encode_gptq, factor
from .inputs import Inputs
from .targets import Target

Importance = Mapping[str, Array]
Job = Callable[[], HostTensor]


class Encoder:
    """Reads weights from a source and converts them.

    importance  official name of a matrix -> (in,), the weight of each input's squared error
    inputs      what the experts were given; the experts' affine codes then come from GPTQ
    """

    def __init__(
        self,
        source: Source,
        cfg: Config,
        method: Method,
        importance: Importance,
        inputs: Inputs | None,
        on: Arrays,
    ) -> None:
        self.source, self.method, self.importance, self.on = source, method, importance, on
        self.experts = None if inputs is None else _Experts(source, cfg, importance, inputs, on)

    def pieces(self, target: Target) -> Iterator[HostTensor]:
        """Runs of rows of a target's matrices, first to last."""
        many = len(target.sources) > 1 and target.storage.format == "affine"
        if (
            self.experts and many and target.name.startswith("layers.")
        ):  # of a drafter none is known
            jobs = self.experts.jobs(target)
        else:
            jobs = self._jobs(target)
        return _in_order(jobs, self.on.workers)

    def _jobs(self, target: Target) -> Iterator[Job]:
        """Each source is read when it is due; several small ones make one job."""
        together = self.on.chunk // math.prod(target.shape)
        if len(target.sources) > 1 and together > 1 and target.storage.format == "affine":
            for start in range(0, len(target.sources), together):
                names = target.sources[start : start + together]
                tensors = stack([self.source.read(name, target.shape) for name in names])
                yield partial(self._convert_stack, tensors, names, target)
            return
        for name in target.sources:
            weight = self.importance.get(name)
            for rows in _split(self.source.read(name, target.shape), self.on.piece):
                yield partial(convert, rows, target.storage, self.method, weight, self.on)

    def _convert_stack(
        self, tensors: HostTensor, names: tuple[str, ...], target: Target
    ) -> HostTensor:
        each = [self.importance.get(name) for name in names]
        known = [np.ones(target.shape[-1]) if x is None else x for x in each]
        weights = np.stack(known)[:, None] if self.importance else None
        made = convert(tensors, target.storage, self.method, weights, self.on)
        return made.map(lambda part: part.reshape(-1, part.shape[-1]))


class _Experts:
    """GPTQ of routed experts.

    w1 and w3 share their layer's Hessian. w2's is its expert's own: the recorded inputs go through
    w1 and w3 once more. A Hessian of n tokens and K inputs counts n / (n + 2 K), the rest is the
    diagonal of mean squares; an expert that was never chosen keeps the diagonal.
    """

    def __init__(
        self, source: Source, cfg: Config, importance: Importance, inputs: Inputs, on: Arrays
    ) -> None:
        self.source, self.cfg, self.importance, self.on = source, cfg, importance, on
        self.inputs = inputs
        self.layer = -1  # whose inputs are held

    def jobs(self, target: Target) -> Iterator[Job]:
        layer, down = int(target.name.split(".")[1]), target.name.endswith(".w2.weight")
        self._hold(layer)
        shared = None if down else self._shared(target)
        for start in range(0, len(target.sources), self.on.batch):
            some = target.sources[start : start + self.on.batch]
            yield partial(self._encode, target, some, shared)

    def _hold(self, layer: int) -> None:
        if layer != self.layer:
            x, self.ids, self.weights = self.inputs.layer(layer)
            self.x, self.layer = self.on.put(x), layer

    def _encode(self, target: Target, names: tuple[str, ...], upper: Any) -> HostTensor:
        bits, group = target.storage.bits, target.storage.group
        matrices = self.on.xp.stack([self._matrix(name, target.shape) for name in names])
        if upper is None:
            hessians = [self._inner(name, target.shape) for name in names]
            upper = factor(self.on.xp.stack(hessians), self.on)
        encoded = encode_gptq(matrices, bits, group, upper, self.on)
        words, scales, biases = (part.reshape(-1, part.shape[-1]) for part in encoded)
        return HostTensor("affine", words, scales, biases, bits, group)

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Any:
        return self.on.decode(self.source.read(name, shape))

    def _shared(self, target: Target) -> Any:
        """(1, K, K): U of what all experts of the layer are given."""
        diagonals = [self.importance[name] for name in target.sources if name in self.importance]
        mean = np.mean(diagonals, 0) if diagonals else None
        return factor(self._hessian(self.x, mean)[None], self.on)

    def _inner(self, name: str, shape: tuple[int, ...]) -> Any:
        """(K, K): H of what an expert's w2 multiplies."""
        wide = shape[::-1]
        expert = int(name.split(".")[4])
        token, pick = np.nonzero(self.ids == expert)
        w1, w3 = (self._matrix(name.replace(".w2.", f".{w}."), wide) for w in ("w1", "w3"))
        x, limit = self.x[self.on.put(token)], self.cfg.swiglu_limit
        gate = self.on.xp.clip(x @ w1.T, None, limit)
        up = self.on.xp.clip(x @ w3.T, -limit, limit)
        share = self.on.put(self.weights[token, pick])
        silu = gate * (1 + self.on.xp.tanh(gate / 2)) / 2
        return self._hessian(silu * up * share[:, None], self.importance.get(name))

    def _hessian(self, x: Any, diagonal: Array | None) -> Any:
        """(T, K) -> (K, K) float64, blended with a diagonal (K,), else with its own."""
        on, (count, inputs) = self.on, x.shape
        total = on.double(x.T @ x)
        if diagonal is None:
            mean = on.xp.diagonal(total) / max(count, 1)
        else:
            mean = on.double(on.put(diagonal))
        return (total + 2 * inputs * mean * on.identity(inputs)) / (count + 2 * inputs)


def _split(tensor: HostTensor, piece: int) -> Iterator[HostTensor]:
    """A tensor in runs of rows that end where FP8 blocks do."""
    rows = tensor.shape[0]
    step = max(piece // max(tensor.data[0].size, 1) // FP8_BLOCK, 1) * FP8_BLOCK
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if tensor.format == "fp8":
            assert tensor.scales is not None
            scales = tensor.scales[start // FP8_BLOCK : -(-stop // FP8_BLOCK)]
            yield HostTensor("fp8", tensor.data[start:stop], scales)
        else:
            yield tensor.map(itemgetter(slice(start, stop)))


def _in_order(jobs: Iterable[Job], workers: int) -> Iterator[HostTensor]:
    """Results in the order of the jobs, a few of which run at once and ahead."""
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[HostTensor]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
