"""The server's process, from its socket to its end: layers, signals, drain."""

import asyncio
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

import uvicorn
from prometheus_client import CollectorRegistry

from ..errors import Ds4Error
from . import connection
from .access import AccessLog
from .answers import App
from .limits import Limiter, Limits
from .metrics import EngineFigures
from .operations import Operations
from .pool import Pool
from .security import Guard, Hosts, Keys, check_exposure

log = logging.getLogger("ds4.server")

LAST_WORDS_S = 5  # for streams to say that they end, when the time to drain is over


class ListenError(Ds4Error):
    """The address is not to be had."""


@dataclass(frozen=True)
class Service:
    """Where and for whom the server works.

    drain_s  seconds that requests may go on after it was told to end
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys = field(default_factory=Keys)
    hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    drain_s: float = 30.0


def listen(service: Service) -> socket.socket:
    """A socket that takes connections, which are answered once `serve` runs.

    Raises SecurityError or ListenError.
    """
    check_exposure(service.host, service.keys)
    host = service.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, service.port))
        sock.listen(1024)
    except (OSError, OverflowError) as error:
        sock.close()
        raise ListenError(
            f"cannot listen on {service.host}:{service.port}: "
            f"{getattr(error, 'strerror', None) or error}; choose another --port or --host"
        ) from error
    return sock


async def serve(
    api: App, pool: Pool, registry: CollectorRegistry, service: Service, sock: socket.socket
) -> None:
    """Answer requests until a signal ends it. Raises Ds4Error if the model cannot be loaded."""
    _allow_files(2 * connection.MOST)
    registry.register(EngineFigures(pool))
    limiter = Limiter(Operations(api, pool, registry), service.limits, pool.full)
    guarded = Guard(limiter, service.keys, Hosts(service.host, service.hosts))
    server = _Server(AccessLog(guarded), limiter, pool, service)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _on_hangup(service.keys, server))
    await pool.start()
    loading = asyncio.create_task(_first_load(pool, server))
    try:
        await server.serve(sockets=[sock])
        if loading.done():
            loading.result()
    finally:
        loading.cancel()
        await pool.stop()


def _allow_files(wanted: int) -> None:
    """As many open files as connections may need; a shell's default is often 256 or 1024."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY:
        wanted = min(wanted, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


async def _first_load(pool: Pool, server: "_Server") -> None:
    """A model that cannot be loaded at all is the end; later on, it is tried again."""
    try:
        await pool.active.until_ready()
    except Ds4Error:
        server.should_exit = True
        raise


def _on_hangup(keys: Keys, server: "_Server") -> Callable[[], None]:
    """What SIGHUP does: where the terminal was closed it ends the server, else keys are read again.

    Not so under nohup. A service manager's reload is no hangup either: it has no terminal.
    """
    ends = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()

    def hangup() -> None:
        if ends and not _has_terminal():
            server.handle_exit(signal.SIGHUP, None)
        else:
            _reload(keys)

    return hangup


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _reload(keys: Keys) -> None:
    try:
        keys.reload()
        log.info("the API keys were read again")
    except Ds4Error as error:
        log.error("%s; the keys stay as they were", error)


class _Server(uvicorn.Server):
    """uvicorn, told to end in two steps: the first signal drains, the second ends at once."""

    def __init__(self, app: App, limiter: Limiter, pool: Pool, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=connection.Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=64 * 1024,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=int(service.drain_s) + LAST_WORDS_S,
                backlog=1024,
            )
        )
        self._limiter, self._pool, self._drain_s = limiter, pool, service.drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            self._pool.kill()
        self.should_exit = self._limiter.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        enough = asyncio.create_task(self._end_late_requests())
        try:
            await super().shutdown(sockets)
        finally:
            enough.cancel()

    async def _end_late_requests(self) -> None:
        await asyncio.sleep(self._drain_s)
        self._pool.end_all("the server is ending")
