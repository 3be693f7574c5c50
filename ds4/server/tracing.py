"""OpenTelemetry: a span for each request, under the caller's, named as GenAI conventions have it.

Where spans go is said by the usual variables, such as OTEL_EXPORTER_OTLP_ENDPOINT. No text of
prompts or answers is in them.
"""

import time
from typing import TYPE_CHECKING, Any

from ..engine.api import Finished, Request
from ..errors import ConfigError
from .answers import App, Receive, Scope, Send

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


class Traces:
    """Needs the extra `otel`. Raises ConfigError without it."""

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        try:
            from opentelemetry import context, propagate, trace

            provider = provider or _exporting()
        except ImportError as error:
            raise ConfigError(f"traces need {error.name}: pip install 'ds4[otel]'") from error
        self._context, self._propagate, self._trace = context, propagate, trace
        self._provider = provider
        self._tracer = provider.get_tracer("ds4.server")

    def begin(self, request: Request, model: str) -> Any:
        """A span that the end of the request ends."""
        about: dict[str, str | int | float] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "ds4",
            "gen_ai.request.model": model,
            "gen_ai.request.temperature": request.params.temperature,
            "gen_ai.usage.input_tokens": len(request.prompt),
        }
        kind = self._trace.SpanKind.SERVER
        return self._tracer.start_span(f"text_completion {model}", kind=kind, attributes=about)

    def first_token(self, span: Any) -> None:
        """Marks the moment."""
        span.add_event("gen_ai.first_token")

    def end(self, span: Any, reason: str, end: Finished | None) -> None:
        """`reason` is how it ended; `end` has the figures, if the engine said any."""
        span.set_attribute("gen_ai.response.finish_reasons", [reason])
        if end is not None:
            span.set_attribute("gen_ai.usage.output_tokens", end.completion_tokens)
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", end.cached_tokens)
            for name in ("queued_s", "prefill_s", "decode_s"):
                span.set_attribute(f"ds4.{name}", getattr(end, name))
        if reason in ("error", "lost"):
            span.set_status(self._trace.StatusCode.ERROR)
        span.end(time.time_ns())

    def layer(self, app: App) -> App:
        """An ASGI layer that takes the caller's trace from its headers."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            names = (b"traceparent", b"tracestate")
            carrier = {k.decode(): v.decode("latin-1") for k, v in scope["headers"] if k in names}
            token = self._context.attach(self._propagate.extract(carrier))
            try:
                await app(scope, receive, send)
            finally:
                self._context.detach(token)

        return traced

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def _exporting() -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "ds4"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
