"""`ds4 plan`: what fits on a machine, how much context, and how fast it should be."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .terminal import console

MOST = 1_000_000  # GiB, and GB/s: infinity is no machine


def _machine_option(text: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel="Machine", show_default=False, **more)


def plan(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="flash (no download), demo, a folder, a hub id."),
    ] = "flash",
    machine: Annotated[
        str | None,
        _machine_option("m4max-128, 2x5090, h200 ...; this one if not given."),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(help="Experts that pruning keeps in each layer.", show_default=False),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in the cache; 8192 if not given.", show_default=False),
    ] = None,
    vram: Annotated[
        float | None, _machine_option("GiB of each card, or of unified memory.", min=0, max=MOST)
    ] = None,
    ram: Annotated[
        float | None, _machine_option("GiB of memory beside the cards.", min=0, max=MOST)
    ] = None,
    bandwidth: Annotated[
        float | None, _machine_option("GB/s of the memory of one card.", min=1, max=MOST)
    ] = None,
    link: Annotated[
        float | None,
        _machine_option(
            "GB/s from host memory to one card: 49 through 16 lanes of PCIe 5.", min=1, max=MOST
        ),
    ] = None,
    speculate: Annotated[
        Literal["off", "lookup", "mtp", "dspark"],
        typer.Option(help="How tokens are to be guessed: what that takes is planned for."),
    ] = "off",
    measured: Annotated[
        Path | None,
        _machine_option("What ds4 bench wrote on that machine: its speeds replace published ones."),
    ] = None,
    article: Annotated[
        bool, typer.Option("--article", help="The article's figures beside ours, and why.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan before a download: sizes of every recipe, what fits where, estimated speed.

    Exit status 0 even if nothing fits: "recommended" says so.
    """
    if article:
        from ..plan.article import compare

        report = compare()
    else:
        from ..plan.report import make_report, open_model

        chosen = open_model(model, experts)
        wanted = context or min(8192, chosen.cfg.max_position_embeddings)
        found = _machine(machine, vram, ram, bandwidth, link)
        if measured is not None:
            from ..plan.measured import with_measured

            found = with_measured(found, chosen.cfg, measured)
        report = make_report(chosen, found, wanted, speculate)
    if as_json:
        print(json.dumps(report))
    elif article:
        _show_article(report)
    else:
        _show(report)


def _machine(
    name: str | None,
    vram: float | None,
    ram: float | None,
    bandwidth: float | None,
    link: float | None,
) -> Any:
    from ..plan.machines import adjusted, detected, named
    from .machine import describe

    found = detected(describe()) if name is None else named(name)
    return adjusted(found, vram, ram, bandwidth, link)


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f}" if count >= 2**27 else f"{count / 2**30:.3f}"


def _table(title: str, *headings: str, **more: Any) -> Any:
    """A table whose first column is a name and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, **more)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    return table


# a plan


def _show(report: dict[str, Any]) -> None:
    screen = console()
    screen.print(_about_model(report["model"]))
    screen.print(_about_machine(report["machine"]) + "\n")
    screen.print(_sizes(report))
    screen.print(_fits(report))
    if placements := _placements(report):
        screen.print(placements)
    cache, kept = report["model"]["cache"], report["model"]["cache_rows"]
    rows = ", ".join(f"{one['context']:,} tokens {one['bytes'] / 1e6:,.1f} MB" for one in cache)
    screen.print(f"cache of one sequence, {kept} rows: {rows}")
    screen.print(_drafters(report))
    screen.print(f"~ is an estimate, not measured. {report['formula']}", style="dim")
    screen.print(f"\n[bold]take {report['recommended'] or 'no recipe'}[/]: {report['why']}")
    advice = _advice(report)
    if advice:
        screen.print(advice)


def _about_model(model: dict[str, Any]) -> str:
    billions = model["parameters"] / 1e9
    stored = (
        "" if model["stored_bytes"] is None else f", {_gib(model['stored_bytes'])} in its files"
    )
    return (
        f"{model['name']}: {billions:,.{2 if billions >= 1 else 4}f} B parameters, "
        f"{model['experts']} experts a layer, {_gib(model['shipped_bytes'])} GiB as shipped{stored}"
    )


def _about_machine(machine: dict[str, Any]) -> str:
    cards = "" if machine["cards"] == 1 else f"{machine['cards']} x "
    host = machine["host_memory_gib"]
    bandwidth, link = machine["bandwidth_gb_s"], machine["link_gb_s"]
    each = "each " if cards else ""
    return (
        f"{machine['name']}: {cards}{machine['memory_gib']:.1f} GiB"
        + (f", {host:.0f} GiB of host memory" if host is not None else "")
        + (f", {bandwidth:,.0f} GB/s" if bandwidth else ", bandwidth unknown")
        + (f", {each}reads {link / machine['cards']:.0f} GB/s of host memory" if link else "")
        + f"; {_gib(machine['working_bytes'])} GiB are kept for the work itself"
    )


def _sizes(report: dict[str, Any]) -> Any:
    small = report["recipes"][-1]["weights_bytes"] < 2**30
    unit, name = (2**20, "MiB") if small else (2**30, "GiB")
    kinds = "gate_up", "down", "dense", "embed", "head", "compress"
    shown: dict[str, tuple[str, ...]] = {kind: (kind,) for kind in kinds}
    shown["rest"] = ("tables", "rest")
    headings = (kind.replace("_", "+") for kind in shown)
    table = _table(f"weights by class, {name}", "recipe", *headings, "all")
    for one in report["recipes"]:
        sizes = one["weights_by_class"]
        parts = [sum(sizes[kind] for kind in group) for group in shown.values()]
        numbers = [f"{size / unit:,.1f}" for size in (*parts, one["weights_bytes"])]
        table.add_row(one["recipe"], *numbers)
    return table


def _fits(report: dict[str, Any]) -> Any:
    way = report["speculate"]
    beside = "" if way == "off" else f" and what {way} takes"
    tokens = "1 token" if report["context"] == 1 else f"{report['context']:,} tokens"
    title = f"there, with {tokens} of context{beside}; speeds in tok/s"
    headings = "fits in", "experts there", "context up to", "decode", "prefill"
    table = _table(title, "recipe", *headings)
    for one in report["recipes"]:
        if not one["fits"]:
            table.add_row(one["recipe"], "nothing", style="dim")
            continue
        table.add_row(
            one["recipe"],
            one["where"],
            f"{one['resident_experts']:.0%}",
            f"{one['largest_context']:,}",
            _speed(one["decode_tok_s_estimate"]),
            _speed(one["prefill_tok_s_estimate"]),
            style="bold" if one["recipe"] == report["recommended"] else "",
        )
    return table


def _placements(report: dict[str, Any]) -> Any | None:
    """What goes where, of the recipes whose experts are in two memories."""
    if all(one["placement"] is None for one in report["recipes"]):
        return None
    each = " a card" if report["machine"]["cards"] > 1 else ""
    title = f"experts in two memories, GB{each}; decode by routing (docs/offload.md)"
    headings = "GPU", "host", "prompt step", "uniform", "found", "skewed", "found"
    table = _table(title, "recipe", *headings)
    for one in report["recipes"]:
        if (placed := one["placement"]) is None:
            continue
        hits = placed["hit_rate_estimate"]
        table.add_row(
            one["recipe"],
            f"{placed['expert_bytes_on_gpu'] / 1e9:.1f}",
            f"{placed['host_bytes'] / 1e9:.1f}",
            f"{placed['chunk']:,}",
            _speed(one["decode_tok_s_estimate"]),
            f"{hits['uniform']:.0%}",
            _speed(placed["decode_skewed_tok_s_estimate"]),
            f"{hits['skewed']:.0%}",
        )
    return table


def _drafters(report: dict[str, Any]) -> str:
    """What a drafter takes besides, as shipped and in the smallest recipe."""
    smallest = report["recipes"][0]
    sizes = ", ".join(
        f"{kind} {nbytes / 2**20:,.0f} MiB ({smallest['recipe']}: "
        f"{smallest['drafter_bytes'][kind] / 2**20:,.0f})"
        for kind, nbytes in report["model"]["drafters"].items()
    )
    return f"a drafter beside the model (--speculate mtp), as shipped: {sizes}"


def _speed(rate: float | None) -> str:
    return "?" if rate is None else f"~{rate:,.0f}"


def _advice(report: dict[str, Any]) -> str | None:
    """What to type on a Mac whose GPU may not use enough of the memory."""
    machine = report["machine"]
    if not any(one["where"] == "gpu, raised limit" for one in report["recipes"]):
        return None
    return (
        f"macOS gives the GPU {_gib(machine['gpu_limit_bytes'])} GiB; until the next start, "
        f"this gives it {_gib(machine['raised_limit_bytes'])}:\n  {machine['wired_limit_command']}"
    )


# the article


def _show_article(report: dict[str, Any]) -> None:
    screen = console()
    headings = "its weights", "its memory", "our weights", "our memory", "160 experts"
    table = _table("GB, memory with 8K of context: the article and ours", "recipe", *headings)
    for one in report["recipes"]:
        kinds = "weights_bytes", "memory_bytes", "pruned_weights_bytes"
        its = one["article_weights_gb"], one["article_memory_gb"]
        table.add_row(one["recipe"], *its, *(f"{one[kind] / 1e9:.1f}" for kind in kinds))
    screen.print(table)
    for one in report["recipes"]:
        screen.print(f"{one['recipe']}: {one['why']}")
    for one in report["claims"]:
        screen.print(f"\n[bold]{one['claim']}[/]")
        screen.print(f"  article  {one['article']}\n  ours     {one['ours']}")
        screen.print(f"  because  {one['why']}", style="dim")
