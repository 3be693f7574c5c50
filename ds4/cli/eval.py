"""`ds4 eval`: how good a checkpoint is, and what each recipe costs."""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PromptError
from . import options
from .terminal import console, read_file

if TYPE_CHECKING:
    from ..eval.report import Tables
    from ..eval.score import Score
    from ..eval.windows import Windows
    from ..llm import LLM

_WIDE = 100  # columns that the ladder's tables take

Watch = Callable[[str], Callable[[int, int], None] | None]


def evaluate(
    model: Annotated[str, typer.Argument(help="demo, a folder, or a hub id downloaded before.")],
    text: Annotated[
        Path | None,
        typer.Argument(help="A text file; else the demo's held-out text.", show_default=False),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", "-r", help="A model to compare with.", show_default=False),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens read at a time.")] = 1024,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Only so many of the text.", show_default=False)
    ] = None,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="Make every recipe of the model and compare all.")
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="With --ladder, another text to calibrate on; else the demo's.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="With --ladder, keep checkpoints here to go on.", show_default=False),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="With --ladder, write a document as well.", show_default=False),
    ] = None,
    backend: options.BackendName = "auto",
    device: options.Device = "auto",
    cache: options.CacheMode = "native",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity on a text, and with --reference the distance from another model.

    The text is cut into windows, each behind a begin token, and every token is predicted once.
    """
    if ladder and reference is not None:
        raise typer.BadParameter(
            "--ladder compares with the model itself", param_hint="--reference"
        )
    if not ladder and (calibrate or folder or markdown):
        raise typer.BadParameter("--calibrate, --folder and --markdown belong to --ladder")

    def load(name: str | Path) -> "LLM":
        gc.collect()  # two models may not fit in memory, and the last one may be in a cycle
        return options.load(options.Place(str(name), cache, 1, backend, device))

    if ladder:
        _climb(model, text, calibrate, window, tokens, folder, markdown, load, as_json)
    else:
        _compare(model, text, reference, window, tokens, load, as_json)


def _choose(path: Path | None, otherwise: str) -> tuple[Path, str]:
    """A text and what to call it: a file, or one beside the demo model."""
    from ..loader import find_model

    if path is not None:
        return path, path.name
    return find_model("demo") / otherwise, f"the demo's {otherwise}"


# one model


def _compare(
    model: str,
    text: Path | None,
    reference: str | None,
    window: int,
    tokens: int | None,
    load: Callable[[str], "LLM"],
    as_json: bool,
) -> None:
    from ..eval.score import Reference, reader, score
    from ..eval.windows import cut_for

    path, title = _choose(text, "heldout.txt")
    content = read_file(path)
    start, beside = time.monotonic(), None
    with _bars() as watch:
        if reference is not None:
            llm = load(reference)
            windows = cut_for(llm, content, window, tokens)
            beside = Reference(reader(llm, windows), windows, watch(f"reading with {reference}"))
            del llm
        llm = load(model)
        windows = cut_for(llm, content, window, tokens)
        found = score(reader(llm, windows), windows, beside, watch(f"reading with {model}"))
    report = {
        "model": model,
        "reference": reference,
        "text": title,
        **_entry(windows, found),
        "seconds": round(time.monotonic() - start, 3),
        "backend": llm.backend_name,
        "device": llm.device,
    }
    if as_json:
        print(json.dumps(report))
    else:
        console().print(_sentences(report), highlight=False, markup=False, soft_wrap=True)


def _entry(windows: "Windows", found: "Score") -> dict[str, Any]:
    return {
        "tokens": windows.tokens,
        "bytes": windows.nbytes,
        "windows": len(windows.ids),
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "kl": found.mean_kl,
        "kl_error": found.kl_error,
        "top1": found.top1,
    }


def _sentences(report: dict[str, Any]) -> str:
    windows = f"{report['windows']} window{'s'[: report['windows'] > 1]}"
    text = (
        f"{report['model']} on {report['text']}, {report['tokens']:,} tokens in "
        f"{windows}: perplexity {report['perplexity']:.3f}, "
        f"{report['bits_per_byte']:.4f} bits per byte"
    )
    if report["reference"] is not None:
        text += (
            f"\nbeside {report['reference']}: KL {report['kl']:.5f} ± {report['kl_error']:.5f} "
            f"nats a token, the same likeliest token {report['top1']:.2%} of the time"
        )
    return text


# a ladder


def _climb(
    model: str,
    text: Path | None,
    calibrate: Path | None,
    window: int,
    tokens: int | None,
    folder: Path | None,
    markdown: Path | None,
    load: Callable[[Path], "LLM"],
    as_json: bool,
) -> None:
    from ..eval.ladder import Ladder
    from ..eval.report import Tables, entry
    from ..loader import find_model
    from ..weights.shard_file import check_writable, write_whole

    path, title = _choose(text, "heldout.txt")
    other, other_title = _choose(calibrate, "calibration.txt")
    content = read_file(path)
    if markdown is not None:
        check_writable(markdown)  # before hours of work
    if content == read_file(other):
        raise PromptError("the text to measure on and the one to calibrate on are the same")
    with (
        _bars() as watch,
        Ladder(find_model(model), load, content, other, window, tokens, folder, watch) as ladder,
    ):
        tables = Tables.measured(ladder)
    about = [
        f"text to measure on: {title}",
        f"text to calibrate on: {other_title}, {ladder.calibration.tokens:,} tokens",
        f"backend {ladder.backend} on {ladder.device}; {_machine()}",
    ]
    if markdown is not None:
        from ..eval.markdown import write

        command = " ".join(["ds4", *sys.argv[1:]])
        write_whole(markdown, write(ladder, tables, command, about).encode())
    if as_json:
        rows = {name: [entry(row) for row in rows] for name, rows in tables.groups.items()}
        findings = [vars(finding) for finding in tables.findings()]
        found = {"model": model, "text": title, **_entry(ladder.windows, tables.top.score)}
        print(json.dumps(found | rows | {"findings": findings}))
    else:
        _show(tables)


def _machine() -> str:
    from .machine import describe

    found = describe()
    gpus = [gpu for gpu in found["gpus"] if gpu != "none found"]
    return ", ".join([found["cpu"], *gpus])


def _show(tables: "Tables") -> None:
    from rich import box
    from rich.table import Table

    from ..eval.report import HEADINGS, cells

    screen = console()
    screen.width = max(screen.width, _WIDE)  # a pipe has none of its own
    for title, rows in tables.groups.items():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if i < 2 else "right", no_wrap=True)
        for row in (tables.top, *rows):
            table.add_row(*cells(row))
        screen.print(table, crop=False)
    for finding in tables.findings():
        screen.print(str(finding), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _bars() -> Iterator[Watch]:
    """What is being done -> a callback that shows how far it is; None where nobody watches."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    bar: Progress | None = None

    def stop() -> None:
        nonlocal bar
        if bar is not None:
            bar.stop()
        bar = None

    def watch(what: str) -> Callable[[int, int], None]:
        stop()

        def report(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                columns = BarColumn(), TaskProgressColumn(show_speed=True), TimeRemainingColumn()
                bar = Progress(
                    TextColumn(what), *columns, console=console(stderr=True), transient=True
                )
                bar.add_task(what)
                bar.start()
            bar.update(bar.task_ids[0], completed=done, total=total)
            if done >= total:
                stop()

        return report

    try:
        yield watch
    finally:
        stop()
