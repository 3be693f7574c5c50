"""`ds4 verify`: is a checkpoint whole and unharmed."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import console, loading_bar, show_error

if TYPE_CHECKING:
    from ..weights.verify import Report


def verify(
    folder: Annotated[str, typer.Argument(help="A folder, demo, or a downloaded hub id.")],
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte and check every checksum.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a checkpoint: files, names, shapes, formats, and with --full every byte.

    Exit status 1 and a line for each problem if something is wrong. A note, as of a missing
    tokenizer, changes no status.
    """
    from ..errors import CheckpointError
    from ..loader import find_model
    from ..weights.verify import verify as check

    with loading_bar("checking") as progress:
        report = check(find_model(folder), full, progress)
    if as_json:
        print(json.dumps(_entry(report, full)))
    elif report.ok:
        console().print(_summary(report, full))
    for note in () if as_json else report.notes:
        print(f"note: {note}", file=sys.stderr)
    for problem in () if as_json else report.problems:
        show_error(CheckpointError(problem))
    if not report.ok:
        raise typer.Exit(1)


def _entry(report: "Report", full: bool) -> dict[str, object]:
    return {
        "folder": str(report.folder),
        "ok": report.ok,
        "full": full,
        "files": report.files,
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "checksums": report.checksums,
        "problems": report.problems,
        "notes": report.notes,
    }


def _summary(report: "Report", full: bool) -> str:
    files = "1 file" if report.files == 1 else f"{report.files} files"
    text = f"{report.folder}: {files}, {report.tensors:,} tensors, {report.nbytes:,} bytes: "
    if not full:
        return text + "the structure is sound; --full reads every byte"
    if report.checksums is None:
        return text + "every value can be read; there are no checksums to compare with"
    source = "manifest.json" if report.checksums == "manifest" else "the hub"
    return text + f"every checksum is that of {source}"
