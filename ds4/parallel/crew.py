"""The processes of one model, joined by one TCP connection from each follower to rank 0.

Messages are JSON or arrays of bytes or int32, never pickles. The operating system closes the
connections of a process that dies, however it dies, so that the others know at once; a host that
vanishes is noticed by TCP's own probes within seconds. Whoever learns of it ends its process: the
main thread may hang in a sum that will never be complete.
"""

import atexit
import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import BackendError
from .frames import END, FAILED, JSON, Message, frame, packed, receive, unpacked

GRACE = 3.0  # seconds in which a process may end by itself
PATIENCE = 120.0  # seconds to wait for the others at the start


@dataclass(frozen=True)
class Seat:
    """Which of the processes this is."""

    rank: int
    size: int
    local_rank: int  # among those of this host
    local_size: int
    address: str  # of rank 0
    port: int  # where rank 0 listens; 0: any
    key: str  # strangers do not know it


class Crew:
    """This process among the others. `rank`, `size`, ... are those of its seat."""

    def __init__(self, seat: Seat) -> None:
        self.seat, self.rank, self.size = seat, seat.rank, seat.size
        self.popularity: list[list[int]] | None = None  # of each layer's experts, if it is known
        self._ending = False
        self._at_end: list[Callable[[], None]] = []

    def at_end(self, call: Callable[[], None]) -> None:
        """Call this before the process ends well; it may take GRACE seconds."""
        self._at_end.append(call)

    def lost(self, error: Exception) -> NoReturn:
        """A sum has failed: wait for the news why, which ends the process, or raise."""
        time.sleep(2 * GRACE)
        raise BackendError(f"rank {self.rank} cannot reach the others: {error}") from error

    def _wind_up(self) -> bool:
        """Whether all that was to be done at the end is done."""
        threads = [threading.Thread(target=call, daemon=True) for call in self._at_end]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GRACE)
        return not any(thread.is_alive() for thread in threads)


class Lead(Crew):
    """Rank 0. `children` are the processes that it started itself.

    `tells`: the others wait to be told what to run. Raises BackendError if they do not come.
    """

    def __init__(
        self, seat: Seat, start: Callable[[int], list[subprocess.Popen[bytes]]], tells: bool = True
    ) -> None:
        super().__init__(seat)
        self.tells = tells
        self._lock = threading.Lock()
        self._later: deque[dict[str, Any]] = deque()
        with socket.create_server((seat.address, seat.port), backlog=seat.size) as listener:
            self.children = start(listener.getsockname()[1])
            try:
                self._others = _accept(listener, seat, self.children)
            except BaseException:
                self._kill()
                raise
        atexit.register(self.end)
        for rank, connection in self._others.items():
            threading.Thread(target=self._listen, args=(rank, connection), daemon=True).start()

    def tell(self, *messages: Message) -> None:
        """Send messages to every other process, with none between them."""
        while self._later:
            self._send(*packed(self._later.popleft()))
        for message in messages:
            self._send(*packed(message))

    def tell_later(self, message: dict[str, Any]) -> None:
        """Send it before the next message: safe where another may be on its way."""
        self._later.append(message)

    def end(self) -> None:
        """Let the others end, and wait for those that this process started."""
        if self._ending:
            return
        self._ending = True
        failed = _failed()
        self._send(FAILED if failed else END)
        well = not failed and self._wind_up()
        deadline = time.monotonic() + GRACE
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
        self._kill()
        if not well:  # what is left of the sums may hang at the interpreter's end
            _leave(int(failed))

    def _send(self, kind: int, payload: bytes = b"") -> None:
        data = frame(kind, payload)
        with self._lock:
            for connection in self._others.values():
                with contextlib.suppress(OSError):  # its listener tells why
                    connection.sendall(data)

    def _listen(self, rank: int, connection: socket.socket) -> None:
        """Until the rank ends: what it has to say is why."""
        kind, payload = receive(connection)
        if self._ending or kind == END:
            return
        said = f": {payload.decode(errors='replace')}" if kind == FAILED else " has died"
        self._fail(f"rank {rank}{said}" + ("" if kind == FAILED else ", and the others end too"))

    def _fail(self, text: str) -> NoReturn:
        self._ending = True
        _say(text)
        with contextlib.suppress(BaseException):
            self._send(FAILED)
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE / 3)
        self._kill()
        os._exit(1)

    def _kill(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()


class Follower(Crew):
    """Any other rank."""

    def __init__(self, seat: Seat) -> None:
        super().__init__(seat)
        self._lead = _connect(seat)
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self._leave)

    def next(self) -> Message | None:
        """The next message of rank 0; None: it is over."""
        return self._messages.get()

    def fail(self, text: str) -> NoReturn:
        """Tell rank 0, which tells the user, why this process ends."""
        self._ending = True
        payload = " ".join(text.split()).encode()
        with contextlib.suppress(OSError):
            self._lead.sendall(frame(FAILED, payload))
        os._exit(1)

    def end(self) -> NoReturn:
        """Leave at once: there is nothing to keep."""
        self._ending = True
        self._wind_up()
        _leave(0)

    def _leave(self) -> None:
        """The interpreter ends: by an error, or as the others' programs do."""
        if _failed():
            self.fail(repr(sys.last_value))
        with contextlib.suppress(OSError):
            self._lead.sendall(frame(END))
        while self.next() is not None:
            pass
        self.end()

    def _listen(self) -> None:
        while True:
            kind, payload = receive(self._lead)
            if (message := unpacked(kind, payload)) is not None:
                self._messages.put(message)
            else:
                break
        if kind == END:
            self._messages.put(None)
            time.sleep(GRACE)  # the main thread may hang in a sum
            os._exit(0)
        first_here = self.seat.local_rank == 0 or self.rank == 1
        if kind is None and not self._ending and first_here:
            _say("rank 0 has died, and the others end too")
        os._exit(1)


def _accept(
    listener: socket.socket, seat: Seat, children: list[subprocess.Popen[bytes]]
) -> dict[int, socket.socket]:
    """A connection from every other rank."""
    found: dict[int, socket.socket] = {}
    deadline = time.monotonic() + PATIENCE
    listener.settimeout(0.5)
    while len(found) < seat.size - 1:
        if any(child.poll() is not None for child in children):
            raise BackendError("a process of another rank ended before it could be joined")
        if time.monotonic() > deadline:
            missing = ", ".join(str(r) for r in range(1, seat.size) if r not in found)
            raise BackendError(f"rank {missing} did not come within {PATIENCE:.0f} s")
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        rank = _greeting(connection, seat)
        if rank is None or rank in found:
            connection.close()
            continue
        found[rank] = connection
    return found


def _greeting(connection: socket.socket, seat: Seat) -> int | None:
    """The rank of who knocks; None for strangers."""
    connection.settimeout(GRACE)
    kind, payload = receive(connection)
    try:
        said = json.loads(payload) if kind == JSON else {}
        rank, ours = int(said["rank"]), (said["key"], said["size"]) == (seat.key, seat.size)
    except (ValueError, TypeError, KeyError):
        return None
    if not ours or not 0 < rank < seat.size:
        return None
    _watch(connection)
    return rank


def _connect(seat: Seat) -> socket.socket:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection = socket.create_connection((seat.address, seat.port), timeout=GRACE)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                where = f"{seat.address}:{seat.port}"
                raise BackendError(f"rank 0 does not answer at {where}: {error}") from error
            time.sleep(0.2)
    _watch(connection)
    hello = json.dumps({"rank": seat.rank, "size": seat.size, "key": seat.key}).encode()
    connection.sendall(frame(JSON, hello))
    return connection


def _watch(connection: socket.socket) -> None:
    """No delay, and probes that find a dead host within four seconds where that can be set."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 4000}
    for name, value in seconds.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _failed() -> bool:
    """Whether the interpreter ends because of an error that nobody caught."""
    return getattr(sys, "last_value", None) is not None


def _leave(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _say(text: str) -> None:
    """One line on standard error, whatever the main thread is doing."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: {text}\n".encode())
