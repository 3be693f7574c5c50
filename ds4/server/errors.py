"""What a client is told when its request cannot be served, in whichever dialect."""

import logging

from ..engine.api import QueueFull
from ..errors import Ds4Error, PromptError
from .client import EngineLost

log = logging.getLogger(__name__)


class ApiError(Ds4Error):
    """An answer with an HTTP status instead of a completion. `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After where another try can help, and word to the SDKs where it cannot."""
        if self.retry_after is not None:
            return {"Retry-After": str(max(1, round(self.retry_after)))}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


def told(error: Exception, request_id: str) -> ApiError:
    """Any error as an answer. What nobody foresaw is logged, with no word of the request."""
    if isinstance(error, Ds4Error):
        return _known(error)
    log.error("request %s failed", request_id, exc_info=error)
    return ApiError(500, "internal error", code="internal_error")


def _known(error: Ds4Error) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after_s)
    if isinstance(error, EngineLost):
        return ApiError(503, str(error), code="engine_lost", retry_after=5)
    if isinstance(error, PromptError):
        return ApiError(400, str(error))
    return ApiError(500, str(error), code="internal_error")
