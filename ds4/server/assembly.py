"""From settings to a server that runs."""

import asyncio
import logging
from pathlib import Path

from ..errors import ConfigError
from . import app, run, served
from .build import describe
from .metrics import Measured, Metrics
from .pool import Pool
from .security import keys_from
from .settings import Settings
from .supervisor import Supervisor
from .watts import open_watts

log = logging.getLogger("ds4.server")


def serve(settings: Settings) -> None:
    """Listen, load the first model and answer until a signal ends it. Raises Ds4Error."""
    file = settings.api_key_file
    service = run.Service(
        host=settings.host,
        port=settings.port,
        keys=keys_from(Path(file).expanduser() if file else None),
        hosts=settings.hosts,
        limits=settings.limits,
        drain_s=settings.drain_s,
    )
    supervisors, folders = [], []
    for entry in settings.models:
        spec = entry.spec(settings.queue)
        known = describe(spec, entry.name)
        made = Supervisor(
            spec, known.model, known.context, settings.queue_limits, hang_s=settings.hang_s
        )
        supervisors.append(made)
        folders.append(known.folder)
    names = [each.model.name for each in supervisors]
    if len(set(names)) < len(names):
        raise ConfigError(f"two models have one name: {', '.join(names)}; give each its own")
    metrics, pool = Metrics(), Pool(supervisors)
    clients = [Measured(pool.clients[name], metrics) for name in names]
    models = [
        served.ServedModel.from_folder(client, folder)
        for client, folder in zip(clients, folders, strict=True)
    ]
    with (
        open_watts(settings.power, lambda: pool.active.in_engine) as watts,
        run.listen(service) as sock,
    ):
        metrics.registry.register(watts)
        told = watts.share if settings.power != ("none",) else None
        api = app.create_app(
            models, served.Settings(client_sampling=settings.client_sampling, timings=told)
        )
        host, port = sock.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("ds4 listens on %s, serving %s", address, ", ".join(names))
        asyncio.run(run.serve(api, pool, metrics.registry, service, sock))
