"""Several models, of which one at a time is in memory: a request for another brings that in.

The model that runs finishes what it has begun and takes nothing new; then the one whose request has
waited longest is loaded. What is queued, for whichever model, stays queued.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from ..engine.api import QueueFull, Request, Stats
from ..errors import Ds4Error
from .client import EventStream, ModelInfo
from .supervisor import Supervisor

log = logging.getLogger("ds4.server")

STAY_S = 2.0  # a model stays at least so long, however loudly another is asked for


class Pool:
    """Supervisors, at most one of which runs. `clients` are what requests go through, by name."""

    def __init__(self, supervisors: Sequence[Supervisor], stay_s: float = STAY_S) -> None:
        self.supervisors = {each.model.name: each for each in supervisors}
        self.clients = {each.model.name: PooledClient(self, each) for each in supervisors}
        self.active = supervisors[0]
        self.swaps = 0
        self.swap_s = 0.0  # how long the last one took, from the last answer on
        self._stay_s, self._since = stay_s, time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._asked: dict[str, float] = {}  # when a model that is not in memory was first asked for
        self._wake = asyncio.Event()

    @property
    def ready(self) -> bool:
        return self.active.ready

    async def start(self) -> None:
        """Load the first model, and see to the others when they are asked for."""
        self.active.start()
        self._task = asyncio.create_task(self._attend())

    async def stop(self) -> None:
        """End the engine in good order; what is queued is dropped."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for supervisor in self.supervisors.values():
            await supervisor.stop()
        self.end_all("the server has ended")

    def end_all(self, reason: str) -> None:
        """End every request of every model with an error."""
        for supervisor in self.supervisors.values():
            supervisor.end_all(reason)

    def kill(self) -> None:
        """End the engine's process at once."""
        self.active.kill()

    def full(self) -> QueueFull | None:
        """Why no request of any model can be queued now, if so: known before one is read."""
        found = None
        for supervisor in self.supervisors.values():
            found = supervisor.full()
            if found is None:
                return None
        return found

    def ask(self, supervisor: Supervisor) -> None:
        """A request for this model has been queued."""
        if supervisor is not self.active:
            self._asked.setdefault(supervisor.model.name, time.monotonic())
            self._wake.set()

    async def _attend(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while wanted := self._next():
                await asyncio.sleep(self._since + self._stay_s - time.monotonic())
                await self._swap(wanted)

    def _next(self) -> Supervisor | None:
        """The model that has been waited for the longest, if anyone still waits for it."""
        self._asked = {n: t for n, t in self._asked.items() if self.supervisors[n].held}
        waited = sorted(self._asked, key=self._asked.__getitem__)
        return self.supervisors[waited[0]] if waited else None

    async def _swap(self, wanted: Supervisor) -> None:
        leaving = self.active
        leaving.hold(True)
        await leaving.until_idle()
        start = time.monotonic()
        await leaving.stop()
        leaving.hold(False)
        self.active = wanted
        self._asked.pop(wanted.model.name, None)
        if leaving.held:  # came while it was leaving
            self._asked[leaving.model.name] = time.monotonic()
        wanted.start()
        try:
            await wanted.until_ready()
        except Ds4Error as error:
            await wanted.stop()
            wanted.end_all(str(error))
            self.active = leaving
            leaving.start()
            return
        self._since = time.monotonic()
        self.swaps, self.swap_s = self.swaps + 1, self._since - start
        names = leaving.model.name, wanted.model.name
        log.info("%s made room for %s in %.1f s", *names, self.swap_s)


class PooledClient:
    """One model of a pool. An EngineClient; a request may wait for the model to be brought in."""

    def __init__(self, pool: Pool, supervisor: Supervisor) -> None:
        self._pool, self._supervisor = pool, supervisor
        self.model: ModelInfo = supervisor.model

    @property
    def context(self) -> int:
        return self._supervisor.context

    @property
    def ready(self) -> bool:
        return self._pool.active is self._supervisor and self._supervisor.ready

    async def submit(self, request: Request) -> EventStream:
        """Queue a request. Raises PromptError, QueueFull."""
        stream = await self._supervisor.submit(request)
        self._pool.ask(self._supervisor)
        return stream

    async def stats(self) -> Stats:
        return await self._supervisor.stats()
