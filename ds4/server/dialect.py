"""What the three chat dialects have in common: a request in, events or one object out."""

from typing import Any, ClassVar

import deepseek_recipe as recipe
import msgspec

from .bodies import Wishes
from .errors import ApiError

MODEL = "ds4"  # what deepseek-recipe is told; names are this server's affair

OPTIONS = (
    recipe.ConversionOptions(
        # Longer answers than the context has room for are cut to it, not refused.
        thinking_max_tokens_upper_bound=1 << 31,
        non_thinking_max_tokens_upper_bound=1 << 31,
        messages_web_search=recipe.WebSearchBehavior.Drop,
    )
).with_model_versions_by_name({MODEL: recipe.ModelVersion.DeepseekV4Pro})


class Run:
    """One request under way, as far as a dialect needs to know it."""

    def __init__(self, request_id: str, model: str, wishes: Wishes, created: int) -> None:
        self.id, self.model, self.wishes, self.created = request_id, model, wishes, created
        self.timings: dict[str, Any] = {}  # complete before the last events of an answer
        self.last: dict[str, Any] = {}  # the response as its stream showed it last
        self.events = 0  # of the stream, so far


class Dialect:
    """One API. The base class is none; see chat.py, messages.py and responses.py."""

    request: ClassVar[Any]
    response: ClassVar[Any]
    prefix: ClassVar[str]

    def adapt(self, body: dict[str, Any], vocab_size: int) -> Wishes:
        """Change a body to what deepseek-recipe takes; tell the rest. Raises ApiError."""
        raise NotImplementedError

    def generator(self, request: Any, converted: Any, run: Run) -> Any:
        """deepseek-recipe's source of events. `request` is one that was not converted."""
        return self.request.chunk_generator(converted, run.id, run.model)

    def event(self, event: dict[str, Any], index: int, run: Run) -> dict[str, Any]:
        """An event of answer `index` as clients expect it."""
        return event

    def last_events(self, run: Run, usages: list[Any]) -> list[dict[str, Any]]:
        """What follows the last event of all answers."""
        return []

    def whole(self, answers: list[dict[str, Any]], run: Run) -> dict[str, Any]:
        """The object that answers a request that does not stream."""
        raise NotImplementedError

    def said(self, whole: dict[str, Any]) -> dict[str, Any]:
        """Of a whole answer: reasoning_text, content, and calls as (id, name, arguments)."""
        raise NotImplementedError

    def error(self, error: ApiError) -> dict[str, Any]:
        return openai_error(error)

    def failure(self, error: ApiError, run: Run) -> bytes:
        """The end of a stream that cannot go on."""
        return sse(None, openai_error(error))

    def alive(self) -> bytes:
        """Sent while there is nothing to send."""
        return b": keep-alive\n\n"

    def event_name(self, event: dict[str, Any]) -> str | None:
        return event.get("type")

    def done(self) -> bytes:
        data = self.response.sse_done_data()
        return f"data: {data}\n\n".encode() if data else b""


def sse(name: str | None, data: Any) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


def openai_error(error: ApiError) -> dict[str, Any]:
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": kinds.get(error.status, kind),
            "param": error.param,
            "code": error.code,
        }
    }
