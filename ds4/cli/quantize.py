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
    from rich.progress import Progress, Task

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
        Literal["ls", "gptq", "rtn"],
        typer.Option(
            help="ls searches scales of least squared error; gptq, on top, makes an error good by "
            "the inputs after it; rtn rounds, and is fast."
        ),
    ] = "ls",
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="A text for the model to read first, which shows what matters to each expert; "
            "gptq needs one.",
            metavar="FILE",
        ),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(
            help="Keep only so many experts of each layer: those that add most, by REAP, while the "
            "model reads the text of --calibrate.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[str, typer.Option("--backend", "-b", help="What reads the text.")] = "auto",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where scales are searched.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a smaller checkpoint that every backend reads, layer by layer.

    Stopped or killed, the same command goes on where it was, to the same bytes.
    """
    from ..loader import find_model
    from ..quant.quantize import quantize_checkpoint

    try:
        str(target).encode()
    except UnicodeEncodeError as error:
        said = f"{str(target)!a}: a name that is not UTF-8; choose another"
        raise typer.BadParameter(said, param_hint="DST") from error
    start = time.monotonic()
    try:
        with _bars(f"quantizing to {recipe}") as (reading, progress):
            made = quantize_checkpoint(
                find_model(source),
                target,
                recipe,
                method,
                progress=progress,
                calibrate=calibrate,
                reading=reading,
                backend=backend,
                device=device,
                experts=experts,
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
        "device": made.device,
        "tokens": made.tokens,
        "rare_experts": made.rare,
        "seconds": round(seconds, 3),
    }


def _sentence(made: "Summary", seconds: float) -> str:
    text = (
        f"{made.folder}: {made.recipe}, {_size(made.nbytes)} in {made.files} files, made of "
        f"{_size(made.source_bytes)} in {seconds:.0f} s"
    )
    if made.tokens:
        text += f"; calibrated on {made.tokens:,} tokens"
    if made.rare:
        text += (
            f", of which {made.rare} experts saw too few and lean on their layer's mean: "
            "a longer text would help"
        )
    if made.reused:
        text += f"; {made.reused} files were there already"
    if made.left_out:
        text += f"; left out: {', '.join(made.left_out)} tensors"
    return text


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


Report = Callable[[int, int], None] | None


@contextmanager
def _bars(title: str) -> Iterator[tuple[Report, Report]]:
    """Callbacks for the text's tokens and for the model's bytes, or None where nobody watches."""
    if not sys.stderr.isatty():
        yield None, None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    amount = TextColumn("{task.fields[amount]}")
    columns = TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn()
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        yield _task(progress, "reading the text", _tokens), _task(progress, title, _size)


def _task(
    progress: "Progress", title: str, show: Callable[[int], str]
) -> Callable[[int, int], None]:
    """A callback that draws a bar from its first call on: what was done before has no rate."""
    task: Task | None = None

    def report(done: int, total: int) -> None:
        nonlocal task
        if task is None:
            number = progress.add_task(title, total=total, completed=done, amount="")
            task = next(t for t in progress.tasks if t.id == number)
        amount = (
            f"{show(done)} of {show(total)}, {show(int(task.finished_speed or task.speed or 0))}/s"
        )
        progress.update(task.id, completed=done, amount=amount)

    return report


def _tokens(count: int) -> str:
    return f"{count:,} tokens"
