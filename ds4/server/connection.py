"""One HTTP connection: uvicorn's, with an end to those that send or read too slowly."""

import asyncio
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 15.0  # until a request's headers are complete
READER_S = 60.0  # that a full buffer may stay full
SEND_BUFFER = 128 * 1024
MOST = 4096  # connections


class Connection(H11Protocol):
    """For uvicorn's `http` setting. Headers have a deadline, and so has a reader that stalls."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        sock = transport.get_extra_info("socket")
        if sock is not None:  # what a reader leaves lying is bounded here, and in the transport
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if len(self.connections) > MOST:
            transport.abort()
        self._deadline = self.loop.call_later(HEADERS_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(READER_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        self._forget_stall()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _forget_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
