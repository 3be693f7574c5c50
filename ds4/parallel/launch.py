"""Starting the processes of one host, or joining those that torchrun started."""

import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import BackendError
from .crew import Crew, Follower, Lead, Seat

LOOPBACK = "127.0.0.1"
_PORT = "DS4_CREW_PORT"
_KEY = "DS4_CREW_KEY"

_crew: Crew | None = None


def current() -> Crew | None:
    """The crew that this process belongs to; None if it is alone."""
    return _crew


def end() -> None:
    """Let the other processes end: for a process that ends without Python's own end."""
    if isinstance(_crew, Lead):
        _crew.end()


def join(gpus: int = 1, command: Sequence[str] | None = None) -> Crew | None:
    """Become one of several processes: of those in the environment, else of `gpus` that start here.

    The others run followers, or `command`, a program that is the same on every rank: those are told
    nothing. Raises BackendError if they do not come.
    """
    global _crew
    if _crew is None:
        seat = from_environment()
        if seat is None and gpus > 1:
            seat = Seat(0, gpus, 0, gpus, LOOPBACK, 0, secrets.token_hex(16))
            run = command or [sys.executable, "-m", "ds4.parallel"]
            _crew = Lead(seat, lambda port: _start(run, seat, port), tells=command is None)
        elif seat is not None and seat.rank:
            _crew = Follower(seat)
        elif seat is not None:
            _crew = Lead(seat, lambda port: [], tells=command is None)
    if gpus > 1 and _crew is not None and _crew.size != gpus:
        raise BackendError(
            f"{_crew.size} processes were started, and --gpus says {gpus}: leave it out"
        )
    return _crew


def from_environment() -> Seat | None:
    """What `join` or torchrun said to this process; None if it was started alone.

    Across hosts rank 0 listens beside torchrun's own port, on the next one.
    """
    env = os.environ
    try:
        size = int(env.get("WORLD_SIZE", "1"))
        if size < 2:
            return None
        rank, local = int(env["RANK"]), int(env.get("LOCAL_RANK", "0"))
        here = int(env.get("LOCAL_WORLD_SIZE", "1"))
        port = int(env[_PORT]) if _PORT in env else int(env["MASTER_PORT"]) + 1
        address = env["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        raise BackendError(
            f"WORLD_SIZE is set, but RANK, MASTER_ADDR or MASTER_PORT is not as it should be "
            f"({error}): start ds4 through torchrun, or unset WORLD_SIZE"
        ) from error
    key = env.get(_KEY) or env.get("TORCHELASTIC_RUN_ID", "")
    return Seat(rank, size, local, here, address, port, key)


def _start(command: Sequence[str], seat: Seat, port: int) -> list[subprocess.Popen[bytes]]:
    """Ranks 1 and up, on this host. They write nothing but errors."""
    started = []
    for rank in range(1, seat.size):
        said: dict[str, Any] = {"WORLD_SIZE": seat.size, "LOCAL_WORLD_SIZE": seat.local_size}
        said |= {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": seat.address}
        said |= {_PORT: port, _KEY: seat.key}
        env = os.environ | {name: str(value) for name, value in said.items()}
        started.append(
            subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno())
        )
    return started
