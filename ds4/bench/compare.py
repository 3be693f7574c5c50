"""Results of several machines beside each other, as far as they are alike.

A table holds one model, one recipe and one workload, at several loads; one of energy also one
scope. Machines are compared at the same load only. What has no like is shown alone, and a note says
what it was not compared with.
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
        """Model, recipe and workload, whatever the load."""
        free = {"name", "key", "concurrency", "rate", "requests", "seconds", "most_seconds"}
        rest = {k: v for k, v in self.workload.items() if k not in free | {"prefill"}}
        return *self.like[:2], str(sorted(rest.items()))

    @property
    def load(self) -> str:
        """How much at once, in words."""
        if self.workload["kind"] == "poisson":
            return f"{self.workload['rate']:g} a second"
        return f"{self.workload['concurrency']} at once"

    @property
    def title(self) -> str:
        """Of the family."""
        name = str(self.workload["name"]).partition("@")[0]
        tokens = f"{self.workload['prompt_tokens']:,} tokens in"
        tokens += f", {self.workload['output_tokens']:,} out"
        return f"{name} ({tokens}), {self.like[0]}, {self.like[1]}"

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
    Terms(**given)  # wrong ones are told though there be no row
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


def families(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of one family, from light to heavy load."""
    for family in dict.fromkeys(row.family for row in rows):
        members = [row for row in rows if row.family == family]
        order = "rate" if members[0].workload["kind"] == "poisson" else "concurrency"
        yield sorted(members, key=lambda row: row.workload[order])


def tables(rows: Sequence[Row]) -> list[Table]:
    """For each family speeds, for each scope energy, and cost."""
    found = []
    for family in families(rows):
        found.append(_speed(family))
        for scope in dict.fromkeys(scope for row in family for scope in row.scopes):
            found.append(_energy(family, scope))
        if any(row.terms.price is not None or row.scopes for row in family):
            found.append(_cost(family))
    return found


def _speed(family: list[Row]) -> Table:
    table = Table(f"{family[0].title}: speed", ["machine", "load", *SPEED])
    for row in family:
        table.rows.append([row.label, row.load, *speed_cells(row.summary)])
        said = [*row.summary["remarks"], *row.summary["problems"]]
        table.notes += [f"{row.label}, {row.load}: {one}" for one in said]
    for label, url in dict.fromkeys((row.label, row.target.get("url")) for row in family):
        if url:
            table.notes.append(f"{label}: through a server, {url}")
    return table


def _energy(family: list[Row], scope: tuple[str, str]) -> Table:
    title = f"{family[0].title}: energy, {scope[0]} ({scope[1]})"
    table = Table(title, ["machine", "load", *ENERGY])
    elsewhere: dict[str, str] = {}
    for row in family:
        entry = row.energy(scope)
        if entry is None:
            elsewhere[row.label] = _other(row)
            continue
        table.rows.append([row.label, row.load, *energy_cells(entry)])
        table.notes += [f"{row.label}, {row.load}: {said}" for said in entry["problems"][:2]]
    table.notes += _ratios(family, scope)
    table.notes += [f"{label} is not compared: {why}" for label, why in elsewhere.items()]
    return table


def _ratios(family: list[Row], scope: tuple[str, str]) -> Iterator[str]:
    """How the best and the worst machine compare, at each load that several were measured at."""
    for key in dict.fromkeys(row.like for row in family):
        found = []
        for row in (row for row in family if row.like == key):
            entry = row.energy(scope) or {}
            if entry.get("power_valid") and entry.get("tokens_per_j"):
                found.append((float(entry["tokens_per_j"]), row.label, row.load))
        if len(found) > 1:
            (low, last, _), (high, first, load) = min(found), max(found)
            yield f"{load}: {first} makes {high / low:.2f} times as many tokens a joule as {last}"


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


COST = ["power at", "price", "machine $", "electricity $", "sum", "tokens per $"]


def _cost(family: list[Row]) -> Table:
    terms = family[0].terms
    table = Table(
        f"{family[0].title}: cost of a million output tokens over {terms.years:g} years",
        ["machine", "load", *COST],
    )
    for row in family:
        scope = best_scope(row)
        made = cost_entry(row, scope)
        table.rows.append(
            [
                row.label,
                row.load,
                f"{scope[0]} ({scope[1]})" if scope else "not known",
                dollars(row.terms.price),
                dollars(made["capex_usd_per_mtok"]),
                dollars(made["electricity_usd_per_mtok"]),
                dollars(made["usd_per_mtok"]),
                number(made["tokens_per_usd"]),
            ]
        )
    table.notes = list(_terms_notes(family))
    return table


def _terms_notes(family: list[Row]) -> Iterator[str]:
    for terms in dict.fromkeys(replace(row.terms, price=None) for row in family):
        yield (
            f"at work {terms.duty:.0%} of the time, ${terms.tariff:.2f} a kWh, "
            f"worth nothing after {terms.years:g} years"
        )
    if len({replace(row.terms, price=None) for row in family}) > 1:
        yield "the terms differ: give --duty, --tariff and --years for all"
    scopes = {best_scope(row) for row in family}
    if any(scope and scope[0] in ("chip", "dc-system") for scope in scopes):
        yield _LESS
    if len(scopes) > 1:
        yield "the electricity was measured at unlike places: do not compare the sums"


_LESS = "electricity measured at chip or dc-system is less than what is paid for at the wall"


def not_alike(rows: Sequence[Row]) -> list[str]:
    """What one machine has and another has not, so that nothing is missed in silence."""
    notes = []
    labels = list(dict.fromkeys(row.label for row in rows))
    for family in families(rows):
        loads: dict[tuple[str, ...], list[str]] = {}
        for like in dict.fromkeys(row.like for row in family):
            members = [row for row in family if row.like == like]
            without = tuple(x for x in labels if x not in {row.label for row in members})
            loads.setdefault(without, []).append(members[0].load)
        notes += [
            f"{family[0].title}, {', '.join(which)}: no like result of {', '.join(without)}"
            for without, which in loads.items()
            if without
        ]
    return notes


def nothing_in(results: Sequence[dict[str, Any]]) -> list[str]:
    """Files of which no table can tell."""
    return [f"{one['label']}: no workload was measured" for one in results if not one["summary"]]


def document(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> str:
    """All tables as Markdown."""
    from .tables import markdown

    parts = [markdown(table) for table in tables(rows)]
    apart = [*nothing_in(results), *not_alike(rows)]
    if apart:
        parts.append(markdown(Table("Not compared", [], notes=apart)))
    return "# Comparison\n\n" + "\n".join(parts) + f"\n`{ABSENT}` was not measured.\n"
