"""A board's counter beside its integrated power, in windows of a minute of a results file.

    python -m bench.energy_windows out/flash.json [--seconds 60] [--out bench/results/power.jsonl]

Windows begin every five seconds, from the first reading to the last. A row tells how far apart the
two are at the most and on average, and for how much of the busiest window a measured load was full.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds4.bench.results import read
from ds4.power import Energy, Trace, energy

STEP_S = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description="counter and integral over windows")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    args = parser.parse_args()
    for row in rows(read(args.file), args.seconds):
        print(json.dumps(row))
        if args.out:
            with args.out.open("a") as out:
                out.write(json.dumps(row) + "\n")


def rows(results: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """One for each source that tells both."""
    loads = [(start, end) for start, end in (run["window"] for run in results["runs"])]
    environment = results["environment"]
    for source in results["power"]["sources"]:
        trace = _trace(source, results["samples"][source["name"]])
        begin, end = trace.samples[0][0], trace.samples[-1][0]
        starts = [begin + i * STEP_S for i in range(int((end - begin - seconds) / STEP_S) + 1)]
        found = [energy(trace, start, start + seconds) for start in starts]
        apart = [_apart(one) for one in found]
        if not apart or any(map(math.isnan, apart)):
            continue
        yield {
            "bench": "power",
            "device": ", ".join(environment["machine"].get("gpus", [])),
            "scope": source["scope"],
            "kind": "counter and integral",
            "windows": len(found),
            "seconds": seconds,
            "apart_at_most": round(max(apart), 5),
            "apart_mean": round(statistics.fmean(apart), 5),
            "busiest": round(max(_busy(loads, start, seconds) for start in starts), 3),
            "valid": all(one.valid for one in found),
            "commit": environment.get("commit"),
            "date": environment["time"][:10],
        }


def _trace(source: dict[str, Any], samples: dict[str, Any]) -> Trace:
    columns = (
        [math.nan if value is None else value for value in samples[name]]
        for name in ("seconds", "watts", "joules")
    )
    faults = [(when, what) for when, what in samples["faults"]]
    about = {name: source[name] for name in ("name", "scope", "part", "refresh_s")}
    return Trace(**about, samples=list(zip(*columns, strict=True)), faults=faults)


def _apart(one: Energy) -> float:
    if one.counter_j is None or one.integral_j is None:
        return math.nan
    return abs(one.counter_j - one.integral_j) / max(one.counter_j, one.integral_j)


def _busy(loads: list[tuple[float, float]], start: float, seconds: float) -> float:
    """Share of a window in which a load was full."""
    inside = (min(b, start + seconds) - max(a, start) for a, b in loads)
    return sum(max(0.0, x) for x in inside) / seconds


if __name__ == "__main__":
    main()
