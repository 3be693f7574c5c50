"""`ds4 batch`: a file of requests in, a file of answers out."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .groups import grouped
from .terminal import console, loading_bar

if TYPE_CHECKING:
    from ..batch.journal import Journal
    from ..batch.lines import Job

CLUSTER = "Across hosts"
MOST_SLOTS = 32  # if the worker decides


@grouped
def batch(
    requests: Annotated[Path, typer.Argument(help="Requests in OpenAI's batch format.")],
    answers: Annotated[Path, typer.Argument(help="Where answers go; one that is there goes on.")],
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sequences at once, on each worker.",
            show_default="what memory has room for",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster's address, auto, or local.",
            rich_help_panel=CLUSTER,
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="So many models.", rich_help_panel=CLUSTER, show_default="one a GPU or host"
        ),
    ] = None,
    *,
    place: options.Place,
    random: options.Random,
) -> None:
    """Answer a file of requests, one a line: chat completions, completions, responses.

    Each line that is answered is on the disk at once. After a kill the same command goes on where
    it was: no request is lost, none is answered twice. Status 1 if a request failed.
    """
    from ..batch.journal import Journal
    from ..batch.lines import BatchError, read_jobs

    spec: dict[str, Any] = vars(place) | {"slots": slots}
    if (made := random.model(place.model)) is not None:
        spec["synthetic"] = asdict(made)
    jobs = read_jobs(requests)
    if answers.exists() and answers.samefile(requests):
        raise BatchError(f"{answers}: holds the requests; name another file for the answers")
    with contextlib.closing(Journal(answers, jobs)) as journal:
        if len(journal.done) < len(jobs):
            if ray is None:
                _here(spec, jobs, journal, slots)
            else:
                _on_cluster(ray, workers, spec, jobs, journal, slots)
    if journal.failed:
        raise BatchError(f"{journal.failed} of {len(jobs)} requests failed: see {answers}")


def _at_once(slots: int | None) -> int:
    """Requests that a worker has, so that one is there when a slot becomes idle."""
    return 2 * (slots or MOST_SLOTS)


def _here(spec: dict[str, Any], jobs: "list[Job]", journal: "Journal", slots: int | None) -> None:
    from ..batch.answer import open_worker
    from ..batch.run import run

    with loading_bar() as loading:
        worker = open_worker(spec, loading)

    async def work() -> None:
        try:
            with _progress(journal, len(jobs)) as told:
                await run(jobs, journal, worker.answer, _at_once(slots), told)
        finally:
            await worker.close()

    asyncio.run(work())


def _on_cluster(
    address: str,
    workers: int | None,
    spec: dict[str, Any],
    jobs: "list[Job]",
    journal: "Journal",
    slots: int | None,
) -> None:
    from ..batch.cluster import Cluster, connect

    ray = connect(address)
    try:

        async def work() -> None:
            cluster = Cluster(ray, spec, _open_worker, _at_once(slots), workers)
            with _progress(journal, len(jobs)) as told:
                await cluster.run(jobs, journal, told)

        asyncio.run(work())
    finally:
        ray.shutdown()


def _open_worker(spec: dict[str, Any]) -> Any:
    """On a host of the cluster."""
    from ..batch.answer import open_worker

    return open_worker(spec)


@contextmanager
def _progress(journal: "Journal", total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar with the time left, where somebody watches."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    screen = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task("requests", total=total, completed=len(journal.done))

        def told(line: dict[str, Any]) -> None:
            failed = f", {journal.failed} failed" if journal.failed else ""
            bar.update(task, completed=len(journal.done), description=f"requests{failed}")

        yield told
