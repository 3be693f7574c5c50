"""Figures for Prometheus, under the names that vLLM made common with `ds4_` before them.

What a request shows as it passes is counted here; what the engine counts is read when asked.
"""

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .. import __version__
from ..engine.api import Event, Finished, Request, Stats, Tokens
from .client import EngineClient, EngineLost, EventStream, ModelInfo
from .pool import Pool
from .tracing import Traces

_TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAP = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800)
_TOKENS = (16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)


class Metrics:
    """The registry, and what is counted request by request."""

    def __init__(self) -> None:
        disable_created_metrics()  # a series more for each, that nobody graphs
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"ds4_{name}", about, ["model_name"], buckets=buckets, registry=self.registry
            )
            return made

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"ds4_{name}", about, ["model_name", *labels], registry=self.registry)

        self.ttft = histogram("time_to_first_token_seconds", "From arrival to a token.", _TTFT)
        self.gap = histogram("inter_token_latency_seconds", "Between two tokens.", _GAP)
        self.each = histogram(
            "request_time_per_output_token_seconds", "After the first, on average.", _GAP
        )
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", _WHOLE)
        self.queued = histogram("request_queue_time_seconds", "Spent waiting.", _TTFT)
        self.prefill = histogram("request_prefill_time_seconds", "Spent on the prompt.", _TTFT)
        self.decode = histogram("request_decode_time_seconds", "Spent on the answer.", _WHOLE)
        self.prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.answer = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.prompts = counter("prompt_tokens", "Tokens of prompts.")
        self.answers = counter("generation_tokens", "Tokens of answers.")
        self.queries = counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self.hits = counter("prefix_cache_hits", "Prompt tokens found there.")
        self.ends = counter("request_success", "Requests, by how they ended.", "finished_reason")

    def finished(self, model: str, request: "_Passing", end: Finished) -> None:
        """A request has come to an end of its own."""
        self.ends.labels(model, end.reason).inc()
        self.whole.labels(model).observe(time.monotonic() - request.arrived)
        self.queued.labels(model).observe(end.queued_s)
        self.prefill.labels(model).observe(end.prefill_s)
        self.decode.labels(model).observe(end.decode_s)
        self.prompt.labels(model).observe(end.prompt_tokens)
        self.answer.labels(model).observe(end.completion_tokens)
        self.prompts.labels(model).inc(end.prompt_tokens)
        self.queries.labels(model).inc(end.prompt_tokens)
        self.hits.labels(model).inc(end.cached_tokens)
        if request.first and end.completion_tokens > 1:
            spent = time.monotonic() - request.first
            self.each.labels(model).observe(spent / (end.completion_tokens - 1))


class Measured:
    """An EngineClient that tells Metrics, and traces if there are any, what passes through it."""

    def __init__(
        self, client: EngineClient, metrics: Metrics, traces: Traces | None = None
    ) -> None:
        self._client, self._metrics, self._traces = client, metrics, traces
        self.model: ModelInfo = client.model

    @property
    def context(self) -> int:
        return self._client.context

    @property
    def ready(self) -> bool:
        return self._client.ready

    async def submit(self, request: Request) -> "_Passing":
        """Queue a request. Raises PromptError or QueueFull."""
        stream = await self._client.submit(request)
        passing = _Passing(stream, self._metrics, self.model.name)
        if self._traces is not None:
            passing.trace(self._traces, request)
        return passing

    async def stats(self) -> Stats:
        return await self._client.stats()


class _Passing:
    """One request's events, timed on their way."""

    def __init__(self, stream: EventStream, metrics: Metrics, model: str) -> None:
        self._stream, self._metrics, self._model = stream, metrics, model
        self.arrived = time.monotonic()
        self.first = self._last = 0.0
        self._open = True
        self._traces: Traces | None = None

    def trace(self, traces: Traces, request: Request) -> None:
        self._traces, self._span = traces, traces.begin(request, self._model)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        try:
            event = await self._stream.__anext__()
        except EngineLost:
            self._end("lost")
            raise
        if isinstance(event, Tokens):
            now = time.monotonic()
            if self.first:
                self._metrics.gap.labels(self._model).observe(now - self._last)
            else:
                self.first = now
                self._metrics.ttft.labels(self._model).observe(now - self.arrived)
                if self._traces is not None:
                    self._traces.first_token(self._span)
            self._last = now
            self._metrics.answers.labels(self._model).inc(len(event.tokens))
        elif isinstance(event, Finished) and self._open:
            self._open = False
            self._metrics.finished(self._model, self, event)
            self._traced(event.reason, event)
        return event

    async def aclose(self) -> None:
        self._end("cancelled")
        await self._stream.aclose()

    def _end(self, reason: str) -> None:
        if self._open:
            self._open = False
            self._metrics.ends.labels(self._model, reason).inc()
            self._traced(reason, None)

    def _traced(self, reason: str, end: Finished | None) -> None:
        if self._traces is not None:
            self._traces.end(self._span, reason, end)


class EngineFigures:
    """What the engines and the pool know: read when Prometheus asks."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance: names come with the figures."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("ds4_build_info", "The version.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        by_model = self._pool.supervisors.items()
        stats = {name: each.figures() for name, each in by_model}
        for kind, name, about, field in _STATS:
            values = {model: getattr(told, field) for model, told in stats.items()}
            yield _family(kind, name, about, values)
        yield _by_place({model: told.accepted_at for model, told in stats.items()})
        yield _family(_GAUGE, "engine_up", "Is it loaded?", {n: s.ready for n, s in by_model})
        loads = {name: each.about.seconds for name, each in by_model if each.about}
        yield _family(_GAUGE, "model_load_seconds", "The last time.", loads)
        restarts = {name: each.restarts for name, each in by_model}
        yield _family(_COUNTER, "engine_restarts", "Engines that ended unasked.", restarts)
        refusals = {name: each.refusals for name, each in by_model}
        yield _family(_COUNTER, "admission_rejections", "The queue was full.", refusals)
        swap = GaugeMetricFamily("ds4_model_swap_seconds", "The last change of models.")
        swap.add_metric([], self._pool.swap_s)
        yield swap


_GAUGE, _COUNTER = GaugeMetricFamily, CounterMetricFamily
_STATS = (
    (_GAUGE, "num_requests_running", "Requests in slots.", "running"),
    (_GAUGE, "num_requests_waiting", "Requests in the queue.", "waiting"),
    (_GAUGE, "num_tokens_waiting", "Prompt tokens in the queue.", "waiting_tokens"),
    (_GAUGE, "slots", "Requests that can run at once.", "slots"),
    (_GAUGE, "prefix_cache_bytes", "Snapshots in memory.", "prefix_bytes"),
    (_GAUGE, "prefix_cache_disk_bytes", "Snapshots on disk.", "prefix_disk_bytes"),
    (_COUNTER, "engine_steps", "Forward passes.", "steps"),
    (_COUNTER, "spec_decode_num_drafts", "Times that a request guessed.", "drafts"),
    (_COUNTER, "spec_decode_num_draft_tokens", "Tokens drafted.", "drafted_tokens"),
    (_COUNTER, "spec_decode_num_accepted_tokens", "Drafted tokens kept.", "accepted_tokens"),
    (_GAUGE, "spec_decode_paused_requests", "Their guesses do not pay now.", "paused"),
    (_GAUGE, "spec_decode_saved_seconds", "Of decoding, beside plain steps.", "saved_s"),
)


def _family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    about: str,
    values: Mapping[str, float],
) -> Metric:
    family = kind(f"ds4_{name}", about, labels=["model_name"])
    for model, value in values.items():
        family.add_metric([model], value)
    return family


def _by_place(accepted: Mapping[str, Sequence[int]]) -> CounterMetricFamily:
    """Drafted tokens kept, by their place in the draft."""
    family = CounterMetricFamily(
        "ds4_spec_decode_num_accepted_tokens_per_pos",
        "Drafted tokens kept, by place.",
        labels=["model_name", "position"],
    )
    for model, counts in accepted.items():
        for place, count in enumerate(counts):
            family.add_metric([model, str(place)], count)
    return family
