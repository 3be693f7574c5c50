"""From settings to a server that runs."""

import asyncio
import contextlib
import logging
import socket
from pathlib import Path

from ..errors import ConfigError
from . import run, served
from .app import create_app
from .build import describe
from .metrics import Measured, Metrics
from .pool import Pool
from .security import keys_from
from .settings import Settings
from .supervisor import Supervisor
from .tracing import Traces
from .watts import open_watts

log = logging.getLogger("ds4.server")


def serve(settings: Settings) -> None:
    """Listen, load the first model and answer until a signal ends it. Raises Ds4Error."""
    service = _service(settings)
    models = _models(settings)
    metrics, pool = Metrics(), Pool([supervisor for supervisor, _ in models])
    with contextlib.ExitStack() as stack:
        traces = Traces() if settings.traces else None
        if traces is not None:
            stack.callback(traces.close)
        watts = stack.enter_context(open_watts(settings.power, lambda: pool.active.in_engine))
        metrics.registry.register(watts)
        sock = stack.enter_context(run.listen(service))
        wishes = served.Settings(client_sampling=settings.client_sampling, timings=watts.share)
        clients = [Measured(each, metrics, traces) for each in pool.clients.values()]
        api = create_app(
            [
                served.ServedModel.from_folder(client, folder)
                for client, (_, folder) in zip(clients, models, strict=True)
            ],
            wishes,
        )
        names = ", ".join(pool.clients)
        log.info("ds4 listens on %s, serving %s", _address(sock), names)
        layered = traces.layer(api) if traces is not None else api
        asyncio.run(run.serve(layered, pool, metrics.registry, service, sock))


def _service(settings: Settings) -> run.Service:
    file = settings.api_key_file
    return run.Service(
        host=settings.host,
        port=settings.port,
        keys=keys_from(Path(file).expanduser() if file else None),
        hosts=settings.hosts,
        limits=settings.limits,
        drain_s=settings.drain_s,
    )


def _models(settings: Settings) -> list[tuple[Supervisor, Path]]:
    """Each with the folder of its tokenizer. Raises Ds4Error for what cannot be served."""
    found = []
    for entry in settings.models:
        spec = entry.spec(settings.queue)
        known = describe(spec, entry.name)
        queue, hang_s = settings.queue_limits, settings.hang_s
        supervisor = Supervisor(spec, known.model, known.context, queue, hang_s=hang_s)
        found.append((supervisor, known.folder))
    names = [supervisor.model.name for supervisor, _ in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"two models have one name: {', '.join(names)}; give each its own")
    return found


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
