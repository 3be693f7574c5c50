"""A results file: one JSON object with every sample, what was worked out of them, and where."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import Any

from ..errors import BenchError
from ..json_fields import read_json, short
from ..power.calibration import Calibration
from ..power.source import Scope
from ..power.window import Energy, Total, Trace, energy, total
from ..weights.shard_file import write_whole
from .cost import Terms
from .environment import machine_name
from .measure import Window, energy_figures
from .run import Measurement, Run, record_entry
from .summary import summarise

FORMAT, VERSION = "ds4-bench", 1
SCOPES: tuple[Scope, ...] = ("chip", "dc-system", "wall")


def build(
    found: Measurement,
    traces: Sequence[Trace],
    absent: Sequence[str],
    env: dict[str, Any],
    terms: Terms,
    label: str | None = None,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """The object of a results file."""
    name = machine_name(env["machine"])
    meters = _Meters(traces, calibration, name)
    idle = {recipe: meters.entry(at) for recipe, at in found.idle.items()}
    runs = [_run(run, meters, idle.get(run.recipe, {}), found.begin) for run in found.runs]
    return {
        "format": FORMAT,
        "version": VERSION,
        "label": label or name,
        "environment": env,
        "protocol": asdict(found.protocol) | {"interrupted": found.interrupted},
        "terms": asdict(terms),
        "targets": found.targets,
        "workloads": [
            asdict(workload) | {"key": workload.key}
            for workload in {run.workload.name: run.workload for run in found.runs}.values()
        ],
        "skipped": found.skipped,
        "power": {
            "sources": [
                {"name": t.name, "scope": t.scope, "part": t.part, "refresh_s": t.refresh_s}
                for t in traces
            ],
            "absent": list(absent),
            "whole": [asdict(one) for one in meters.totals(Window(found.begin, found.end))[0]],
            "calibration": asdict(calibration) if calibration else None,
        },
        "idle": idle,
        "runs": runs,
        "summary": summarise(runs, idle, found.targets, terms),
        "samples": {trace.name: _samples(trace, found.begin) for trace in traces},
    }


class _Meters:
    """The traces of a measurement, asked for windows."""

    def __init__(
        self, traces: Sequence[Trace], calibration: Calibration | None, machine: str
    ) -> None:
        self._traces, self._calibration, self._machine = traces, calibration, machine

    def totals(self, at: Window) -> tuple[list[Energy], list[Total]]:
        """Of every source, and of every scope; at the wall estimated if there is no meter."""
        single = [energy(trace, at.start, at.end) for trace in self._traces]
        sums = [one for scope in SCOPES if (one := total(single, scope)) is not None]
        line = self._calibration
        if line is not None and all(one.scope != "wall" for one in sums):
            sums += [line.wall(one) for one in sums if line.fits(one, self._machine)]
        return single, sums

    def entry(self, at: Window) -> dict[str, Any]:
        """Watts of a window by scope."""
        return {
            one.scope: {
                "covers": one.covers,
                "watts": one.joules / one.seconds if one.joules is not None else None,
                "power_valid": one.valid,
                "problems": list(one.problems),
            }
            for one in self.totals(at)[1]
        }


def _run(run: Run, meters: _Meters, idle: dict[str, Any], begin: float) -> dict[str, Any]:
    single, sums = meters.totals(run.window)
    scopes = {}
    for one in sums:
        entry: dict[str, Any] = {
            "covers": one.covers,
            "power_valid": one.valid,
            "problems": list(one.problems),
        }
        still = idle.get(one.scope, {})
        idle_w = still.get("watts") if still.get("power_valid") else None
        if one.joules is not None:
            entry |= energy_figures(one.joules, one.seconds, run.figures, idle_w)
        scopes[one.scope] = entry
    return {
        "recipe": run.recipe,
        "workload": run.workload.name,
        "key": run.workload.key,
        "phase": run.phase,
        "repetition": run.repetition,
        "window": [round(run.window.start - begin, 6), round(run.window.end - begin, 6)],
        "figures": run.figures,
        "energy": scopes,
        "sources": [asdict(one) for one in single],
        "records": record_entry(run, begin),
    }


def _samples(trace: Trace, begin: float) -> dict[str, Any]:
    def column(index: int, digits: int, shift: float = 0.0) -> list[float | None]:
        values = (sample[index] - shift for sample in trace.samples)
        return [None if math.isnan(value) else round(value, digits) for value in values]

    return {
        "seconds": column(0, 4, begin),
        "watts": column(1, 3),
        "joules": column(2, 3),
        "faults": [[round(when - begin, 4), what] for when, what in trace.faults],
    }


# files

_REMEDY = "give a file that ds4 bench wrote"
_MAYBE = int | float | None
_SHAPE: dict[str, dict[str, type | UnionType] | None] = {
    "terms": None,
    "samples": None,
    "targets": {"recipe": str, "model": object},
    "workloads": {
        **{"name": str, "key": str, "kind": str, "prompt_tokens": int, "output_tokens": int},
        **{"concurrency": int, "rate": int | float},
    },
    "runs": {"recipe": str, "workload": str, "figures": dict, "energy": dict},
    "summary": {
        **{"recipe": str, "workload": str, "key": str, "figures": dict, "energy": dict},
        **{"problems": list, "remarks": list, "prefill_tok_s": _MAYBE},
    },
}
_FIGURES: dict[str, type | UnionType] = {
    **{"output_tok_s": int | float, "user_tok_s": _MAYBE, "cache_hit": _MAYBE},
    **{"ttft_s": dict | None, "tpot_s": dict | None, "itl_s": dict | None},
}


def save(path: Path, results: dict[str, Any]) -> None:
    """Raises BenchError if the file cannot be written."""
    try:
        write_whole(path, (json.dumps(results, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror}") from error


def read(path: Path) -> dict[str, Any]:
    """Raises BenchError if the file is none of ours."""
    results = read_json(path, BenchError, _REMEDY)
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise BenchError(f"{path}: is not a results file of ds4 bench; {_REMEDY}")
    if results.get("version") != VERSION:
        raise BenchError(f"{path}: version {results.get('version')}, this ds4 reads {VERSION}")
    missing = ({"label"} | _SHAPE.keys()) - results.keys()
    if missing:
        raise BenchError(f"{path}: field {min(missing)} is missing; {_REMEDY}")
    for name, needed in _SHAPE.items():
        _check(f"{path}: {name}", results[name], needed)
    _check(f"{path}: figures", [line["figures"] for line in results["summary"]], _FIGURES)
    try:
        Terms(**results["terms"])
    except (TypeError, BenchError) as error:
        raise BenchError(f"{path}: terms: {error}; {_REMEDY}") from error
    for name, of, key in (("recipe", "targets", "recipe"), ("workload", "workloads", "name")):
        known = [one[key] for one in results[of]]
        strange = [one[name] for one in results["summary"] if one[name] not in known]
        if strange:
            raise BenchError(f"{path}: summary: {of} has no {short(strange[0])}; {_REMEDY}")
    return results


def _check(where: str, found: Any, needed: dict[str, type | UnionType] | None) -> None:
    """A section is an object, or with `needed` a list of objects that have these fields."""
    if needed is None:
        if not isinstance(found, dict):
            raise BenchError(f"{where} is {short(found)}, no object; {_REMEDY}")
        return
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise BenchError(f"{where} is {short(found)}, no list of objects; {_REMEDY}")
    for i, one in enumerate(found):
        for name, kind in needed.items():
            if name not in one or not isinstance(one[name], kind):
                said = short(one[name]) if name in one else "missing"
                raise BenchError(f"{where}[{i}]: {name} is {said}; {_REMEDY}")
