"""A server on a loopback port, over the fake engine or a real one, for tests of the HTTP API."""

import contextlib
import threading
import time

import uvicorn

from ds4.loader import find_model
from ds4.server.app import create_app
from ds4.server.client import ModelInfo
from ds4.server.local import LocalClient
from ds4.server.served import ServedModel, Settings
from tests.fake_engine import FakeEngine, demo_tokenizer

TOKENIZER = demo_tokenizer()
MODEL = "deepseek-v4-flash"


@contextlib.contextmanager
def serving(engine=None, settings=None, **options):
    """(base URL, engine); `options` are those of FakeEngine."""
    engine = engine or FakeEngine(TOKENIZER, **options)
    client = LocalClient(engine, ModelInfo(MODEL, TOKENIZER.size), engine.context)
    model = ServedModel.from_folder(client, find_model("demo"))
    with listening(create_app([model], settings or Settings())) as url:
        yield url, engine
    client.close()


@contextlib.contextmanager
def listening(app):
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive(), "uvicorn did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
