"""Results of several machines beside each other, as far as they are alike.

A table holds one model, one recipe and one workload; one of energy or cost also one scope. What
has no like is shown alone, and a note says what it was not compared with.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BenchError
from .cost import Terms, cost
from .tables import (
    ABSENT,
    ENERGY,
    SPEED,
    Table,
    dollars,
    energy_cells,
    number,
    speed_cells,
)


@dataclass(frozen=True)
class Row:
    """A line of one results file's summary, and what it belongs to."""

    label: str
    target: dict[str, Any]
    workload: dict[str, Any]
    summary: dict[str, Any]
    terms: Terms

    @property
    def like(self) -> tuple[str, str, str]:
        """Model, recipe, workload: what must be equal."""
        return str(self.target["model"]), self.summary["recipe"], self.summary["key"]

    @property
    def family(self) -> tuple[Any, ...]:
        """The same but for how many at once."""
        free = {"name", "key", "concurrency", "requests", "seconds", "most_seconds", "prefill"}
        rest = sorted((k, str(v)) for k, v in self.workload.items() if k not in free)
        return self.like[0], tuple(rest)

    @property
    def scopes(self) -> list[tuple[str, str]]:
        return [(scope, entry["covers"]) for scope, entry in self.summary["energy"].items()]

    def energy(self, scope: tuple[str, str]) -> dict[str, Any] | None:
        entry: dict[str, Any] | None = self.summary["energy"].get(scope[0])
        return entry if entry and entry["covers"] == scope[1] else None


def rows_of(
    results: Sequence[dict[str, Any]],
    prices: dict[str, float] | None = None,
    **terms: float | None,
) -> list[Row]:
    """All rows. `prices` by label and `terms` (duty, tariff, years) replace those in the files.

    Raises BenchError if two files of one label have the same row, or a price is for no label.
    """
    labels = [str(one["label"]) for one in results]
    unknown = [label for label in prices or {} if label not in labels]
    if unknown:
        raise BenchError(f"--price: no file has the label {unknown[0]!r}: {', '.join(labels)}")
    given = {name: value for name, value in terms.items() if value is not None}
    rows = []
    for one in results:
        chosen = replace(Terms(**one["terms"]), **given)
        price = (prices or {}).get(one["label"], chosen.price)
        targets = {target["recipe"]: target for target in one["targets"]}
        workloads = {workload["name"]: workload for workload in one["workloads"]}
        rows += [
            Row(
                str(one["label"]),
                targets[line["recipe"]],
                workloads[line["workload"]],
                line,
                replace(chosen, price=price),
            )
            for line in one["summary"]
        ]
    same = Counter((row.label, row.like) for row in rows)
    twice = next((label for (label, _), count in same.items() if count > 1), None)
    if twice is not None:
        raise BenchError(
            f"two files of {twice!r} have the same workload and recipe: give one of them another "
            "label (ds4 bench --label, or the field label of the file)"
        )
    return rows


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that are alike, in the order of the first."""
    for like in dict.fromkeys(row.like for row in rows):
        yield [row for row in rows if row.like == like]


def tables(rows: Sequence[Row]) -> list[Table]:
    """For each group speeds, then for each scope energy and cost."""
    found = []
    for group in groups(rows):
        model, recipe, _ = group[0].like
        about = f"{group[0].summary['workload']}, {model}, {recipe}"
        found.append(_speed(about, group))
        for scope in dict.fromkeys(scope for row in group for scope in row.scopes):
            found.append(_energy(about, group, scope))
        found.append(_cost(about, group))
    return found


def _speed(about: str, group: list[Row]) -> Table:
    table = Table(f"{about}: speed", ["machine", *SPEED])
    for row in group:
        table.rows.append([row.label, *speed_cells(row.summary)])
        table.notes += [f"{row.label}: {said}" for said in row.summary["problems"]]
        if row.target.get("reached") == "server":
            table.notes.append(f"{row.label}: through a server, {row.target.get('url', '')}")
    return table


def _energy(about: str, group: list[Row], scope: tuple[str, str]) -> Table:
    table = Table(f"{about}: energy, {scope[0]} ({scope[1]})", ["machine", *ENERGY])
    best: list[tuple[float, str]] = []
    for row in group:
        entry = row.energy(scope)
        if entry is None:
            table.notes.append(f"{row.label} is not compared: {_other(row)}")
            continue
        table.rows.append([row.label, *energy_cells(entry)])
        table.notes += [f"{row.label}: {said}" for said in entry["problems"][:2]]
        if entry["power_valid"] and entry.get("tokens_per_j"):
            best.append((entry["tokens_per_j"], row.label))
    if len(best) > 1:
        (low, last), (high, first) = min(best), max(best)
        table.notes.append(f"{first} makes {high / low:.2f} times as many tokens a joule as {last}")
    return table


def _other(row: Row) -> str:
    if not row.scopes:
        return "it has no meter"
    return "it was measured at " + ", ".join(f"{scope} ({covers})" for scope, covers in row.scopes)


def best_scope(row: Row) -> tuple[str, str] | None:
    """Nearest to what is paid for, of those that are valid."""
    order = "wall", "estimated wall", "dc-system", "chip"
    valid = [scope for scope in row.scopes if row.summary["energy"][scope[0]]["power_valid"]]
    return min(valid, key=lambda scope: order.index(scope[0]), default=None)


def cost_entry(row: Row, scope: tuple[str, str] | None) -> dict[str, Any]:
    """Dollars a million output tokens, under the terms of the row."""
    entry = row.energy(scope) if scope else None
    valid = entry if entry and entry["power_valid"] else {}
    rate = row.summary["figures"]["output_tok_s"]
    return cost(rate, valid.get("watts"), valid.get("idle_watts"), row.terms).entry()


def _cost(about: str, group: list[Row]) -> Table:
    terms = group[0].terms
    table = Table(
        f"{about}: cost of a million output tokens over {terms.years:g} years",
        ["machine", "power at", "price", "machine $", "electricity $", "sum", "tokens per $"],
    )
    for row in group:
        scope = best_scope(row)
        made = cost_entry(row, scope)
        table.rows.append(
            [
                row.label,
                f"{scope[0]} ({scope[1]})" if scope else "not known",
                dollars(row.terms.price),
                dollars(made["capex_usd_per_mtok"]),
                dollars(made["electricity_usd_per_mtok"]),
                dollars(made["usd_per_mtok"]),
                number(made["tokens_per_usd"]),
            ]
        )
        table.notes.append(
            f"{row.label}: at work {row.terms.duty:.0%} of the time, "
            f"${row.terms.tariff:g} a kWh, worth nothing at the end"
            + ("" if (scope and scope[0] in ("wall", "estimated wall")) or not scope else _LESS)
        )
    if len({replace(row.terms, price=None) for row in group}) > 1:
        table.notes.append("the terms differ: give --duty, --tariff and --years for all")
    if len({best_scope(row) for row in group}) > 1:
        table.notes.append("the electricity was measured at unlike places: do not compare the sums")
    return table


_LESS = "; its electricity is what the meter saw, less than what is paid for"


def not_alike(rows: Sequence[Row]) -> list[str]:
    """What one machine has and another has not, so that nothing is missed in silence."""
    notes = []
    labels = list(dict.fromkeys(row.label for row in rows))
    for group in groups(rows):
        without = [label for label in labels if label not in {row.label for row in group}]
        if without:
            model, recipe, _ = group[0].like
            notes.append(
                f"{group[0].summary['workload']}, {model}, {recipe}: no like result of "
                + ", ".join(without)
            )
    return notes


def document(rows: Sequence[Row]) -> str:
    """All tables as Markdown."""
    from .tables import markdown

    parts = [markdown(table) for table in tables(rows)]
    apart = not_alike(rows)
    if apart:
        parts.append(markdown(Table("Not compared", [], notes=apart)))
    return "# Comparison\n\n" + "\n".join(parts) + "\n" + f"`{ABSENT}` was not measured.\n"
