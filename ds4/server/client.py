"""How the HTTP side reaches an engine, wherever that runs: this process, or one of its own."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from ..engine.api import Event, Request, Stats
from ..errors import Ds4Error


class EngineLost(Ds4Error):
    """The engine's process ended after it had sent a token: the answer cannot be completed.

    A request of which nothing was sent yet is no case for it: the client runs that one again.
    """


@dataclass(frozen=True)
class ModelInfo:
    """What a client knows of its engine's model without asking."""

    name: str  # what `model` of a request may say, and /v1/models lists
    vocab_size: int
    created: int = 0  # seconds since 1970; of the checkpoint


class EventStream(Protocol):
    """The events of one request: Progress, Tokens, and exactly one Finished, which ends it.

    Raises EngineLost from `anext`. `aclose`, or to leave `async with`, cancels what has not
    finished; after it no event comes. Only one task reads a stream.
    """

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None: ...


class EngineClient(Protocol):
    """One model's engine, as the event loop sees it; every method is called from that loop.

    context  tokens that a prompt and its answer may have together
    ready    whether a request submitted now would start soon: not while weights are loaded
    """

    model: ModelInfo

    @property
    def context(self) -> int: ...

    @property
    def ready(self) -> bool: ...

    async def submit(self, request: Request) -> EventStream:
        """Queue a request. Raises PromptError if it can never run, QueueFull if not now."""

    async def stats(self) -> Stats: ...
