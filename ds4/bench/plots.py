"""Which plots a comparison has, and what is in them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .compare import Row, best_scope, cost_entry, families
from .svg import Axis, Bars, Chart, Series
from .tables import dollars, number, share

_POINTS = 500  # of a line of power: the raw samples are in the results file


@dataclass
class Plot:
    """A drawing, its heading, its legend as (style, name), and a caption."""

    heading: str
    drawing: str
    legend: list[tuple[int, str]]
    caption: str = ""


def styles(rows: Sequence[Row]) -> dict[tuple[str, str], int]:
    """A style for each machine and recipe, the same in every plot."""
    pairs = dict.fromkeys((row.label, row.summary["recipe"]) for row in rows)
    return {pair: i for i, pair in enumerate(pairs)}


def plots(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> list[Plot]:
    """All that there are values for."""
    style = styles(rows)
    found = []
    for kind in dict.fromkeys(_kind(row) for row in rows):
        members = [row for row in rows if _kind(row) == kind]
        if members[0].workload["kind"] == "closed":
            found += [_latency(members, style), *_efficiency(members, style)]
    return [plot for plot in [*found, *_costs(rows), *map(power, results)] if plot is not None]


def _kind(row: Row) -> tuple[Any, ...]:
    """The family without the recipe: recipes are lines of one plot."""
    return row.family[0], row.family[2]


def _lines(members: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(members, key=lambda row: row.workload["concurrency"]):
        lines.setdefault((row.label, row.summary["recipe"]), []).append(row)
    return lines


def _heading(members: Sequence[Row]) -> str:
    load = members[0].workload
    name = load["name"].partition("@")[0]
    tokens = f"{load['prompt_tokens']:,} tokens in, {load['output_tokens']:,} out"
    return f"{name} ({tokens}), {members[0].target['model']}"


def _latency(members: Sequence[Row], style: dict[tuple[str, str], int]) -> Plot | None:
    series = []
    for key, line in _lines(members).items():
        points, labels = [], []
        for row in line:
            figures = row.summary["figures"]
            tpot = share(figures["tpot_s"], "p50")
            if tpot is not None:
                points.append((tpot * 1e3, figures["output_tok_s"]))
                labels.append(str(row.workload["concurrency"]))
        if points:
            series.append(Series(" ".join(key), points, style[key], labels))
    if not series:
        return None
    every = [point for one in series for point in one.points]
    chart = Chart(
        f"Throughput against latency, {_heading(members)}",
        Axis.over("time per output token, median (ms)", [x for x, _ in every]),
        Axis.over("output of all sequences (tok/s)", [y for _, y in every]),
        series,
    )
    legend = [(one.style, one.name) for one in series]
    return Plot(
        chart.title, chart.svg(), legend, "Numbers are sequences at once. Up and left is better."
    )


def _efficiency(members: Sequence[Row], style: dict[tuple[str, str], int]) -> list[Plot]:
    """Tokens a joule, a plot for each scope; what is not valid is not drawn."""
    found = []
    for scope in dict.fromkeys(scope for row in members for scope in row.scopes):
        series, left_out = [], 0
        for key, line in _lines(members).items():
            points = []
            for row in line:
                entry = row.energy(scope) or {}
                if entry.get("power_valid") and entry.get("tokens_per_j"):
                    points.append((float(row.workload["concurrency"]), entry["tokens_per_j"]))
                elif entry:
                    left_out += 1
            if points:
                series.append(Series(" ".join(key), points, style[key]))
        if not series:
            continue
        every = [point for one in series for point in one.points]
        chart = Chart(
            f"Tokens a joule, {scope[0]} ({scope[1]}), {_heading(members)}",
            Axis.over("sequences at once", [x for x, _ in every], "log2"),
            Axis.over("output tokens a joule (= tok/s/W)", [y for _, y in every]),
            series,
        )
        caption = f"{left_out} windows that are not valid are not drawn." if left_out else ""
        legend = [(one.style, one.name) for one in series]
        found.append(Plot(chart.title, chart.svg(), legend, caption))
    return found


def _costs(rows: Sequence[Row]) -> list[Plot]:
    """Dollars of each family and recipe that has a price, a bar for each load of each machine."""
    found = []
    for members in families(rows):
        lines = [line for row in members if (line := _bar(row)) is not None]
        if not lines:
            continue
        most = max(sum(part or 0.0 for part in parts) for _, parts, _ in lines)
        bars = Bars(
            f"Cost of output, {_heading(members)}, {members[0].like[1]}",
            Axis.over("dollars a million output tokens", [most]),
            lines,
        )
        terms = members[0].terms
        caption = (
            f"Over {terms.years:g} years, at work {terms.duty:.0%} of the time, "
            f"${terms.tariff:.2f} a kWh."
        )
        found.append(Plot(bars.title, bars.svg(), [(-1, "machine"), (-2, "electricity")], caption))
    return found


def _bar(row: Row) -> tuple[str, tuple[float | None, float | None], str] | None:
    scope = best_scope(row)
    made = cost_entry(row, scope)
    parts = made["capex_usd_per_mtok"], made["electricity_usd_per_mtok"]
    if parts[0] is None:
        return None
    said = dollars(made["usd_per_mtok"]) if parts[1] is not None else "electricity unknown"
    where = f"power at {scope[0]} ({scope[1]})" if scope else "power unknown"
    return f"{row.label}, {row.load}, {where}", parts, said


def power(results: dict[str, Any]) -> Plot | None:
    """Watts of every source of one file; bands are the windows that count."""
    series = []
    for i, (name, samples) in enumerate(results["samples"].items()):
        points = _watts(samples)
        if points:
            series.append(Series(name, points, i, marks=False))
    if not series:
        return None
    every = [point for one in series for point in one.points]
    bands = [(*run["window"], _band(run)) for run in results["runs"]]
    chart = Chart(
        f"Power over time, {results['label']}",
        Axis.over("time since the start (s)", [x for x, _ in every]),
        Axis.over("power (W)", [y for _, y in every]),
        series,
        bands,
    )
    mean = {one.name: sum(y for _, y in one.points) / len(one.points) for one in series}
    legend = [(one.style, f"{one.name}, mean {number(mean[one.name])} W") for one in series]
    caption = "Shaded: windows that were measured; dashed outline: not valid."
    return Plot(chart.title, chart.svg(), legend, caption)


def _band(run: dict[str, Any]) -> str:
    valid = all(entry["power_valid"] for entry in run["energy"].values())
    return "window" if valid else "window invalid"


def _watts(samples: dict[str, Any]) -> list[tuple[float, float]]:
    """(seconds from 0 on, watts); means of neighbours where there are many, a counter's slope."""
    points = [
        (when, watts)
        for when, watts in zip(samples["seconds"], samples["watts"], strict=True)
        if watts is not None
    ]
    if not points:
        pairs = [
            (when, joules)
            for when, joules in zip(samples["seconds"], samples["joules"], strict=True)
            if joules is not None
        ]
        points = [((t0 + t1) / 2, (j1 - j0) / (t1 - t0)) for (t0, j0), (t1, j1) in pairwise(pairs)]
    points = [point for point in points if point[0] >= 0]
    size = max(1, math.ceil(len(points) / _POINTS))
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(t for t, _ in c) / len(c), sum(w for _, w in c) / len(c)) for c in chunks]
