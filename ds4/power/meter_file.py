"""The log of an external meter, read when the run is over."""

import csv
import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from ..errors import PowerError
from .source import Reading, Scope
from .window import Trace

# names of columns, and what to multiply their numbers by
_TIMES = "time", "timestamp", "datetime", "date", "unix", "epoch"
_WATTS = {"watts": 1.0, "power": 1.0, "power_w": 1.0, "w": 1.0, "mw": 1e-3, "power_mw": 1e-3}
_JOULES = {"joules": 1.0, "energy_j": 1.0, "j": 1.0, "wh": 3600.0, "energy_wh": 3600.0}
_JOULES |= {"kwh": 3.6e6, "energy_kwh": 3.6e6}


def read_meter(path: Path, epoch_minus_clock: float, scope: Scope = "wall") -> Trace:
    """A trace from a CSV file with a time and a power or energy column.

    Times are seconds since 1970 or ISO 8601 (without a zone: local), by a clock that agrees with
    this machine's; `epoch_minus_clock` is `time.time()` less the sampler's clock.
    Raises PowerError naming the line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = list(_rows(csv.reader(file), path))
    except OSError as error:
        raise PowerError(f"{path}: cannot be read: {error.strerror}") from error
    gaps = [b[0] - a[0] for a, b in pairwise(rows)]
    refresh = statistics.median(gaps) if gaps else 1.0
    trace = Trace(f"csv:{path.name}", scope, "system", refresh)
    for when, reading in rows:
        trace.add(when - epoch_minus_clock, reading)
    return trace


def _rows(lines: Iterator[list[str]], path: Path) -> Iterator[tuple[float, Reading]]:
    names = [name.strip().lower() for name in next(lines, [])]
    when = next((names.index(name) for name in _TIMES if name in names), None)
    watts, joules = _column(names, _WATTS), _column(names, _JOULES)
    if when is None or (watts is None and joules is None):
        raise PowerError(
            f"{path}: line 1 must name a time column ({', '.join(_TIMES)}) and one of "
            f"{', '.join([*_WATTS, *_JOULES])}"
        )
    for number, line in enumerate(lines, 2):
        if not any(line):
            continue
        try:
            reading = Reading(_value(line, watts), _value(line, joules))
            yield _seconds(line[when]), reading
        except (ValueError, IndexError) as error:
            raise PowerError(f"{path}: line {number}: {error}") from error


def _column(names: Sequence[str], known: dict[str, float]) -> tuple[int, float] | None:
    return next(((names.index(name), by) for name, by in known.items() if name in names), None)


def _value(line: Sequence[str], column: tuple[int, float] | None) -> float | None:
    return None if column is None else float(line[column[0]]) * column[1]


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text.strip()).timestamp()
