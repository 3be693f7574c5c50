"""Several models, one in memory: who waits, who is answered, and what a swap costs."""

import asyncio
import sys
from collections.abc import Awaitable, Callable

import pytest

from ds4.engine.api import Event, Finished, Progress, Request, Tokens
from ds4.errors import Ds4Error
from ds4.server import supervisor
from ds4.server.client import EngineLost, ModelInfo
from ds4.server.metrics import EngineFigures, Measured, Metrics
from ds4.server.pool import Pool
from ds4.server.supervisor import Supervisor
from ds4.server.wire import EngineSpec

FAKE = (sys.executable, "-m", "tests.engine_child", "0.01")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_S", 0.01)


def run(scene: Callable[[Pool], Awaitable[None]], *models: str) -> None:
    async def play() -> None:
        made = [
            Supervisor(EngineSpec(name, slots=2), ModelInfo(name, 1000), 4096, command=FAKE)
            for name in models
        ]
        pool = Pool(made, stay_s=0.0)
        await pool.start()
        try:
            await asyncio.wait_for(scene(pool), 60)
        finally:
            await pool.stop()

    asyncio.run(play())


async def read(stream: object) -> list[Event]:
    return [event async for event in stream]


def test_a_request_for_another_model_brings_it_in_and_none_is_lost() -> None:
    async def scene(pool: Pool) -> None:
        a, b = pool.clients["a"], pool.clients["b"]
        running = await a.submit(Request("first", [1, 2]))
        assert isinstance(await anext(running), Progress)
        assert a.ready
        assert not b.ready
        streams = [await (a, b)[n % 2].submit(Request(f"r{n}", [n + 1, n])) for n in range(12)]
        ends = [(await read(stream))[-1] for stream in [running, *streams]]
        assert all(isinstance(end, Finished) and end.reason == "stop" for end in ends)
        assert pool.swaps >= 1
        assert pool.swap_s > 0
        assert sum(s.pid is not None for s in pool.supervisors.values()) == 1

    run(scene, "a", "b")


def test_nobody_starves_while_another_model_is_busy() -> None:
    async def scene(pool: Pool) -> None:
        busy, served = True, 0

        async def keep_busy() -> None:
            nonlocal served
            while busy:
                await read(await pool.clients["a"].submit(Request(f"a{served}", [1])))
                served += 1

        task = asyncio.create_task(keep_busy())
        for n in range(2):
            end = (await read(await pool.clients["b"].submit(Request(f"b{n}", [1]))))[-1]
            assert isinstance(end, Finished)
        busy = False
        await task
        assert served
        assert pool.swaps >= 2

    run(scene, "a", "b")


@pytest.mark.parametrize(
    ("broken", "why"), [("missing", "no model is called 'missing'"), ("crashing", "exit status 9")]
)
def test_a_model_that_cannot_be_loaded_fails_its_own_requests_only(broken: str, why: str) -> None:
    async def scene(pool: Pool) -> None:
        for n in range(2 if broken == "missing" else 1):
            with pytest.raises(EngineLost, match=why):
                await read(await pool.clients[broken].submit(Request(f"m{n}", [1])))
            end = (await read(await pool.clients["a"].submit(Request(f"a{n}", [1]))))[-1]
            assert isinstance(end, Finished)

    run(scene, "a", broken)


def test_metrics_count_what_passes() -> None:
    async def scene(pool: Pool) -> None:
        metrics = Metrics()
        metrics.registry.register(EngineFigures(pool))
        client = Measured(pool.clients["a"], metrics)
        events = await read(await client.submit(Request("whole", [1, 2, 3])))
        given_up = await client.submit(Request("left", [1, 2, 3]))
        while not isinstance(await anext(given_up), Tokens):
            pass
        await given_up.aclose()
        with pytest.raises(Ds4Error):
            await client.submit(Request("long", [1] * 5000))
        tokens = sum(len(event.tokens) for event in events if isinstance(event, Tokens))

        def value(name: str, **labels: str) -> float | None:
            return metrics.registry.get_sample_value(f"ds4_{name}", {"model_name": "a"} | labels)

        assert value("request_success_total", finished_reason="stop") == 1
        assert value("request_success_total", finished_reason="cancelled") == 1
        assert value("generation_tokens_total") == tokens + 1
        assert value("prompt_tokens_total") == 3
        assert value("time_to_first_token_seconds_count") == 2
        assert value("inter_token_latency_seconds_count") == tokens - 1
        assert value("engine_up") == 1
        assert value("num_requests_waiting") == 0

    run(scene, "a")
