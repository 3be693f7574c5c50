"""A whole server over the process of a FakeEngine: `python -m tests.serve_fake '{"port": 0}'`."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from ds4.loader import find_model
from ds4.server import connection
from ds4.server.access import set_up_logging
from ds4.server.app import create_app
from ds4.server.client import ModelInfo
from ds4.server.limits import Limits
from ds4.server.metrics import Measured, Metrics
from ds4.server.pool import Pool
from ds4.server.run import Service, listen, serve
from ds4.server.security import keys_from
from ds4.server.served import ServedModel
from ds4.server.supervisor import QueueLimits, Supervisor
from ds4.server.wire import EngineSpec


def main(options: dict[str, Any]) -> None:
    set_up_logging(options.get("log", "info"))
    connection.HEADERS_S = options.get("headers_s", connection.HEADERS_S)
    connection.READER_S = options.get("reader_s", connection.READER_S)
    command = (sys.executable, "-m", "tests.engine_child", str(options.get("step_s", 0.0)))
    queue = QueueLimits(options.get("queue", 256), 10**7)
    spec = EngineSpec(slots=options.get("slots", 4))
    supervisors = [
        Supervisor(spec, ModelInfo(name, 1000), 4096, queue, command)
        for name in options.get("models", ["fake"])
    ]
    metrics, pool = Metrics(), Pool(supervisors, stay_s=options.get("stay_s", 0.1))
    file = options.get("keys")
    service = Service(
        port=options.get("port", 0),
        keys=keys_from(Path(file) if file else None),
        limits=Limits(**options.get("limits", {})),
        drain_s=options.get("drain_s", 5),
    )
    sock = listen(service)
    print(sock.getsockname()[1], flush=True)
    folder = find_model("demo")
    models = [
        ServedModel.from_folder(Measured(client, metrics), folder)
        for client in pool.clients.values()
    ]
    asyncio.run(serve(create_app(models), pool, metrics.registry, service, sock))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {})
