"""Proxies around a backend: count and time its operations, or compare two backends as they run."""

import copy
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import Backend, StepFunction
from .errors import BackendError

UNCOUNTED = ("load", "alloc", "upload", "download")


class Meter:
    """A backend that counts its operations in `calls`, and with `wait` times them in `seconds`.

    Waiting for each result makes the times those of the operations, and the whole run slower.
    """

    def __init__(self, be: Backend, wait: bool = False) -> None:
        self.be, self.wait = be, wait
        self.calls: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def capture(self, fn: StepFunction) -> StepFunction:
        """Not recorded: every operation is to be seen."""
        return lambda step: fn(step.on(self))

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self.be, name)
        if name in UNCOUNTED or not callable(operation):
            return operation

        def metered(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = operation(*args, **kwargs)
            if self.wait:
                _wait(self.be, result)
            self.seconds[name] += time.perf_counter() - start
            self.calls[name] += 1
            return result

        return metered


class Mismatch(BackendError):
    """Two backends gave different results for one operation."""


@dataclass
class Both:
    """One value on two backends; does what model.py does with an array."""

    first: Any
    second: Any

    def __len__(self) -> int:
        return len(self.first)

    def __getattr__(self, name: str) -> "Both":
        return Both(getattr(self.first, name), getattr(self.second, name))

    def __getitem__(self, i: Any) -> "Both":
        return Both(self.first[i], self.second[i])

    def __call__(self, *args: Any) -> "Both":
        return Both(self.first(*args), self.second(*args))

    def __mul__(self, other: Any) -> "Both":
        return Both(self.first * other, self.second * other)

    def __add__(self, other: "Both") -> "Both":
        return Both(self.first + other.first, self.second + other.second)


class Pair:
    """Two backends as one: every operation runs on both and must agree.

    The second backend goes on with the first one's results, so that each operation is judged alone.
    `errors` keeps, for each operation, the largest difference relative to the largest value; beyond
    `tolerance` a Mismatch names the operation.
    """

    name, device = "pair", "both"

    def __init__(self, first: Backend, second: Backend, tolerance: float) -> None:
        self.first, self.second, self.tolerance = first, second, tolerance
        self.cache = first.cache
        self.errors: dict[str, float] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)  # the second backend's

    def load(self, name: str, tensor: Any) -> Both:
        return Both(self.first.load(name, tensor), self.second.load(name, tensor))

    def begin(self, cfg: Any) -> None:
        """Both hold the whole model."""

    def holds(self, layer: int, experts: int) -> None:
        """All of them."""

    def download(self, x: Both) -> Any:
        return self.first.download(x.first)

    def capture(self, fn: StepFunction) -> StepFunction:
        return lambda step: fn(step.on(self))

    def __getattr__(self, name: str) -> Any:
        if not callable(getattr(self.first, name)):  # nor is what it lacks an operation
            raise AttributeError(f"{name} is no operation")

        def both(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self.first, name)(*_side(args, "first"), **_side(kwargs, "first"))
            start = time.perf_counter()
            other = getattr(self.second, name)(*_side(args, "second"), **_side(kwargs, "second"))
            _wait(self.second, other)
            self.seconds[name] += time.perf_counter() - start
            return self._agree(name, result, other)

        return both

    def _agree(self, name: str, result: Any, other: Any) -> Any:
        if name in ("alloc", "upload") or result is None:
            return Both(result, other)
        if isinstance(result, (tuple, list)):
            pairs = zip(result, other, strict=True)
            return type(result)(self._agree(name, a, b) for a, b in pairs)
        if not hasattr(result, "shape"):
            return Both(result, other)
        want, got = self.first.download(result), self.second.download(other)
        error = difference(want, got)
        self.errors[name] = max(error, self.errors.get(name, 0.0))
        if not error <= self.tolerance:
            names = f"{self.second.name} differs from {self.first.name}"
            raise Mismatch(f"{name}: {names} by {error:.2e}")
        return Both(result, self.second.upload(want))


def difference(want: Any, got: Any) -> float:
    """The largest difference relative to the largest value; of integers, the share that differs."""
    if want.shape != got.shape:
        return float("inf")
    if not want.size:
        return 0.0
    if np.issubdtype(want.dtype, np.integer):
        return float((want != got).mean())
    with np.errstate(invalid="ignore"):
        distance = np.where(want == got, 0, np.abs(want - got)).max()
    return float(distance / max(np.abs(want[np.isfinite(want)]).max(initial=0), 1e-30))


def _side(value: Any, side: str) -> Any:
    """One backend's share of nested arguments."""
    if isinstance(value, Both):
        return getattr(value, side)
    if isinstance(value, dict):
        return {key: _side(item, side) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_side(item, side) for item in value)
    if hasattr(value, "__dict__") and any(_holds_both(item) for item in vars(value).values()):
        share = copy.copy(value)
        for key, item in vars(value).items():
            object.__setattr__(share, key, _side(item, side))
        return share
    return value


def _holds_both(value: Any) -> bool:
    if isinstance(value, Both):
        return True
    items = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return any(_holds_both(item) for item in items.values())


def _wait(be: Backend, result: Any) -> None:
    """Until an array, or the arrays of a tuple, are computed."""
    for item in result if isinstance(result, tuple) else (result,):
        if hasattr(item, "shape"):
            be.download(item)
