"""`ds4 compare`: results of several machines beside each other, as far as they are alike."""

import json
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .terminal import console


def _option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, show_default=False, **more)


def compare(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Results of ds4 bench.", show_default=False)
    ] = None,
    html: Annotated[Path | None, _option("Write a page with plots, for a browser.")] = None,
    markdown: Annotated[Path | None, _option("Write the tables as Markdown.")] = None,
    csv: Annotated[Path | None, _option("Write a line for each row and scope.")] = None,
    llama_bench: Annotated[
        Literal["md", "json"] | None,
        _option("Print speeds of one sequence as llama-bench does, and nothing else."),
    ] = None,
    article: Annotated[
        bool, typer.Option("--article", help="The article's machines, from its own inputs.")
    ] = False,
    price: Annotated[
        list[str] | None, _option("LABEL=DOLLARS, instead of the file's; may be repeated.")
    ] = None,
    duty: Annotated[float | None, _option("Share of the time at work, for all.")] = None,
    tariff: Annotated[float | None, _option("Dollars a kWh, for all.", min=0)] = None,
    years: Annotated[float | None, _option("Until a machine is worth nothing, for all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare results of ds4 bench: speed, joules and dollars.

    A table holds one model, recipe, workload and, for energy, one scope: what is not alike is not
    compared, and a note says so.
    """
    from ..bench import compare as comparing
    from ..bench.results import read
    from ..bench.tables import Table, terminal
    from ..weights.shard_file import write_whole

    if not files and not article:
        raise typer.BadParameter("give results files, or --article")
    tables: list[Table] = []
    if article:
        from ..bench.article import tables as from_article

        tables += from_article()
    results = [read(file) for file in files or ()]
    rows = comparing.rows_of(results, _prices(price), duty=duty, tariff=tariff, years=years)
    for path, content in _documents(rows, results, html, markdown, csv):
        write_whole(path, content.encode())
    if llama_bench is not None:
        from ..bench import formats

        made = formats.llama_bench_json if llama_bench == "json" else formats.llama_bench_markdown
        print(made(results), end="")
        return
    tables += comparing.tables(rows)
    apart = [*comparing.nothing_in(results), *comparing.not_alike(rows)]
    if apart:
        tables.append(Table("not compared", [], notes=apart))
    if as_json:
        print(json.dumps({"tables": [vars(table) for table in tables]}))
    else:
        text = "\n".join(terminal(table) for table in tables)
        console().print(text, highlight=False, markup=False, soft_wrap=True)


def _documents(
    rows: Any, results: Any, html: Path | None, markdown: Path | None, csv: Path | None
) -> list[tuple[Path, str]]:
    from ..bench import compare as comparing
    from ..bench import formats
    from ..bench.html import page

    found = []
    if html is not None:
        found.append((html, page(rows, results)))
    if markdown is not None:
        found.append((markdown, comparing.document(rows, results)))
    if csv is not None:
        found.append((csv, formats.as_csv(rows)))
    return found


def _prices(given: list[str] | None) -> dict[str, float]:
    prices = {}
    for one in given or ():
        label, found, amount = one.rpartition("=")
        try:
            prices[label] = float(amount)
        except ValueError:
            found = ""
        if not found or not 0 <= prices.get(label, 0.0) < inf:
            raise typer.BadParameter(f"LABEL=DOLLARS, not {one!r}", param_hint="--price")
    return prices
