"""A load against servers over HTTP: somebody else's dialect and manners."""

from typing import Any

import httpx
import pytest

from ds4.bench import measure
from ds4.bench.load import Load
from ds4.bench.server import ServerTarget
from ds4.bench.workload import Workload
from ds4.errors import BenchError
from ds4.power.sampler import now
from tests.stand_in_server import StandIn

WORK = Workload("w", prompt_tokens=100, output_tokens=5, concurrency=2, requests=4, seconds=0)


def ran(url: str, workload: Workload = WORK, **options: str) -> tuple[Load, ServerTarget]:
    target = ServerTarget(url, {"recipe": "q4"}, **options)  # type: ignore[arg-type]
    load = Load(workload, target.texts(1), now(), 1)
    target.run(load)
    return load, target


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_server_is_measured_by_its_own_counts(api: str) -> None:
    server = StandIn(delay_s=0.002)
    with server.serve() as url:
        load, target = ran(url, api=api)
    assert target.about["model"] == "peer-model"
    assert target.about["api"] == api
    bodies = server.bodies[1:]
    assert len(bodies) == len(load.records) == 4
    assert all(body["max_tokens"] == 5 and body["ignore_eos"] for body in bodies)
    assert all(body["stream_options"] == {"include_usage": True} for body in bodies)
    for record in load.records:
        assert record.ok
        assert record.exact
        assert record.output_tokens == 5
        assert record.prompt_tokens == pytest.approx(100, abs=2)
    found = measure.figures(WORK, load.records, measure.window(load))
    assert found["failed"] == 0
    assert found["tpot_s"]["p50"] >= 0.002


def test_a_server_that_is_strict_is_asked_without_our_field() -> None:
    server = StandIn(strict=True)
    with server.serve() as url:
        load, target = ran(url)
    assert "ignore_eos" not in server.bodies[-1]
    assert "outputs may end early" in target.about["note"]
    assert all(record.ok for record in load.records)


def test_a_server_of_a_small_context_counts_a_short_text() -> None:
    server = StandIn(context=200)
    with server.serve() as url:
        load, target = ran(url)
    assert "note" not in target.about
    assert all(record.prompt_tokens == pytest.approx(100, abs=2) for record in load.records)
    with StandIn(context=2).serve() as url, pytest.raises(BenchError, match="exceeds the context"):
        ServerTarget(url, {"recipe": "q4"})


def test_a_connection_that_the_server_has_closed_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send, seen = httpx.AsyncClient.send, []

    async def closed(self: httpx.AsyncClient, request: httpx.Request, **options: Any) -> Any:
        seen.append(request)
        if len(seen) == 4:  # models, probe, and the first of the load
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
        return await send(self, request, **options)

    monkeypatch.setattr(httpx.AsyncClient, "send", closed)
    with StandIn().serve() as url:
        load, _ = ran(url)
    assert len(seen) == 2 + 4 + 1
    assert all(record.ok for record in load.records)


def test_a_server_that_counts_nothing_has_its_pieces_counted() -> None:
    with StandIn(counts=False).serve() as url:
        load, target = ran(url)
    assert "counts no tokens" in target.about["note"]
    assert all(record.output_tokens == 5 and not record.exact for record in load.records)


def test_a_conversation_goes_on_with_what_the_server_said() -> None:
    server = StandIn()
    work = Workload("a", "agent", 50, 3, requests=3, turns=3, seconds=0)
    with server.serve() as url:
        load, _ = ran(url, work)
    first, second, third = (body["prompt"] for body in server.bodies[1:])
    assert second.startswith(first + " word word word")
    assert third.startswith(second + " word word word")
    assert len(load.records) == 3


def test_a_server_in_trouble_ends_the_measurement_with_its_words() -> None:
    with StandIn(status=503).serve() as url:
        target = ServerTarget(url + "/v1/", {"recipe": "q4"})
        load = Load(WORK, target.texts(1), now(), 1)
        with pytest.raises(BenchError, match=r"HTTP 503.*on fire"):
            target.run(load)


def test_no_server_is_an_error() -> None:
    with pytest.raises(BenchError, match=r"http://127\.0\.0\.1:9/v1: no answer"):
        ServerTarget("http://127.0.0.1:9", {"recipe": "q4"})
