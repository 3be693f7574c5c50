"""From records to figures: latencies, rates and, with a meter, joules.

TTFT   from sending a request to its first output
TPOT   (end - first output) / (output tokens - 1), a mean for each request
ITL    each gap between outputs that came apart, divided among the tokens that came with the later
E2E    from sending to the end
Rates and energy are those of the window in which the load was full.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .load import Load, Record
from .workload import Workload

_SHARES = 50, 90, 99


@dataclass(frozen=True)
class Window:
    """Where the load was full; `whole` says that it never was, and all of it is taken."""

    start: float
    end: float
    whole: bool = False


def window(load: Load) -> Window:
    """Of a load that is over."""
    ends = [record.end for record in load.records if record.end is not None]
    start, end = load.full_from, load.full_until
    if start is not None and end is not None and end > start:
        return Window(start, end)
    return Window(load.begin, max([*ends, load.begin + 1e-6]), whole=True)


def figures(workload: Workload, records: Sequence[Record], at: Window) -> dict[str, Any]:
    """Of one run. A figure that cannot be had is None."""
    good = [record for record in records if record.ok]
    seconds = at.end - at.start
    output = sum(_within(record, at) for record in records)
    absorbed = [r for r in good if r.first is not None and at.start <= r.first <= at.end]
    fresh = sum(r.prompt_tokens - r.cached_tokens for r in absorbed)
    prompt, cached = (sum(getattr(r, f"{name}_tokens") for r in good) for name in _COUNTED)
    ttft = [r.first - r.start for r in good if r.first is not None]
    tpot = [value for r in good if (value := tpot_of(r)) is not None]
    return {
        "requests": len(records),
        "failed": sum(record.error is not None for record in records),
        "errors": sorted({record.error for record in records if record.error})[:3],
        "window_s": seconds,
        "window_whole": at.whole,
        "output_tokens": output,
        "prompt_tokens": fresh,
        "output_tok_s": output / seconds,
        "prompt_tok_s": fresh / seconds,
        "user_tok_s": 1 / float(np.median(tpot)) if tpot else None,
        "ttft_s": shares(ttft),
        "tpot_s": shares(tpot),
        "itl_s": shares(gap for record in good for gap in gaps(record)),
        "e2e_s": shares(r.end - r.start for r in good if r.end is not None),
        "prefill_tok_s": _prefill_rate(workload, good),
        "mean_prompt_tokens": prompt / len(good) if good else None,
        "mean_output_tokens": sum(r.output_tokens for r in good) / len(good) if good else None,
        "cache_hit": cached / prompt if prompt else None,
        "exact_counts": all(record.exact for record in good),
        **_goodput(workload, good, seconds),
    }


_COUNTED = "prompt", "cached"


def tpot_of(record: Record) -> float | None:
    """Seconds a token after the first output; None for an output of one token."""
    if record.first is None or record.end is None or not record.tokens:
        return None
    later = record.output_tokens - 1
    return (record.tokens[-1][0] - record.first) / later if later > 0 else None


def gaps(record: Record) -> list[float]:
    """Seconds between tokens; tokens that came together share the gap before them."""
    found = []
    for (before, had), (after, has) in pairwise(record.tokens):
        count = max(1, has - had)
        found += [(after - before) / count] * count
    return found


def shares(values: Iterable[float]) -> dict[str, float] | None:
    """The percentiles that are told, and the mean; None without values."""
    array = np.fromiter(values, np.float64)
    if not array.size:
        return None
    found = {f"p{share}": float(np.percentile(array, share)) for share in _SHARES}
    return {"mean": float(array.mean())} | found


def _within(record: Record, at: Window) -> int:
    """Output tokens that came inside the window."""
    before = max((n for when, n in record.tokens if when < at.start), default=0)
    until = max((n for when, n in record.tokens if when <= at.end), default=0)
    return until - before


def _prefill_rate(workload: Workload, good: Sequence[Record]) -> float | None:
    """Tokens of a prompt over its TTFT, where nothing else ran beside it."""
    if workload.concurrency > 1 or workload.kind == "poisson":
        return None
    rates = [
        (r.prompt_tokens - r.cached_tokens) / (r.first - r.start)
        for r in good
        if r.first is not None and r.first > r.start
    ]
    return float(np.median(rates)) if rates else None


def _goodput(workload: Workload, good: Sequence[Record], seconds: float) -> dict[str, Any]:
    """Requests a second that kept the workload's limits."""
    if workload.ttft_s is None and workload.tpot_s is None:
        return {"goodput": None, "good_share": None}
    kept = sum(_keeps(record, workload) for record in good)
    return {
        "goodput": kept / seconds if seconds else None,
        "good_share": kept / len(good) if good else None,
    }


def _keeps(record: Record, workload: Workload) -> bool:
    ttft = (record.first or math.inf) - record.start
    tpot = tpot_of(record) or 0.0
    return ttft <= (workload.ttft_s or math.inf) and tpot <= (workload.tpot_s or math.inf)


# energy


def energy_figures(
    joules: float, seconds: float, found: dict[str, Any], idle_w: float | None
) -> dict[str, float | None]:
    """Of the window: what its tokens took, gross, and net of what an idle machine takes."""
    output, prompt = found["output_tokens"], found["prompt_tokens"]
    net = None if idle_w is None else joules - idle_w * seconds
    return {
        "joules": joules,
        "watts": joules / seconds,
        "net_joules": net,
        "j_per_output_token": _per(joules, output),
        "net_j_per_output_token": _per(net, output),
        "j_per_prompt_token": _per(joules, prompt) if output <= found["requests"] else None,
        "net_j_per_prompt_token": _per(net, prompt) if output <= found["requests"] else None,
        "tokens_per_j": _per(output, joules),
    }


def _per(value: float | None, of: float) -> float | None:
    return None if value is None or of <= 0 else value / of


def decode_only(
    joules: float | None, found: dict[str, Any], j_per_prompt_token: float | None
) -> float | None:
    """Joules an output token when the prompts' share, measured apart, is taken off."""
    if joules is None or j_per_prompt_token is None:
        return None
    return _per(joules - j_per_prompt_token * found["prompt_tokens"], found["output_tokens"])
