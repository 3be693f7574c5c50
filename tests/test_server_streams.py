"""Streams that are silent, abandoned or broken off, and errors of the engine."""

import asyncio
import json
import time

import httpx
import pytest

from ds4.server.served import Settings
from tests.fake_engine import FakeEngine
from tests.serving import MODEL, TOKENIZER, serving

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def test_a_silent_stream_lives_and_tells_its_progress():
    settings = Settings(keepalive_s=0.02, progress_s=0)
    long = [{"role": "user", "content": "word " * 1000}]
    with serving(settings=settings, chunk=100, step_s=0.05) as (url, _):
        text = httpx.post(
            f"{url}/v1/chat/completions",
            json={**CHAT, "messages": long, "stream": True, "max_tokens": 2},
            timeout=60,
        ).text
        assert ": prefill 100/10" in text
        assert ": keep-alive" in text
        text = httpx.post(
            f"{url}/v1/messages",
            json={**CHAT, "messages": long, "stream": True, "max_tokens": 2},
            timeout=60,
        ).text
        assert text.count("event: ping") > 5


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_goes_is_noticed(path, stream):
    body = {**CHAT, "prompt": "x", "stream": stream, "max_tokens": 3000, "n": 2}

    async def read(client, url):
        async with client.stream("POST", url + path, json=body) as found:
            async for _ in found.aiter_bytes():
                pass

    async def leave(url, engine):
        async with httpx.AsyncClient(timeout=60) as client:
            reading = asyncio.create_task(read(client, url))
            while len(engine.requests) < 2:
                await asyncio.sleep(0.01)
            reading.cancel()
            await asyncio.wait({reading})

    with serving(reply=lambda request: "word " * 3000, step_s=0.01) as (url, engine):
        asyncio.run(asyncio.wait_for(leave(url, engine), 60))
        end = time.monotonic() + 30
        while len(engine.cancelled) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_failing_engine_ends_the_stream_with_an_error(path):
    class Failing(FakeEngine):
        def step(self):
            if self._steps > 5:
                raise MemoryError("no memory left")
            return super().step()

    engine = Failing(TOKENIZER, reply=lambda request: "word " * 100)
    with serving(engine) as (url, _):
        body = {**CHAT, "input": "hi", "max_tokens": 50, "stream": True}
        text = httpx.post(url + path, json=body, timeout=60).text
        last = json.loads(text.strip().split("data: ")[-1])
        assert "no memory left" in json.dumps(last)
        assert last.get("type", "error") in ("error", "response.failed")
        found = httpx.post(url + path, json=body, timeout=60)
        assert (found.status_code, found.headers["retry-after"]) == (503, "5")


def test_a_bug_is_told_without_its_words(caplog):
    def reply(request):
        raise RuntimeError("secret")

    with serving(reply=reply) as (url, _):
        found = httpx.post(url + "/v1/messages", json={**CHAT, "max_tokens": 5}, timeout=60)
    assert found.status_code == 500
    assert found.json()["error"] == {"type": "api_error", "message": "internal error"}
    assert found.headers["x-should-retry"] == "false"
    assert found.headers["request-id"] in caplog.text
