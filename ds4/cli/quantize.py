"""`ds4 quantize`: a checkpoint in one of the smaller formats."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .terminal import console

if TYPE_CHECKING:
    from ..quant.quantize import Summary


def quantize(
    source: Annotated[
        str, typer.Argument(help="demo, a folder, or a hub id downloaded before.", metavar="SRC")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to make.", metavar="DST")],
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", "-r", help="q2, q2_K_L, q3_K_S, q4_K_M, q5_K_M, q6_K or q8_0 (lossless)."
        ),
    ],
    method: Annotated[
        Literal["ls", "rtn"],
        typer.Option(help="ls searches scales of least squared error; rtn rounds, and is fast."),
    ] = "ls",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a smaller checkpoint that every backend reads, layer by layer.

    Stopped or killed, the same command goes on where it was, to the same bytes.
    """
    from ..loader import find_model
    from ..quant.quantize import quantize_checkpoint

    start = time.monotonic()
    try:
        with _bar(f"quantizing to {recipe}") as progress:
            made = quantize_checkpoint(
                find_model(source), target, recipe, method, progress=progress
            )
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        raise
    seconds = time.monotonic() - start
    if as_json:
        print(json.dumps(_entry(made, seconds)))
    else:
        console().print(_sentence(made, seconds), soft_wrap=True, markup=False)


def _entry(made: "Summary", seconds: float) -> dict[str, object]:
    return {
        "folder": str(made.folder),
        "recipe": made.recipe,
        "method": made.method,
        "source_bytes": made.source_bytes,
        "bytes": made.nbytes,
        "files": made.files,
        "reused": made.reused,
        "left_out": list(made.left_out),
        "seconds": round(seconds, 3),
    }


def _sentence(made: "Summary", seconds: float) -> str:
    text = (
        f"{made.folder}: {made.recipe}, {_size(made.nbytes)} in {made.files} files, made of "
        f"{_size(made.source_bytes)} in {seconds:.0f} s"
    )
    if made.reused:
        text += f"; {made.reused} files were there already"
    if made.left_out:
        text += f"; left out, since the model runs without: {', '.join(made.left_out)} tensors"
    return text


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress callback with rate and time left, or None where nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(
        TextColumn(title), *columns, console=console(stderr=True), transient=True
    ) as progress:
        task = None

        def report(done: int, total: int) -> None:
            nonlocal task
            if task is None:  # what was there already says nothing of the rate
                task = progress.add_task(title, total=total, completed=done)
            progress.update(task, completed=done)

        yield report
