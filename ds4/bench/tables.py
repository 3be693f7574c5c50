"""Tables as text: what a number looks like, and Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ABSENT = "-"
SPEED = ["tok/s", "tok/s/user", "prefill tok/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms"]
SPEED += ["ITL p99 ms", "cache hits"]
ENERGY = ["W", "idle W", "J/output tok", "net", "decode only", "J/prompt tok", "tokens/J = tok/s/W"]


@dataclass
class Table:
    """Cells are text; the first column is a name, others are numbers."""

    title: str
    headings: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def markdown(table: Table) -> str:
    """A heading, a table of pipes, and the notes as a list."""
    lines = [f"### {table.title}", ""]
    if table.rows:
        lines.append(_line(table.headings))
        lines.append(_line([":--", *["--:"] * (len(table.headings) - 1)]))
        lines += [_line(row) for row in table.rows]
    if table.notes:
        lines += ["", *(f"- {_plain(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def terminal(table: Table) -> str:
    """The same for a terminal, in columns."""
    rows = [list(table.headings), *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.headings))]
    lines = [table.title]
    for row in rows if table.rows else []:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  " + "  ".join(cells).rstrip())
    lines += [f"  {note}" for note in table.notes]
    return "\n".join(lines) + "\n"


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, and no exponent."""
    if value is None:
        return ABSENT
    rounded = float(f"{value:.{digits}g}")
    magnitude = int(f"{rounded:e}".partition("e")[2])
    places = digits - 1 - magnitude if rounded else 0
    return f"{value:,.{min(max(places, 0), 9)}f}"


def milliseconds(value: float | None) -> str:
    return ABSENT if value is None else number(value * 1e3)


def dollars(value: float | None) -> str:
    return (
        ABSENT if value is None else "$" + (f"{value:,.2f}" if value >= 0.095 else number(value, 2))
    )


def percent(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1%}"


def share(values: dict[str, float] | None, name: str) -> float | None:
    """A percentile of a figure that may be absent."""
    return None if values is None else values.get(name)


# what `ds4 bench` prints


def summary_tables(results: dict[str, Any]) -> list[Table]:
    """Speeds of every workload, and joules by scope; without a meter, a word about that."""
    speed = Table(
        f"{results['label']}: speed",
        ["workload", "recipe", *SPEED],
    )
    for row in results["summary"]:
        speed.rows.append([row["workload"], row["recipe"], *speed_cells(row)])
        name = f"{row['workload']} {row['recipe']}"
        speed.notes += [f"{name}: {said}" for said in [*row["remarks"], *row["problems"]]]
    speed.notes += [
        f"{one['workload']} {one['recipe']} was not measured: {one['reason']}"
        for one in results["skipped"]
    ]
    if results["protocol"]["interrupted"]:
        speed.notes.append("the measurement was ended before it was complete")
    for target in results["targets"]:
        speed.notes += [
            f"{name} {target['recipe']}: its warm-up was not steady after {found['rounds']} rounds"
            for name, found in target.get("warm_up", {}).items()
            if not found["steady"]
        ]
        speed.notes += [said] if (said := _use(target)) else []
    return [speed, *_energy_tables(results)]


def _use(target: dict[str, Any]) -> str:
    """Memory and accepted drafts of a target, as far as they are known."""
    usage = target.get("usage", {})
    parts = [f"{size / 1e9:.2f} GB of {kind}" for kind, size in usage.get("memory", {}).items()]
    said = f"{target['recipe']}: at most {' and '.join(parts)} memory" if parts else ""
    if usage.get("drafted_tokens"):
        share = usage["accepted_tokens"] / usage["drafted_tokens"]
        said += f"{'; ' if said else ''}{share:.0%} of drafted tokens were accepted"
        if usage.get("drafts"):
            places = " ".join(f"{count / usage['drafts']:.0%}" for count in usage["accepted_at"])
            said += f" (by place in a draft: {places}); guessing saved an estimated "
            said += f"{usage['guessing_saved_s']:.1f} s of decoding"
    return said


def speed_cells(row: dict[str, Any]) -> list[str]:
    """Of a row of a summary: what SPEED heads."""
    figures = row["figures"]
    return [
        number(figures["output_tok_s"]),
        number(figures["user_tok_s"]),
        number(row["prefill_tok_s"]),
        milliseconds(share(figures["ttft_s"], "p50")),
        milliseconds(share(figures["ttft_s"], "p99")),
        milliseconds(share(figures["tpot_s"], "p50")),
        milliseconds(share(figures["itl_s"], "p99")),
        percent(figures["cache_hit"]),
    ]


def energy_cells(entry: dict[str, Any]) -> list[str]:
    """What ENERGY heads; "invalid" where it cannot be believed."""
    if not entry["power_valid"]:
        return ["invalid"] * len(ENERGY)
    names = ["watts", "idle_watts", "j_per_output_token", "net_j_per_output_token"]
    names += ["decode_j_per_output_token", "prefill_j_per_prompt_token", "tokens_per_j"]
    return [number(entry.get(name)) for name in names]


def _energy_tables(results: dict[str, Any]) -> list[Table]:
    scopes = dict.fromkeys(
        (scope, entry["covers"])
        for row in results["summary"]
        for scope, entry in row["energy"].items()
    )
    if not results["power"]["sources"]:
        absent = "; ".join(results["power"]["absent"])
        return [Table("no meter: energy is not known", [], notes=[absent] if absent else [])]
    tables = [_meters(results["power"]["whole"])]
    for scope, covers in scopes:
        table = Table(f"energy, {scope} ({covers})", ["workload", "recipe", *ENERGY])
        for row in results["summary"]:
            entry = row["energy"].get(scope)
            if entry is not None:
                table.rows.append([row["workload"], row["recipe"], *energy_cells(entry)])
                table.notes += [f"{row['workload']}: {said}" for said in entry["problems"][:2]]
        tables.append(table)
    return tables


def _meters(whole: Sequence[dict[str, Any]]) -> Table:
    """What every meter said of the whole measurement, by its counter and by its power."""
    headings = ["meter", "scope", "s", "mean W", "counter J", "integral J", "apart"]
    table = Table("meters, over the whole measurement", headings)
    for one in whole:
        counter, integral = one["counter_j"], one["integral_j"]
        apart = abs(counter - integral) / max(counter, 1e-9) if counter and integral else None
        watts = one["joules"] / one["seconds"] if one["joules"] else None
        cells = [number(value, 5) for value in (one["seconds"], watts, counter, integral)]
        table.rows.append(
            [one["source"], one["scope"], *cells, ABSENT if apart is None else f"{apart:.2%}"]
        )
        table.notes += one["problems"][:2]
    return table


def summary_text(results: dict[str, Any]) -> str:
    """All of them for a terminal; with several recipes, the table of recipes too."""
    tables = summary_tables(results)
    if len(results["targets"]) > 1:
        tables.append(recipes_table(results))
    return "\n".join(terminal(table) for table in tables)


def _gigabytes(nbytes: float | None) -> str:
    return ABSENT if nbytes is None else number(nbytes / 1e9)


def recipes_table(results: dict[str, Any]) -> Table:
    """A row a recipe: memory, speed, joules and what is lost, of the first workload."""
    table = Table(
        "recipes",
        [
            "recipe",
            "weights GB",
            "memory GB",
            "decode tok/s",
            "prefill tok/s",
            "tokens/J",
            "quality",
        ],
    )
    first: dict[str, dict[str, Any]] = {}
    for row in results["summary"]:
        if row["figures"]["user_tok_s"] is not None:
            first.setdefault(row["recipe"], row)
    for target in results["targets"]:
        row = first.get(target["recipe"])
        memory = target.get("usage", {}).get("memory", {})
        nbytes = memory.get("device") or memory.get("host")
        energy = next(iter(row["energy"].values()), None) if row else None
        joules = number(energy.get("tokens_per_j")) if energy and energy["power_valid"] else ABSENT
        table.rows.append(
            [
                target["recipe"],
                _gigabytes(target.get("weights_bytes")),
                _gigabytes(nbytes),
                number(row["figures"]["user_tok_s"]) if row else ABSENT,
                number(row["prefill_tok_s"]) if row else ABSENT,
                joules,
                target.get("quality", "unknown"),
            ]
        )
    table.notes = [
        "weights: of all layers; memory: at the most, of the device, or else of the process so far"
    ]
    return table
