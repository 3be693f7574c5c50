"""The server's end of an engine's process: start it, talk to it, notice that it hangs, end it."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from ..engine.api import Stats
from . import wire

COMMAND = (sys.executable, "-m", "ds4.server.engine_process")
PING_S = 1.0
CLOSING_S = 60.0  # at least so long an engine may write what is to be kept
LOAD_STALL_S = 900.0  # loading that reports nothing for so long has come to a halt


class EngineProcess:
    """One process, from its start to its end; never started twice.

    on_message  called with what the engine says, but for pongs
    hang_s      an engine that answers nothing for so long is killed
    """

    def __init__(
        self,
        spec: wire.EngineSpec,
        on_message: Callable[[wire.FromEngine], None],
        command: Sequence[str] = COMMAND,
        hang_s: float = 120.0,
    ) -> None:
        self._spec, self._on_message = spec, on_message
        self._command, self._hang_s = tuple(command), hang_s
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._unanswered = 0  # pings since it last said anything
        self._patience = LOAD_STALL_S
        self._closing = False
        self.stats = Stats()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def run(self) -> str:
        """Start the process and stay with it until it has ended; says how it ended."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        watch = asyncio.create_task(self._watch())
        try:
            self.send(wire.Load(self._spec))
            why = await self._listen(reader)
        finally:
            watch.cancel()
            self._writer.close()
            status = await self._reap()
        return why or status

    def send(self, message: wire.ToEngine) -> None:
        """Say something, now or as soon as the engine reads. To one that is gone: no effect."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.frame(message))

    def close(self) -> None:
        """Ask it to write what is to be kept and to end."""
        self._closing = True
        self.send(wire.Close())

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    async def _listen(self, reader: asyncio.StreamReader) -> str:
        """Pass on what it says. What it did wrong, or nothing if it just went."""
        try:
            while True:
                size = wire.length(await reader.readexactly(4))
                message = wire.from_engine(await reader.readexactly(size))
                self._unanswered = 0
                if isinstance(message, wire.Ready):
                    self._patience = self._hang_s
                if isinstance(message, wire.Pong):
                    self.stats = message.stats
                else:
                    self._on_message(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            return "" if self._patience else "it hung"
        except wire.WireError as error:
            self.kill()
            return str(error)

    async def _watch(self) -> None:
        """Ping, and kill what has been silent for too long.

        Pings are counted, not seconds: a server that was itself asleep blames nobody.
        """
        serial = 0
        while True:
            await asyncio.sleep(PING_S)
            serial += 1
            self._unanswered += 1
            self.send(wire.Ping(serial))
            patience = max(self._patience, CLOSING_S if self._closing else 0.0)
            if self._unanswered * PING_S > patience:
                self._patience = 0.0
                self.kill()

    async def _reap(self) -> str:
        """Wait for its end, or bring it about."""
        assert self._process is not None
        try:
            async with asyncio.timeout(30.0 if self._closing else 5.0):
                code = await self._process.wait()
        except TimeoutError:
            self.kill()
            code = await self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
