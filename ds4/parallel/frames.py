"""Messages on a connection: a kind, a length, and JSON or an array. Never a pickle."""

import json
import socket
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

JSON, NUMBERS, BYTES, END, FAILED = range(5)  # kinds
_HEADER = struct.Struct("<ii")  # kind, bytes
_MOST = 1 << 30

Message = dict[str, Any] | NDArray[np.int32] | NDArray[np.uint8]


def packed(message: Message) -> tuple[int, bytes]:
    if isinstance(message, dict):
        return JSON, json.dumps(message).encode()
    return (NUMBERS if message.dtype == np.int32 else BYTES), message.tobytes()


def unpacked(kind: int | None, payload: bytes) -> Message | None:
    """None for kinds that carry no message."""
    if kind == JSON:
        said: dict[str, Any] = json.loads(payload)
        return said
    if kind == NUMBERS:
        return np.frombuffer(payload, np.int32)
    return np.frombuffer(payload, np.uint8) if kind == BYTES else None


def frame(kind: int, payload: bytes = b"") -> bytes:
    return _HEADER.pack(kind, len(payload)) + payload


def receive(connection: socket.socket) -> tuple[int | None, bytes]:
    """A message; kind None if the connection has ended."""
    try:
        kind, size = _HEADER.unpack(_exactly(connection, _HEADER.size))
        if not 0 <= size <= _MOST:
            return None, b""
        return kind, _exactly(connection, size)
    except (OSError, EOFError):
        return None, b""


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = connection.recv_into(view[done:])
        if not count:
            raise EOFError
        done += count
    return bytes(data)
