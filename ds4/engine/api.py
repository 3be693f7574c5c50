"""What the engine takes and what it tells: the same over a function call and over a socket."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..errors import Ds4Error
from ..sampler import SamplingParams, TokenLogprob

FinishReason = Literal["stop", "length", "cancelled", "error"]
GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]


@dataclass(frozen=True)
class Grammar:
    """What the text must match, from its first token on; compiled by llguidance."""

    kind: GrammarKind
    text: str = ""  # the schema as JSON, the expression, or the grammar


@dataclass(frozen=True)
class Request:
    """One sequence to be continued. The engine finds by itself what it has seen of the prompt."""

    id: str
    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0  # lower first
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Progress:
    """The prompt so far: `done` of `total` tokens are absorbed, `cached` of them were known."""

    id: str
    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class Tokens:
    """What a step added: ids, and the text that is now certain.

    Text that may begin a stop string is held back, so `text` may lag behind; the end token is not
    among the ids.
    """

    id: str
    tokens: Sequence[int]
    text: str = ""
    logprobs: Sequence[TokenLogprob] | None = None


@dataclass(frozen=True)
class Finished:
    """The last event of a request: whatever becomes of it, exactly one is sent."""

    id: str
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    text: str = ""  # the rest, now certain
    stop: str | None = None  # the stop string that ended it
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    message: str | None = None  # of an error: one line for the user


Event = Progress | Tokens | Finished


class QueueFull(Ds4Error):
    """The request was not taken. `retry_after_s` estimates when the queue has room."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Stats:
    """Now, and since the start. Token counts are sums over requests."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    slots: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of them, found in a slot or snapshot
    generated_tokens: int = 0
    drafts: int = 0  # times that a request guessed
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: Sequence[int] = ()  # of these, those at the first place of a draft, the second ...
    paused: int = 0  # running requests whose guesses do not pay now
    saved_s: float = 0.0  # of decoding, by the times of plain steps
    finished: dict[str, int] = field(default_factory=dict)  # requests by reason
    prefix_bytes: int = 0  # snapshots in memory
    prefix_disk_bytes: int = 0


class EngineLike(Protocol):
    """A single-threaded engine: who owns it calls `step` while there is work."""

    def submit(self, request: Request) -> None:
        """Queue a request. Raises PromptError if it can never run, QueueFull if not now."""

    def cancel(self, request_id: str) -> None:
        """End a request in any state; its Finished comes with the next step. Unknown: no effect."""

    def step(self) -> list[Event]:
        """Run one step and tell what it brought; without work, an empty list at once."""

    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def stats(self) -> Stats: ...

    def close(self) -> None:
        """Write what is still to be written. Requests in flight are dropped."""
