"""`ds4 doctor`: what this machine has, which backend it gets, and whether that computes rightly."""

import json
import math
import platform
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .machine import describe
from .terminal import console

if TYPE_CHECKING:
    from ..check import OpResult

PACKAGES = (
    "ds4",
    "numpy",
    "torch",
    "triton",
    "mlx",
    "tokenizers",
    "deepseek-recipe",
    "safetensors",
)


def doctor(
    backend: options.BackendName = "auto",
    device: options.Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the machine and check a backend, operation by operation, against the reference.

    Exit status 1 if an operation is wrong.
    """
    from ..backend import open_backend
    from ..check import check_backend
    from ..loader import choose_backend

    name, why = choose_backend() if backend == "auto" else (backend, "as asked")
    report: dict[str, Any] = {"machine": describe(), "versions": versions()}
    if not as_json:
        _show_facts({**report["machine"], **report["versions"]}, name, why)
    opened = open_backend(name, device)
    with console(stderr=True).status("checking its operations"):
        results = check_backend(opened)
    good = all(result.ok for result in results)
    kernels = [asdict(verdict) for verdict in getattr(opened, "verdicts", ())]
    if as_json:
        report["backend"] = {"name": opened.name, "device": opened.device, "why": why}
        report["operations"] = [_entry(result) for result in results]
        report["kernels"] = kernels
        print(json.dumps(report | {"ok": good}))
    else:
        beside = "itself" if opened.name == "reference" else "the reference"
        _show_results(results, f"{opened.name} on {opened.device} beside {beside}")
        _show_kernels(kernels)
    if not good:
        raise typer.Exit(1)


def versions() -> dict[str, str]:
    """Versions by package, without importing any."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _entry(result: "OpResult") -> dict[str, Any]:
    entry = asdict(result)
    if result.error is not None and not math.isfinite(result.error):
        entry["error"] = None  # JSON has no infinity; "ok" is false then
    return entry


def _show_facts(facts: dict[str, Any], backend: str, why: str) -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(name, "\n".join(value) if isinstance(value, list) else str(value))
    table.add_row("backend", f"{backend} ({why})")
    console().print(table)


def _show_results(results: "list[OpResult]", title: str) -> None:
    from rich.table import Table

    table = Table("cache", "operation", title=title, title_justify="left")
    for column in ("error", "allowed", "ms", ""):
        table.add_column(column, justify="right")
    for result in results:
        error = "stores" if result.error is None else f"{result.error:.1e}"
        numbers = error, f"{result.tolerance:.0e}", f"{result.seconds * 1e3:.1f}"
        verdict = "ok" if result.ok else "[bold red]WRONG[/]"
        table.add_row(result.cache, result.name, *numbers, verdict)
    screen = console()
    screen.print(table)
    wrong = [f"{result.name} ({result.cache})" for result in results if not result.ok]
    screen.print(f"wrong: {', '.join(wrong)}" if wrong else "every operation is right")


def _show_kernels(kernels: list[dict[str, Any]]) -> None:
    """Kernels that a backend tried on this machine, beside what it does without them."""
    from rich.table import Table

    if not kernels:
        return
    table = Table("kernel", title="kernels tried here", title_justify="left")
    for column in ("differing", "us", "without, us"):
        table.add_column(column, justify="right")
    table.add_column("")
    for one in kernels:
        differing = "" if one["differing"] is None else f"{one['differing']:.2%}"
        times = ("" if us is None else f"{us:.1f}" for us in (one["kernel_us"], one["twin_us"]))
        verdict = "on" if one["used"] else f"off: {one['why']}"
        table.add_row(one["name"], differing, *times, verdict)
    console().print(table)
