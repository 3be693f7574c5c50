"""Spans of requests, under the caller's."""

import asyncio

import pytest

from ds4.engine.api import Finished, Progress, Request, Tokens
from ds4.server.client import EngineLost, ModelInfo
from ds4.server.metrics import Measured, Metrics
from ds4.server.tracing import Traces

pytest.importorskip("opentelemetry.sdk", reason="pip install 'ds4[otel]'")


class Client:
    model, context, ready = ModelInfo("flash", 100), 100, True

    async def submit(self, request: Request) -> object:
        async def events() -> object:
            yield Progress(request.id, 3, 3, 0)
            yield Tokens(request.id, [1], "a")
            if request.id == "lost":
                raise EngineLost("gone")
            yield Finished(request.id, "stop", 3, 2, 1, queued_s=0.5)

        return events()


def test_a_span_for_each_request() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    traces = Traces(provider)
    client = Measured(Client(), Metrics(), traces)  # type: ignore[arg-type]

    async def app(scope: dict, receive: object, send: object) -> None:
        async for _ in await client.submit(Request(scope["path"], [1, 2, 3])):
            pass

    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = [(b"traceparent", f"00-{trace}-b7ad6b7169203331-01".encode())]
    layer = traces.layer(app)  # type: ignore[arg-type]
    asyncio.run(layer({"type": "http", "path": "whole", "headers": headers}, None, None))
    with pytest.raises(EngineLost):
        asyncio.run(layer({"type": "http", "path": "lost", "headers": []}, None, None))
    whole, lost = spans.get_finished_spans()
    assert format(whole.context.trace_id, "032x") == trace
    assert whole.attributes["gen_ai.usage.output_tokens"] == 1
    assert whole.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert whole.events[0].name == "gen_ai.first_token"
    assert format(lost.context.trace_id, "032x") != trace
    assert not lost.status.is_ok
    traces.close()
