"""Keeps a worker full until every request of a batch is answered."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from ..errors import Ds4Error
from .journal import Journal
from .lines import Job, failed, refused, succeeded

Answer = Callable[[Job], Awaitable[dict[str, Any]]]
Told = Callable[[dict[str, Any]], None]


async def run(
    jobs: Iterable[Job], journal: Journal, answer: Answer, at_once: int, told: Told
) -> None:
    """Answer every job that the journal has no answer to, `at_once` of them at a time.

    `told` is called with each line once it is on the disk. Raises the Ds4Error that `answer`
    raises when no more can be answered: what was until then is kept. Another exception is the
    answer to its request.
    """
    left = [job for job in jobs if job.id not in journal.done]
    lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    writer = asyncio.create_task(_write(lines, journal, told))
    waiting = iter(left)

    async def work() -> None:
        for job in waiting:  # shared: each takes the next
            if writer.done():
                return  # it cannot write: what is answered now would be lost
            await lines.put(await _line(job, answer))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(left))):
                group.create_task(work())
    except BaseExceptionGroup as group_error:
        raise _first(group_error) from group_error
    finally:
        await lines.put(None)
        await writer


async def _line(job: Job, answer: Answer) -> dict[str, Any]:
    if job.fault:
        return refused(job)
    try:
        return await answer(job)
    except Ds4Error:
        raise
    except Exception as error:
        return failed(job, "internal_error", f"{type(error).__name__}: {error}")


async def _write(
    lines: "asyncio.Queue[dict[str, Any] | None]", journal: Journal, told: Told
) -> None:
    """One write and one sync for all that has come meanwhile."""
    loop = asyncio.get_running_loop()
    while (line := await lines.get()) is not None:
        some = [line]
        while not lines.empty():
            more = lines.get_nowait()
            if more is None:
                lines.put_nowait(None)
                break
            some.append(more)
        await loop.run_in_executor(None, journal.append, some)
        for written in some:
            journal.done.add(written["id"])
            journal.failed += not succeeded(written)
            told(written)


def _first(group: BaseExceptionGroup) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
