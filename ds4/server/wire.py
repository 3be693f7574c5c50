"""What the server and its engine's process say to each other, over a socket that only they hold.

A message is four bytes of length, then msgpack of a fixed schema. Nothing in it is code, a path to
code or a class name: a frame that does not fit the schema, or is too long, raises WireError.
"""

import socket
import struct
from collections.abc import Sequence
from typing import Literal, TypeVar

import msgspec

from ..engine.api import Event, Finished, Progress, Request, Stats, Tokens
from ..errors import Ds4Error

MAX_FRAME = 64 * 2**20  # a prompt of a million tokens and a schema are a tenth of it
T = TypeVar("T")
_LENGTH = struct.Struct(">I")


class WireError(Ds4Error):
    """The other side sent what is no message: a bug, or a different version."""


class ModelSpec(msgspec.Struct, frozen=True):
    """A model and how it is to run.

    model              what loader.load takes; with `synthetic`, whose shapes random weights get
    context            tokens of prompt and answer; None: the loader's choice
    slots              sequences that run at once; None: what memory has room for
    snapshot_mib       memory for prefixes that no slot holds, MiB
    snapshot_dir       a folder where they outlive the process; None: nowhere
    snapshot_disk_mib  how much of it they may fill, MiB
    gpus, gpu_memory, speculate  as in loader.load
    """

    model: str = "demo"
    backend: str = "auto"
    device: str = "auto"
    cache: Literal["native", "exact"] = "native"
    context: int | None = None
    slots: int | None = None
    synthetic: bool = False
    recipe: str = "native"
    unique_layers: int | None = None
    routing: Literal["uniform", "skewed"] = "uniform"
    snapshot_mib: int = 1024
    snapshot_dir: str | None = None
    snapshot_disk_mib: int = 16_384
    gpus: int = 1
    gpu_memory: str | None = None
    speculate: Literal["off", "lookup", "mtp", "auto"] = "off"


class EngineSpec(ModelSpec, frozen=True):
    """What an engine's process is told first. `max_waiting` requests may wait in it."""

    max_waiting: int = 256


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


class Load(_Message, frozen=True):
    """First of all: load this."""

    spec: EngineSpec


class Submit(_Message, frozen=True):
    request: Request


class Cancel(_Message, frozen=True):
    id: str


class Ping(_Message, frozen=True):
    serial: int


class Close(_Message, frozen=True):
    """Write what is to be kept, and end."""


class Loading(_Message, frozen=True):
    """Bytes of weights that are loaded, of all."""

    done: int
    total: int


class Ready(_Message, frozen=True):
    context: int
    slots: int
    vocab_size: int
    backend: str
    device: str
    seconds: float  # it took so long to load


class Failed(_Message, frozen=True):
    """The model cannot be loaded."""

    message: str


class Rejected(_Message, frozen=True):
    """The engine did not take a request; for good if there is no time to try again."""

    id: str
    message: str
    retry_after_s: float | None = None


class Pong(_Message, frozen=True):
    serial: int
    stats: Stats


class ProgressEvent(_Message, frozen=True):
    event: Progress


class TokensEvent(_Message, frozen=True):
    event: Tokens


class FinishedEvent(_Message, frozen=True):
    event: Finished


class Events(_Message, frozen=True):
    """What one step brought, in order."""

    events: list[ProgressEvent | TokensEvent | FinishedEvent]


ToEngine = Load | Submit | Cancel | Ping | Close
FromEngine = Loading | Ready | Failed | Rejected | Pong | Events
_WRAP = {Progress: ProgressEvent, Tokens: TokensEvent, Finished: FinishedEvent}

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def events(brought: Sequence[Event]) -> Events:
    """A step's events as a message."""
    return Events([_WRAP[type(event)](event) for event in brought])


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message as bytes, length first. Raises WireError if it is too long to be taken."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise WireError(f"a message of {len(body)} bytes is longer than {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


def length(header: bytes) -> int:
    """The length that a frame's first four bytes announce. Raises WireError if it is too long."""
    (size,) = _LENGTH.unpack(header)
    if size > MAX_FRAME:
        raise WireError(f"a message of {size} bytes is announced: at most {MAX_FRAME} are taken")
    return int(size)


def to_engine(body: bytes) -> ToEngine:
    """Raises WireError if that is no message for an engine."""
    return _decode(_to_engine, body)


def from_engine(body: bytes) -> FromEngine:
    """Raises WireError if that is no message of an engine."""
    return _decode(_from_engine, body)


def _decode(decoder: "msgspec.msgpack.Decoder[T]", body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, Ds4Error, RecursionError) as error:
        raise WireError(f"not a message of this version: {error}") from error


def read_frame(sock: socket.socket) -> bytes | None:
    """The next frame of a blocking socket; None if the other side has gone."""
    header = _read(sock, _LENGTH.size)
    return None if header is None else _read(sock, length(header))


def _read(sock: socket.socket, size: int) -> bytes | None:
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    while done < size:
        try:
            got = sock.recv_into(view[done:])
        except ConnectionError:
            return None
        if not got:
            return None
        done += got
    return bytes(buffer)
