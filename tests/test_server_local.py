"""The engine in a thread, as the event loop sees it."""

import asyncio

import pytest

from ds4.engine.api import Finished, Progress, QueueFull, Request, Tokens
from ds4.errors import PromptError
from ds4.server.client import EngineLost, ModelInfo
from ds4.server.local import LocalClient
from tests.fake_engine import FakeEngine, demo_tokenizer

TOKENIZER = demo_tokenizer()
INFO = ModelInfo("demo", TOKENIZER.size)


def run(work, **options):
    """`await work(client, engine)` in a loop of its own, within a generous time."""
    engine = FakeEngine(TOKENIZER, **options)
    client = LocalClient(engine, INFO, engine.context)

    async def main():
        return await asyncio.wait_for(work(client, engine), 60)

    try:
        return asyncio.run(main())
    finally:
        client.close()


async def events_of(client, request):
    return [event async for event in await client.submit(request)]


def test_a_request_runs_to_its_end():
    async def work(client, engine):
        return await events_of(client, Request("a", list(range(10, 30))))

    events = run(work, reply=lambda request: "One two.", chunk=8)
    assert [e.done for e in events if isinstance(e, Progress)] == [8, 16, 20]
    ids = [t for e in events if isinstance(e, Tokens) for t in e.tokens]
    assert TOKENIZER.decode(ids) == "One two."
    assert isinstance(events[-1], Finished)
    assert (events[-1].reason, events[-1].completion_tokens) == ("stop", len(ids))


def test_many_requests_get_their_own_answers():
    async def work(client, engine):
        prompts = [[n + 10, 2 * n + 10] for n in range(40)]
        runs = (events_of(client, Request(f"r{n}", p)) for n, p in enumerate(prompts))
        return await asyncio.gather(*runs), [engine._answer(Request("", p)) for p in prompts]

    found, wanted = run(work, slots=3)
    for events, answer in zip(found, wanted, strict=True):
        assert [t for e in events if isinstance(e, Tokens) for t in e.tokens] == answer


def test_closing_a_stream_cancels():
    async def work(client, engine):
        stream = await client.submit(Request("a", [10]))
        await stream.__anext__()
        await stream.aclose()
        assert [e async for e in stream] == []
        while (await client.stats()).finished != {"cancelled": 1}:
            await asyncio.sleep(0.01)
        return engine.cancelled

    assert run(work, reply=lambda request: "word " * 4000, step_s=0.01) == ["a"]


def test_what_is_refused_is_refused_before_the_first_event():
    async def work(client, engine):
        with pytest.raises(PromptError):
            await client.submit(Request("a", [10] * engine.context))
        many = [client.submit(Request(f"b{n}", [10])) for n in range(20)]
        with pytest.raises(QueueFull) as refused:
            await asyncio.gather(*many)
        assert refused.value.retry_after_s > 0

    run(work, slots=1, max_waiting=3, step_s=0.05)


def test_a_cancelled_submission_does_not_run():
    async def work(client, engine):
        task = asyncio.ensure_future(client.submit(Request("a", [10])))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while (await client.stats()).running:
            await asyncio.sleep(0.01)
        assert engine.cancelled == ["a"]

    run(work, reply=lambda request: "word " * 4000, step_s=0.01)


def test_a_question_that_nobody_waits_for_does_no_harm():
    async def work(client, engine):
        stream = await client.submit(Request("a", [10]))
        await stream.__anext__()
        asked = asyncio.ensure_future(client.stats())
        await asyncio.sleep(0)
        asked.cancel()
        assert [event async for event in stream][-1].reason == "stop"

    run(work, reply=lambda request: "word " * 10, step_s=0.01)


def test_streams_of_an_engine_that_fails_end_with_an_error():
    class Failing(FakeEngine):
        def step(self):
            if self._running:
                raise MemoryError("out of memory")
            return super().step()

    async def main(client):
        stream = await client.submit(Request("a", [10] * 600))
        with pytest.raises(EngineLost, match="out of memory"):
            async for _ in stream:
                pass
        assert not client.ready
        with pytest.raises(EngineLost):
            await client.submit(Request("b", [10]))

    client = LocalClient(Failing(TOKENIZER), INFO, 4096)
    asyncio.run(asyncio.wait_for(main(client), 60))
    client.close()
