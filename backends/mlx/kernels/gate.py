"""Which Metal kernels a Mac uses: those that agree with their twins and are faster, measured there.

At start each kernel runs beside its twin on random inputs of the real model's shapes. One that
fails, differs or is slower stays off, and one line says so.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .trials import Trial, trials

log = logging.getLogger("ds4")

REPEATS = 32  # uses in one timing, so that waiting for the GPU counts little
ROUNDS = 3


@dataclass(frozen=True)
class Verdict:
    """What a trial showed; microseconds a use, None where it did not come so far."""

    name: str
    used: bool
    why: str
    differing: float | None = None  # share of values beyond the tolerance
    kernel_us: float | None = None
    twin_us: float | None = None


def judge(trial: Trial, clock: Callable[[], float] = time.perf_counter) -> Verdict:
    """Run a kernel and its twin; whether to use it, and why not."""
    try:
        got = _numbers(trial.kernel(*trial.arguments))
    except Exception as error:  # whatever a compiler or a driver raises, the twin works
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Verdict(trial.name, False, f"it does not run: {reason[0]}")
    want = _numbers(trial.twin(*trial.arguments))
    differing = max(_differing(a, b, trial.tolerance) for a, b in zip(want, got, strict=True))
    if not differing <= trial.share:
        return Verdict(trial.name, False, f"{differing:.2%} of its values differ", differing)
    fast, plain = _microseconds(trial.kernel, trial, clock), _microseconds(trial.twin, trial, clock)
    used = fast < plain
    why = "right and faster" if used else f"it is slower: {fast:.1f} us, without it {plain:.1f}"
    return Verdict(trial.name, used, why, differing, fast, plain)


def _numbers(result: Any) -> list[np.ndarray]:
    results = result if isinstance(result, (list, tuple)) else [result]
    widened = (x.astype(mx.float32) if x.dtype == mx.bfloat16 else x for x in results)
    return [np.array(x) for x in widened]


def _differing(want: np.ndarray, got: np.ndarray, tolerance: float) -> float:
    if want.shape != got.shape:
        return 1.0
    allowed = tolerance * max(float(np.abs(want).max(initial=0)), 1e-30)
    return float((~(np.abs(want - got) <= allowed)).mean())  # a NaN differs


def _microseconds(run: Callable[..., Any], trial: Trial, clock: Callable[[], float]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        start = clock()
        mx.eval([run(*trial.arguments) for _ in range(REPEATS)])
        best = min(best, clock() - start)
    return best / REPEATS * 1e6


def tried(all_of: Iterable[Trial]) -> tuple[Verdict, ...]:
    """The verdict on each; a line for each kernel that stays off."""
    found = tuple(judge(trial) for trial in all_of)
    for verdict in found:
        if not verdict.used:
            log.warning("Metal kernel %s is off: %s", verdict.name, verdict.why)
    return found


@functools.cache
def verdicts() -> tuple[Verdict, ...]:
    """Of every kernel on this Mac, once a process."""
    return tried(trials())
