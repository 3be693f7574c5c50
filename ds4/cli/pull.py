"""`ds4 pull`: download a checkpoint, or the rest of it, and check it."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import console, loading_bar, show_error

if TYPE_CHECKING:
    from ..weights.download import Survey


def pull(
    hub_id: Annotated[str, typer.Argument(help="Such as deepseek-ai/DeepSeek-V4-Flash.")],
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the files and their sizes.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Check the structure only, not every checksum.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Download what a model needs, and nothing else, into the hub's cache; then check it.

    Run it again after an interruption: it goes on where it ended.
    """
    from ..errors import CheckpointError
    from ..weights.download import survey

    if hub_id == "demo":
        raise typer.BadParameter("demo comes with ds4: there is nothing to pull")
    _quieten(as_json)
    found = survey(hub_id, revision)
    report = _entry(found)
    if not as_json:
        _show(found, every=dry_run)
    if not dry_run:
        result = _fetch(found, revision, quick)
        report |= result
        if not as_json and not result["problems"]:
            console().print(f"{result['folder']}: complete and sound")
    if as_json:
        print(json.dumps(report))
        problems = []
    else:
        problems = report.get("problems", [])
    for problem in problems:
        show_error(CheckpointError(problem))
    if report.get("problems"):
        raise typer.Exit(1)


def _quieten(as_json: bool) -> None:
    """One bar for people, none for programs; the hub client's warnings are ours to word."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if as_json or not sys.stderr.isatty():
        disable_progress_bars()


def _fetch(found: "Survey", revision: str | None, quick: bool) -> dict[str, Any]:
    from ..weights.download import download, pin
    from ..weights.verify import verify

    folder = download(found, report=lambda text: print(f"note: {text}", file=sys.stderr))
    pin(found, revision)
    with loading_bar("checking") as progress:
        checked = verify(folder, not quick, progress)
    return {
        "folder": str(folder),
        "ok": checked.ok,
        "checksums": checked.checksums,
        "problems": checked.problems,
    }


def _entry(found: "Survey") -> dict[str, Any]:
    return {
        "model": found.hub_id,
        "commit": found.commit,
        "bytes": found.nbytes,
        "missing_bytes": found.missing,
        "files": [
            {"name": file.name, "bytes": file.nbytes, "cached": file.cached} for file in found.files
        ],
    }


def _show(found: "Survey", every: bool) -> None:
    screen = console()
    if every:
        for file in found.files:
            state = "here" if file.cached else ""
            screen.print(f"{file.nbytes:>15,}  {file.name}  {state}".rstrip(), soft_wrap=True)
    screen.print(
        f"{found.hub_id} at {found.commit[:12]}: {len(found.files)} files, "
        f"{found.nbytes / 1e9:,.2f} GB, {found.missing / 1e9:,.2f} GB to download",
        soft_wrap=True,
    )
