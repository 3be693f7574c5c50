"""From what a machine says of itself to what it takes from the wall, measured once with a plug."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PowerError
from ..json_fields import read_json
from ..weights.shard_file import write_whole
from .source import Scope
from .window import Total, Trace, energy

BIN_S = 10.0  # means of so long are compared: a plug's values are a second old
FORMAT = "ds4-power-calibration"
_LEAST_BINS = 6
_LEAST_SPREAD = 1.3  # between the strongest and the weakest load: a line needs two ends


@dataclass(frozen=True)
class Calibration:
    """wall = base + slope * watts of `scope`; fitted from `low` to `high` watts."""

    machine: str
    scope: Scope
    covers: str
    base_w: float
    slope: float
    low_w: float
    high_w: float
    error: float  # root mean square of what the line misses, of the mean wall power
    bins: int
    meter: str

    def wall(self, measured: Total) -> Total:
        """The estimated energy at the wall; its problems include a load outside the fit."""
        problems = list(measured.problems)
        joules = None
        if measured.joules is not None:
            watts = measured.joules / measured.seconds
            joules = self.base_w * measured.seconds + self.slope * measured.joules
            if not 0.9 * self.low_w <= watts <= 1.1 * self.high_w:
                problems.append(
                    f"calibration: {watts:.0f} W, it was made from {self.low_w:.0f} to "
                    f"{self.high_w:.0f} W"
                )
        return Total("estimated wall", "system", measured.seconds, joules, tuple(problems))

    def fits(self, measured: Total, machine: str) -> bool:
        """Whether it may be used: the same machine, the same scope and parts."""
        return (self.machine, self.scope, self.covers) == (machine, measured.scope, measured.covers)

    def save(self, path: Path) -> None:
        content = {"format": FORMAT, "version": 1} | asdict(self)
        write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def load(path: Path) -> Calibration:
    """Raises PowerError if the file is none."""
    remedy = "make one with ds4 bench --calibrate"
    said: dict[str, Any] = read_json(path, PowerError, remedy)
    try:
        if (said.pop("format"), said.pop("version")) != (FORMAT, 1):
            raise ValueError("its format is another one")
        return Calibration(**said)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PowerError(f"{path}: not a calibration of ds4: {error}; {remedy}") from error


def fit(traces: Sequence[Trace], machine: str) -> Calibration:
    """The line from dc-system, or else chip, to the wall, over all that both measured.

    Raises PowerError if there is too little to fit, or too little difference between loads.
    """
    scope: Scope = "dc-system" if any(t.scope == "dc-system" for t in traces) else "chip"
    inner = [trace for trace in traces if trace.scope == scope]
    wall = [trace for trace in traces if trace.scope == "wall"]
    if not inner or not wall:
        raise PowerError(f"a calibration needs a meter at the wall and one of scope {scope}")
    pairs = []
    for start, end in pairwise(_edges([*inner, *wall])):
        low, high = _watts(inner, start, end), _watts(wall, start, end)
        if low is not None and high is not None:
            pairs.append((low, high))
    x, y = np.array(pairs, np.float64).reshape(-1, 2).T
    if len(x) < _LEAST_BINS or x.max() < _LEAST_SPREAD * x.min():
        raise PowerError(
            f"a calibration needs {_LEAST_BINS} times {BIN_S:g} s, idle and under load; there are "
            f"{len(x)}" + (f" from {x.min():.0f} to {x.max():.0f} W" if len(x) else "")
        )
    slope, base = np.polyfit(x, y, 1)
    missed = y - (base + slope * x)
    return Calibration(
        machine,
        scope,
        "+".join(sorted({trace.part for trace in inner})),
        float(base),
        float(slope),
        float(x.min()),
        float(x.max()),
        float(np.sqrt((missed**2).mean()) / y.mean()),
        len(x),
        ", ".join(trace.name for trace in wall),
    )


def _edges(traces: Sequence[Trace]) -> list[float]:
    start = max((t.samples[0][0] if t.samples else math.inf) for t in traces)
    end = min((t.samples[-1][0] if t.samples else -math.inf) for t in traces)
    return [start + i * BIN_S for i in range(int(max(0.0, end - start) // BIN_S) + 1)]


def _watts(traces: Sequence[Trace], start: float, end: float) -> float | None:
    """The mean of the sum; None if one of them is not valid there."""
    found = [energy(trace, start, end) for trace in traces]
    if not all(one.valid for one in found):
        return None
    return sum(one.watts or 0.0 for one in found)
