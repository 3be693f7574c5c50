"""Shares of bandwidth and of arithmetic that `ds4 bench` measured, in place of published ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Config
from ..quant.recipes import RECIPES
from .machines import Machine, PlanError
from .published import Efficiency, efficiency
from .sizes import cache_read_bytes, kept_by, prefill_flops, weight_sizes


def with_measured(machine: Machine, cfg: Config, file: Path) -> Machine:
    """The machine with the shares that one sequence at a time reached in a results file.

    A share is what the estimate's formula needs to give the speed that was measured, so that the
    other recipes and contexts follow. Raises PlanError for a file of another model, of experts in
    host memory, or without a load of one sequence; BenchError for another file.
    """
    from ..bench.results import read

    results = read(file)
    if machine.bandwidth is None:
        raise PlanError(f"{machine.name}: give --bandwidth, of which a share was measured")
    alone = {w["key"]: w for w in results["workloads"] if w["concurrency"] == 1}
    rows = [r for r in results["summary"] if r["key"] in alone and r["figures"]["user_tok_s"]]
    if not rows:
        raise PlanError(f"{file}: no workload of one sequence at a time was measured")
    row = min(rows, key=lambda r: alone[r["key"]]["prompt_tokens"])
    recipe = RECIPES.get({"native": "q8_0"}.get(row["recipe"], row["recipe"]))
    target = next(one for one in results["targets"] if one["recipe"] == row["recipe"])
    sizes = weight_sizes(cfg, recipe) if recipe else None
    if sizes is None or target.get("weights_bytes") != sizes.total:
        raise PlanError(
            f"{file}: measured {target.get('model')} as {row['recipe']}, not this model"
        )
    load = alone[row["key"]]
    tokens, speed = load["prompt_tokens"], row["figures"]["user_tok_s"]
    context = tokens + load["output_tokens"] // 2
    kept = kept_by(machine.backend)
    dense = sizes.token - sizes.token_experts + cache_read_bytes(cfg, context, kept)
    read_bytes = dense + sizes.token_experts / machine.cards
    bandwidth = speed * read_bytes / (machine.bandwidth * 1e9)
    compute = _compute(machine, cfg, tokens, row)
    if not 0 < bandwidth <= 1:
        raise PlanError(f"{file}: {speed:.0f} tok/s is more than {machine.name} can read")
    source = f"{speed:.1f} tok/s with {row['recipe']} in {file.name}"
    return replace(machine, measured=Efficiency(bandwidth, compute, source))


def _compute(machine: Machine, cfg: Config, tokens: int, row: dict[str, Any]) -> float:
    speed = row["prefill_tok_s"]
    if not speed or machine.tflops is None:
        return efficiency(machine).compute
    return float(speed * prefill_flops(cfg, tokens) / (machine.tflops * 1e12 * machine.cards))
