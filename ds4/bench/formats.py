"""What others read: llama-bench's Markdown and JSON, and CSV."""

import csv
import io
import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from .compare import Row, best_scope, cost_entry


def _tests(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A prompt test and a generation test of every workload of one sequence, as llama-bench has."""
    targets = {target["recipe"]: target for target in results["targets"]}
    workloads = {workload["name"]: workload for workload in results["workloads"]}
    for row in results["summary"]:
        load = workloads[row["workload"]]
        if load["kind"] != "closed" or load["concurrency"] != 1:
            continue
        of = [r for r in results["runs"] if r["workload"] == load["name"]]
        of = [run for run in of if run["recipe"] == row["recipe"]]
        first = [run["figures"]["prompt_tok_s"] for run in of if run["phase"] == "prefill"]
        main = [run["figures"] for run in of if run["phase"] == "main"]
        reads = first or [f["prefill_tok_s"] for f in main if f["prefill_tok_s"]]
        writes = [f["user_tok_s"] for f in main if f["user_tok_s"]]
        target = targets[row["recipe"]]
        for prompt, made, rates in (
            (load["prompt_tokens"], 0, reads),
            (0, load["output_tokens"], writes),
        ):
            if rates:
                yield _test(results, target, prompt, made, load["prompt_tokens"], rates)


def _test(
    results: dict[str, Any],
    target: dict[str, Any],
    prompt: int,
    made: int,
    depth: int,
    rates: Sequence[float],
) -> dict[str, Any]:
    machine = results["environment"]["machine"]
    count = made or prompt
    return {
        "build_commit": results["environment"]["commit"],
        "cpu_info": machine["cpu"],
        "gpu_info": ", ".join(machine["gpus"]),
        "backends": target.get("backend", target.get("reached")),
        "model_filename": target["model"],
        "model_type": f"{target['model']} {target['recipe']}",
        "n_prompt": prompt,
        "n_gen": made,
        "n_depth": 0 if prompt else depth,
        "test_time": results["environment"]["time"],
        "avg_ns": round(1e9 * count / statistics.fmean(rates)),
        "avg_ts": statistics.fmean(rates),
        "stddev_ts": statistics.stdev(rates) if len(rates) > 1 else 0.0,
        "samples_ts": list(rates),
    }


def llama_bench_json(results: Sequence[dict[str, Any]]) -> str:
    """A list of tests with llama-bench's names for fields."""
    return json.dumps([test for one in results for test in _tests(one)], indent=2) + "\n"


def llama_bench_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Its table: a line a test. A generation starts after the prompt, which is its depth."""
    lines = ["| model | backend | test | t/s |", "| --- | --- | ---: | ---: |"]
    for test in (test for one in results for test in _tests(one)):
        name = f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']}"
        depth = f" @ d{test['n_depth']}" if test["n_depth"] else ""
        rate = f"{test['avg_ts']:.2f} ± {test['stddev_ts']:.2f}"
        lines.append(f"| {test['model_type']} | {test['backends']} | {name}{depth} | {rate} |")
    return "\n".join(lines) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each row and scope; figures of an invalid window are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerows(_line(row, scope) for scope in row.scopes)
        if not row.scopes:
            writer.writerow(_line(row, None))
    return out.getvalue()


_ABOUT = ["machine", "model", "recipe", "workload", "workload_key", "kind", "concurrency"]
_ABOUT += ["repetitions", "spread", "problems"]
_SPEED = ["output_tok_s", "user_tok_s", "prompt_tok_s", "cache_hit", "goodput"]
_LATENCY = ["ttft_s", "tpot_s", "itl_s", "e2e_s"]
_SHARES = ["p50", "p90", "p99"]
_ENERGY = ["watts", "idle_watts", "j_per_output_token", "net_j_per_output_token"]
_ENERGY += ["decode_j_per_output_token", "prefill_j_per_prompt_token", "tokens_per_j"]
_COST = ["capex_usd_per_mtok", "electricity_usd_per_mtok", "usd_per_mtok", "tokens_per_usd"]
_COLUMNS = [*_ABOUT, *_SPEED, "prefill_tok_s"]
_COLUMNS += [f"{name}_{share}" for name in _LATENCY for share in _SHARES]
_COLUMNS += ["scope", "covers", "power_valid", *_ENERGY, *_COST]


def _line(row: Row, scope: tuple[str, str] | None) -> dict[str, Any]:
    summary, figures = row.summary, row.summary["figures"]
    line: dict[str, Any] = {
        "machine": row.label,
        "model": row.target["model"],
        "recipe": summary["recipe"],
        "workload": summary["workload"],
        "workload_key": summary["key"],
        "kind": row.workload["kind"],
        "concurrency": row.workload["concurrency"],
        "repetitions": summary["repetitions"],
        "spread": summary["spread"],
        "problems": "; ".join(summary["problems"]),
        "prefill_tok_s": summary["prefill_tok_s"],
    }
    line |= {name: figures[name] for name in _SPEED}
    for name in _LATENCY:
        line |= {f"{name}_{share}": (figures[name] or {}).get(share) for share in _SHARES}
    line |= cost_entry(row, scope or best_scope(row))
    entry = row.energy(scope) if scope else None
    if scope and entry:
        line |= {"scope": scope[0], "covers": scope[1], "power_valid": entry["power_valid"]}
        if entry["power_valid"]:
            line |= {name: entry.get(name) for name in _ENERGY}
    return line
