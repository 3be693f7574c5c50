"""The engine in its own process: what happens to requests when it dies, hangs or cannot start."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest

from ds4.engine.api import Event, Finished, Grammar, Progress, QueueFull, Request, Tokens
from ds4.errors import Ds4Error, PromptError
from ds4.sampler import SamplingParams, TokenLogprob
from ds4.server import process, supervisor, wire
from ds4.server.client import EngineLost, ModelInfo
from ds4.server.supervisor import QueueLimits, Supervisor

from .engine_child import POISON, TRAP

FAKE = (sys.executable, "-m", "tests.engine_child")
MODEL = ModelInfo("fake", 1000)


def request(name: str, *prompt: int, **options: object) -> Request:
    return Request(name, prompt or (1, 2, 3), SamplingParams(**options))


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_S", 0.01)


def run(
    scene: Callable[[Supervisor], Awaitable[None]], step_s: float = 0.0, **options: object
) -> None:
    async def play() -> None:
        spec = wire.EngineSpec(slots=2)
        supervisor = Supervisor(spec, MODEL, 4096, command=(*FAKE, str(step_s)), **options)
        try:
            await asyncio.wait_for(scene(supervisor), 60)
        finally:
            await supervisor.stop()

    asyncio.run(play())


async def read(stream: object) -> list[Event]:
    return [event async for event in stream]


def test_an_engine_that_hangs_does_not_keep_the_server_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "CLOSING_S", 0.3)
    monkeypatch.setattr(process, "PING_S", 0.1)

    async def scene(supervisor: Supervisor) -> None:
        supervisor.start()
        await supervisor.until_ready()
        await supervisor.submit(request("a", TRAP))
        await asyncio.sleep(0.2)  # it is in its step
        await asyncio.wait_for(supervisor.stop(), 30)

    run(scene, hang_s=1.0)


def test_what_the_server_cannot_say_is_no_endless_wait() -> None:
    """A name that is no UTF-8 cannot be sent."""

    async def scene() -> None:
        lost = Supervisor(wire.EngineSpec(model="\udcff"), MODEL, 4096, command=FAKE)
        lost.start()
        with pytest.raises(Ds4Error, match="3 engines ended"):
            await asyncio.wait_for(lost.until_ready(), 60)
        await lost.stop()

    asyncio.run(scene())


def test_messages_survive_the_wire() -> None:
    grammar = Grammar("regex", "a+")
    params = SamplingParams(logit_bias={5: 1.0}, stop=("x",), seed=7)
    sent = Request("a", [1, 2], params, 1, grammar)
    got = wire.to_engine(wire.frame(wire.Submit(sent))[4:])
    assert isinstance(got, wire.Submit)
    assert got.request.prompt == [1, 2]
    assert got.request.grammar == grammar
    assert got.request.params.logit_bias == {5: 1.0}
    told = [
        Progress("a", 1, 2, 0),
        Tokens("a", [1], "x", [TokenLogprob(1, -1.0, ((1, -1.0),))]),
        Finished("a", "stop", 2, 0, 1),
    ]
    back = wire.from_engine(wire.frame(wire.events(told))[4:])
    assert [wrapped.event for wrapped in back.events] == told


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x92\xa6Events\x90",  # not for an engine
        wire.frame(wire.Ping(1))[4:-1],
        b"\x91" * 100_000,
        wire.frame(wire.Ping(1)).replace(b"\x01", b"\xa1"),
        wire.frame(wire.Submit(request("a", temperature=1.0)))[4:].replace(
            b"temperature\xcb\x3f\xf0", b"temperature\xcb\xbf\xf0"
        ),
    ],
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.to_engine(body)


def test_frames_are_limited() -> None:
    with pytest.raises(wire.WireError):
        wire.length(b"\xff\xff\xff\xff")
    with pytest.raises(wire.WireError):
        wire.frame(wire.Cancel("x" * (wire.MAX_FRAME + 1)))


def test_requests_wait_for_the_engine_and_are_answered() -> None:
    async def scene(supervisor: Supervisor) -> None:
        early = await supervisor.submit(request("early"))
        assert not supervisor.ready
        supervisor.start()
        events = await read(early)
        assert isinstance(events[0], Progress)
        assert isinstance(events[-1], Finished)
        assert sum(len(e.tokens) for e in events if isinstance(e, Tokens)) > 0
        assert supervisor.about is not None
        assert supervisor.about.slots == 2
        many = [await supervisor.submit(request(f"r{n}", n + 1)) for n in range(20)]
        ends = [(await read(stream))[-1] for stream in many]
        assert [end.id for end in ends] == [f"r{n}" for n in range(20)]
        assert supervisor.in_engine == 0

    run(scene)


def test_a_killed_engine_loses_what_had_begun_and_nothing_else() -> None:
    async def scene(supervisor: Supervisor) -> None:
        supervisor.start()
        begun = await supervisor.submit(request("begun"))
        while not isinstance(await anext(begun), Tokens):
            pass
        waiting = [await supervisor.submit(request(f"w{n}")) for n in range(6)]
        first = supervisor.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        with pytest.raises(EngineLost, match="SIGKILL"):
            await read(begun)
        ends = [await asyncio.gather(read(s), return_exceptions=True) for s in waiting]
        lost = [end for (end,) in ends if isinstance(end, EngineLost)]
        assert len(lost) <= 1  # the one in the other slot, if it had begun
        assert sum(isinstance(end[-1], Finished) for (end,) in ends if isinstance(end, list)) >= 5
        assert supervisor.pid != first
        assert supervisor.restarts == 1
        assert supervisor.in_engine == supervisor.held == 0

    run(scene, step_s=0.02)


def test_a_request_that_kills_engines_is_given_up() -> None:
    async def scene(supervisor: Supervisor) -> None:
        supervisor.start()
        poison = await supervisor.submit(request("poison", POISON))
        with pytest.raises(EngineLost, match="exit status 3"):
            await read(poison)
        healthy = await supervisor.submit(request("healthy"))
        assert isinstance((await read(healthy))[-1], Finished)

    run(scene)


def test_an_engine_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PING_S", 0.1)
    monkeypatch.setattr(supervisor, "TRIES", 1)

    async def scene(kept: Supervisor) -> None:
        kept.start()
        with pytest.raises(EngineLost, match="it hung"):
            await read(await kept.submit(request("trap", TRAP)))

    run(scene, hang_s=0.5)


def test_the_queue_is_bounded() -> None:
    async def scene(supervisor: Supervisor) -> None:
        kept = [await supervisor.submit(request("a", *range(50)))]
        kept.append(await supervisor.submit(request("b")))
        with pytest.raises(QueueFull) as full:
            await supervisor.submit(request("tokens", *range(60)))
        assert full.value.retry_after_s >= 1
        kept.append(await supervisor.submit(request("c")))
        with pytest.raises(QueueFull):
            await supervisor.submit(request("requests"))
        with pytest.raises(PromptError, match="4096"):
            await supervisor.submit(request("long", *range(4096)))
        assert (await supervisor.stats()).waiting == 3
        for stream in kept:
            await stream.aclose()
        assert (await supervisor.stats()).waiting == 0
        assert await read(kept[0]) == []

    run(scene, limits=QueueLimits(3, 100))


def test_a_cancelled_request_frees_its_slot_and_tells_no_more() -> None:
    async def scene(supervisor: Supervisor) -> None:
        supervisor.start()
        streams = [await supervisor.submit(request(f"r{n}")) for n in range(2)]
        for stream in streams:
            await anext(stream)
            await stream.aclose()
        assert isinstance((await read(await supervisor.submit(request("next"))))[-1], Finished)
        await supervisor.until_idle()
        assert [await read(stream) for stream in streams] == [[], []]

    run(scene, step_s=0.05)


def test_a_model_that_cannot_be_loaded_is_named() -> None:
    async def play() -> None:
        supervisor = Supervisor(wire.EngineSpec("missing"), MODEL, 4096, command=FAKE)
        supervisor.start()
        with pytest.raises(Ds4Error, match="no model is called 'missing'"):
            await asyncio.wait_for(supervisor.until_ready(), 60)
        await supervisor.stop()

    asyncio.run(play())


def test_the_engine_ends_with_the_server() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen([*FAKE, "0", str(theirs.fileno())], pass_fds=[theirs.fileno()])
    with child, ours:
        ours.sendall(wire.frame(wire.Load(wire.EngineSpec())))
        while not isinstance(wire.from_engine(wire.read_frame(ours) or b""), wire.Ready):
            pass
        ours.close()
        assert child.wait(60) == 0


def test_an_engine_refuses_what_is_no_message() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen(
            [*FAKE, "0", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
    with child, ours:
        ours.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert child.stderr is not None
        assert "is announced" in child.stderr.read()
        assert child.wait(60) == 0
