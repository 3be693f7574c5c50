"""Tables of the speed bench."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .operations import Cost

screen = Console(width=150)
_COLUMNS = (
    ("recipe", "recipe"), ("kind", ""), ("batch", "batch"), ("tokens", "tokens"),
    ("tok_s", "tok/s"), ("target", "target"), ("ms", "ms"), ("floor_ms", "floor ms"),
    ("share", "share"), ("kernels", "kernels"), ("experts", "experts"),
    ("peer_tok_s", "best peer"), ("peer", ""),
)  # fmt: skip


def line(row: Mapping[str, Any], spent: float) -> str:
    """One measurement, as it comes, and the seconds that measuring took."""
    return (
        f"{row['recipe']} {row['kind']}, batch {row['batch']}, {row['tokens']:,} tokens: "
        f"{row['tok_s']:,} tok/s, {row['ms']} ms, floor {row['floor_ms']} ms "
        f"[measured in {spent:.1f} s]"
    )


def targets(rows: Sequence[Mapping[str, Any]]) -> None:
    """Every case beside its floor, its target and the best of the other engines."""
    first = rows[0]
    title = (
        f"{first['model']}, {first['layers']} layers ({first['unique_layers']} unique), "
        f"{first['routing']} routing; {first['device']}, driver {first['driver']}, "
        f"torch {first['torch']}, triton {first['triton']}, commit {first['commit']}, "
        f"{first['gb_s']:,} GB/s, {first['tflop_s']:,} TFLOP/s"
    )
    table = Table(*(heading for _, heading in _COLUMNS), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name, _ in _COLUMNS))
    screen.print(table)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int | float) else str(value)


def costs(title: str, found: Sequence[Cost], bandwidth: float) -> None:
    """The ten costliest operations of a step."""
    table = Table("operation", "calls", "kernels", "us", "MB", "floor us", "share", title=title)
    for cost in found[:10]:
        row = entry(cost, bandwidth)
        numbers = f"{row['us']:,.1f}", f"{row['mb']:,.2f}", f"{row['floor_us']:,.1f}"
        share = f"{row['floor_us'] / row['us']:.2f}" if row["us"] and row["mb"] else ""
        table.add_row(cost.name, str(cost.calls), str(cost.kernels), *numbers, share)
    rest = sum(cost.seconds for cost in found[10:])
    every = sum(cost.seconds for cost in found)
    table.add_row(f"{len(found[10:])} others", "", "", f"{rest * 1e6:,.1f}")
    table.add_row("all", "", str(sum(cost.kernels for cost in found)), f"{every * 1e6:,.1f}")
    screen.print(table)


def entry(cost: Cost, bandwidth: float) -> dict[str, Any]:
    """One operation as it stands in a row of results."""
    return {
        "operation": cost.name,
        "calls": cost.calls,
        "kernels": cost.kernels,
        "us": round(cost.seconds * 1e6, 1),
        "mb": round(cost.nbytes / 1e6, 3),
        "floor_us": round(cost.nbytes / bandwidth * 1e6, 2),
    }


def kernels(found: Mapping[str, tuple[int, float]], step: float) -> None:
    """The costliest kernels of a step of `step` seconds."""
    table = Table("kernel", "count", "us", title="the same step by kernel, as it really runs")
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    for name, (count, seconds) in ordered[:15]:
        table.add_row(name[:100], str(count), f"{seconds * 1e6:,.1f}")
    count, busy = sum(c for c, _ in found.values()), sum(s for _, s in found.values())
    table.add_row(f"all, of a step of {step * 1e6:,.0f} us", str(count), f"{busy * 1e6:,.1f}")
    screen.print(table)
