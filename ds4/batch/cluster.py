"""A batch over the hosts of a Ray cluster: an actor a host or GPU, each with a model of its own.

Actors pull: one that has answered gets the next request. Only this process writes, so that each
request is answered once in the file. What an actor had when its node died is run by another, and
another actor is started where the cluster has room for it.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import Ds4Error
from .journal import Journal
from .lines import BatchError, Job, failed
from .run import Told, run

MOST_TRIES = 5  # for a request whose actors keep dying: it may be why


def connect(address: str) -> Any:
    """Join a cluster, or with "local" start one here. Raises BatchError."""
    try:
        import ray
    except ImportError as error:
        raise BatchError("--ray needs ray: pip install 'ds4[cluster]'") from error
    if not ray.is_initialized():
        where = None if address == "local" else address
        try:
            ray.init(where, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise BatchError(f"no Ray cluster answers at {address}: {error}") from error
    return ray


class _Actor:
    """What runs on a host: a worker, whose event loop is the actor's."""

    def __init__(self, spec: dict[str, Any], open_worker: Callable[..., Any]) -> None:
        self._worker = open_worker(spec)

    async def ready(self) -> bool:
        return True

    async def answer(self, job: Job) -> dict[str, Any]:
        line: dict[str, Any] = await self._worker.answer(job)
        return line


class Cluster:
    """Workers on a Ray cluster. `size` of them; None: one for each GPU, or node without any."""

    def __init__(
        self,
        ray: Any,
        spec: dict[str, Any],
        open_worker: Callable[..., Any],
        at_once: int,
        size: int | None = None,
    ) -> None:
        self._ray, self._spec, self._open, self._at_once = ray, spec, open_worker, at_once
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self._gpus = spec["gpus"] if gpus else 0
        self.size = size or (gpus // self._gpus if gpus else len(ray.nodes()))
        self._failed_starts = 0
        self._free: asyncio.Queue[Any] = asyncio.Queue()  # an actor, once for each request it takes
        self._tasks: set[asyncio.Task[None]] = set()
        self._dead: set[Any] = set()
        self._failure: BaseException | None = None

    async def run(self, jobs: Iterable[Job], journal: Journal, told: Told) -> None:
        """As run.run, with every worker."""
        for _ in range(self.size):
            self._start()
        try:
            await run(jobs, journal, self._answer, self.size * self._at_once, told)
        finally:
            for task in self._tasks:
                task.cancel()

    def _start(self) -> None:
        """An actor, which joins when it has loaded: that may be never, if no host has room."""
        kind = self._ray.remote(_Actor)
        options = {"num_cpus": 1, "num_gpus": self._gpus, "max_concurrency": self._at_once + 1}
        actor = kind.options(**options, scheduling_strategy="SPREAD").remote(self._spec, self._open)
        task = asyncio.create_task(self._join(actor))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join(self, actor: Any) -> None:
        try:
            await actor.ready.remote()
        except self._ray.exceptions.RayActorError as error:
            self._failed_starts += 1
            if self._failed_starts < MOST_TRIES:  # its node may have died
                self._start()
                return
            why = str(error).strip().splitlines()[-1]
            self._failure = Ds4Error(f"workers could not start: {why}")
            self._free.put_nowait(None)
            return
        for _ in range(self._at_once):
            self._free.put_nowait(actor)

    async def _answer(self, job: Job) -> dict[str, Any]:
        for _ in range(MOST_TRIES):
            actor = await self._next()
            try:
                line: dict[str, Any] = await actor.answer.remote(job)
            except self._ray.exceptions.RayActorError:
                if actor not in self._dead:
                    self._dead.add(actor)
                    self._start()
                continue
            except self._ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, Ds4Error):
                    self._free.put_nowait(actor)
                    raise error.cause from error
                raise Ds4Error(f"a worker failed: {' '.join(str(error.cause).split())}") from error
            self._free.put_nowait(actor)
            return line
        message = f"its worker died {MOST_TRIES} times: it may be the reason"
        return failed(job, "worker_died", message)

    async def _next(self) -> Any:
        """An actor with room that is not known to be dead."""
        while True:
            actor = await self._free.get()
            if actor is None:
                self._free.put_nowait(None)
                assert self._failure is not None
                raise self._failure
            if actor not in self._dead:
                return actor
