"""An engine in a process of its own: `python -m ds4.server.engine_process FD`.

FD is one end of a socket pair, inherited; the server holds the other. The first message says what
to load. When the server is gone, however it went, this process ends.
"""

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from ..engine.api import EngineLike, QueueFull
from ..errors import Ds4Error
from ..parallel.launch import end as end_ranks
from . import wire

GRACE_S = 20.0  # to write what is to be kept, once the server has gone
REPORT_S = 0.25  # between two reports of progress

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Built:
    """An engine that can start, and what there is to know of it."""

    engine: EngineLike
    context: int
    slots: int
    vocab_size: int
    backend: str
    device: str


Build = Callable[[wire.EngineSpec, Progress], Built]


def serve(sock: socket.socket, build: Build) -> int:
    """Load what the first message says and work until the server closes. The exit status."""
    inbox: queue.SimpleQueue[wire.ToEngine | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sock, inbox), name="ds4-wire", daemon=True).start()
    first = inbox.get()
    if not isinstance(first, wire.Load):
        return 0 if first is None else 1
    built = _load(sock, first.spec, build)
    if built is None:
        return 1
    try:
        with contextlib.suppress(ConnectionError):
            _work(sock, built.engine, inbox)
    finally:
        built.engine.close()
    return 0


def _listen(sock: socket.socket, inbox: "queue.SimpleQueue[wire.ToEngine | None]") -> None:
    """Take messages as they come. When the server has gone, see to it that this process goes.

    A thread of its own, so that a step that hangs keeps no one from noticing.
    """
    try:
        while (body := wire.read_frame(sock)) is not None:
            inbox.put(wire.to_engine(body))
    except (wire.WireError, OSError) as error:
        print(f"engine: {error}", file=sys.stderr)
    inbox.put(None)
    time.sleep(GRACE_S)
    os._exit(1)


def _load(sock: socket.socket, spec: wire.EngineSpec, build: Build) -> Built | None:
    start, last = time.monotonic(), 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_S:
            last = time.monotonic()
            sock.sendall(wire.frame(wire.Loading(done, total)))

    try:
        built = build(spec, progress)
        about = built.context, built.slots, built.vocab_size, built.backend, built.device
        sock.sendall(wire.frame(wire.Ready(*about, time.monotonic() - start)))
    except ConnectionError:
        return None
    except (Ds4Error, MemoryError) as error:
        sock.sendall(wire.frame(wire.Failed(str(error) or "there is not enough memory")))
        return None
    return built


def _work(
    sock: socket.socket, engine: EngineLike, inbox: "queue.SimpleQueue[wire.ToEngine | None]"
) -> None:
    """Answer messages and step, until the server closes or is gone."""
    while True:
        busy = engine.has_work()
        while not busy or not inbox.empty():
            message = inbox.get()
            if message is None or isinstance(message, wire.Close):
                return
            answer = _obey(engine, message)
            if answer is not None:
                sock.sendall(wire.frame(answer))
            busy = busy or engine.has_work()
        brought = engine.step()
        if brought:
            sock.sendall(wire.frame(wire.events(brought)))


def _obey(engine: EngineLike, message: wire.ToEngine) -> wire.FromEngine | None:
    if isinstance(message, wire.Cancel):
        engine.cancel(message.id)
    elif isinstance(message, wire.Ping):
        return wire.Pong(message.serial, engine.stats())
    elif isinstance(message, wire.Submit):
        request = message.request
        try:
            engine.submit(request)
        except QueueFull as error:
            return wire.Rejected(request.id, str(error), error.retry_after_s)
        except Ds4Error as error:
            return wire.Rejected(request.id, str(error))
    return None


def run(build: Build) -> None:
    """The whole process, from its argument to its end."""
    # A terminal's Ctrl-C and a service manager's stop are for the server, which then says so here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing is to be said on standard output
    status = 1
    try:
        with socket.socket(fileno=int(sys.argv[-1])) as sock:
            status = serve(sock, build)
    except BaseException:
        traceback.print_exc()
    end_ranks()
    sys.stderr.flush()
    os._exit(status)  # a driver's threads, or a reader that waits, are no reason to stay


if __name__ == "__main__":
    from .build import build as build_engine

    run(build_engine)
