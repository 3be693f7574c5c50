"""One row a workload: medians over its repetitions, how sure they are, and what is wrong."""

import re
import statistics
from collections.abc import Sequence
from typing import Any

from .cost import Terms, cost
from .measure import decode_only

_WIDEST = 0.03  # the 95 % interval of a rate, of its mean, beyond which it is not steady
# Student's t for a 95 % interval of the mean, by degrees of freedom
_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def summarise(
    runs: Sequence[dict[str, Any]],
    idle: dict[str, dict[str, Any]],
    targets: Sequence[dict[str, Any]],
    terms: Terms,
) -> list[dict[str, Any]]:
    """Rows by recipe, in the order of the targets, and by workload."""
    pairs = dict.fromkeys((run["recipe"], run["workload"]) for run in runs)
    order = [str(target["recipe"]) for target in targets]
    rows = []
    for recipe, workload in sorted(pairs, key=lambda p: (order.index(p[0]), *_natural(p[1]))):
        of = [run for run in runs if (run["recipe"], run["workload"]) == (recipe, workload)]
        main = [run for run in of if run["phase"] == "main"]
        if main:
            first = [run for run in of if run["phase"] == "prefill"]
            rows.append(_row(main, first, idle.get(recipe, {}), terms))
    return rows


def _natural(name: str) -> list[tuple[float, str]]:
    """A name to sort by, in which numbers count as such: closed@2 before closed@16."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(float(part), "") if i % 2 else (0.0, part) for i, part in enumerate(parts)]


def _row(
    main: list[dict[str, Any]],
    first: list[dict[str, Any]],
    idle: dict[str, Any],
    terms: Terms,
) -> dict[str, Any]:
    figures = median([run["figures"] for run in main])
    spread = relative_interval([run["figures"]["output_tok_s"] for run in main])
    prefill = median([run["figures"] for run in first]) if first else None
    scopes = {
        scope: _scope(scope, main, first, idle, terms)
        for scope in dict.fromkeys(scope for run in main for scope in run["energy"])
    }
    return {
        "recipe": main[0]["recipe"],
        "workload": main[0]["workload"],
        "key": main[0]["key"],
        "repetitions": len(main),
        "spread": spread,
        "problems": _problems(main, spread),
        "remarks": _remarks(figures),
        "figures": figures,
        "prefill_tok_s": prefill["prompt_tok_s"] if prefill else figures["prefill_tok_s"],
        "energy": scopes,
        "cost": cost(figures["output_tok_s"], None, None, terms).entry(),
    }


def _scope(
    scope: str,
    main: list[dict[str, Any]],
    first: list[dict[str, Any]],
    idle: dict[str, Any],
    terms: Terms,
) -> dict[str, Any]:
    entries = [run["energy"][scope] for run in main]
    problems = list(dict.fromkeys(p for entry in entries for p in entry["problems"]))
    middle = median(entries)
    valid = all(entry["power_valid"] for entry in entries)
    found = {"covers": entries[0]["covers"], "power_valid": valid, "problems": problems}
    if middle.get("joules") is None:
        return found
    prompts = [run["energy"].get(scope, {}) for run in first]
    prompt = median(prompts) if prompts and all(p.get("power_valid") for p in prompts) else {}
    decode = {
        f"decode_{net}j_per_output_token": _middle(
            decode_only(
                entry.get(f"{net}joules"), run["figures"], prompt.get(f"{net}j_per_prompt_token")
            )
            for run, entry in zip(main, entries, strict=True)
        )
        for net in ("", "net_")
    }
    rate = statistics.median(run["figures"]["output_tok_s"] for run in main)
    still = idle.get(scope, {})
    idle_w = still.get("watts") if still.get("power_valid") else None
    skip = "covers", "power_valid", "problems", "j_per_prompt_token", "net_j_per_prompt_token"
    return (
        found
        | {name: value for name, value in middle.items() if name not in skip}
        | {
            "idle_watts": idle_w,
            "prefill_j_per_prompt_token": prompt.get("j_per_prompt_token"),
            "prefill_net_j_per_prompt_token": prompt.get("net_j_per_prompt_token"),
        }
        | decode
        | cost(rate, middle["watts"], idle_w, terms).entry()
    )


def _remarks(figures: dict[str, Any]) -> list[str]:
    if figures["goodput"] is None:
        return []
    return [
        f"{figures['goodput']:.3g} requests a second kept the limits, "
        f"{figures['good_share'] or 0.0:.0%} of all"
    ]


def _problems(main: list[dict[str, Any]], spread: float | None) -> list[str]:
    found = []
    failed = sum(run["figures"]["failed"] for run in main)
    if failed:
        errors = next((run["figures"]["errors"] for run in main if run["figures"]["errors"]), [""])
        found.append(f"{failed} requests failed: {errors[0]}")
    if any(run["figures"]["window_whole"] for run in main):
        found.append("the load was never full: all of the run is counted")
    if spread is not None and spread > _WIDEST:
        found.append(f"not steady: ±{spread:.1%} between repetitions")
    if any(not run["figures"]["exact_counts"] for run in main):
        found.append("the server counts no tokens: pieces were counted")
    return found


def relative_interval(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean, of the mean; None for fewer than three values."""
    if len(values) < 3:
        return None
    mean = statistics.fmean(values)
    t = _T.get(len(values) - 1, 2.1)
    return t * statistics.stdev(values) / len(values) ** 0.5 / mean if mean else None


def median(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of every number, in the same place; else the first value."""
    return {name: _middle_of([entry.get(name) for entry in entries]) for name in entries[0]}


def _middle_of(values: Sequence[Any]) -> Any:
    there = [value for value in values if value is not None]
    if not there:
        return None
    if isinstance(there[0], dict):
        return median(there)
    if isinstance(there[0], bool) or not isinstance(there[0], int | float):
        return there[0]
    return statistics.median(there)


def _middle(values: Any) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None
