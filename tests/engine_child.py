"""The process of a FakeEngine: `python -m tests.engine_child [STEP_S] FD`.

The prompt [POISON] ends the process, [TRAP] makes its step hang, and [LONG] is
answered at length.
"""

import os
import sys
import time

from ds4.engine.api import Event, Request
from ds4.errors import ModelNotFound
from ds4.server.engine_process import Built, Progress, run
from ds4.server.wire import EngineSpec

from .fake_engine import FakeEngine

POISON, TRAP, LONG = 66, 67, 68


class Child(FakeEngine):
    def submit(self, request: Request) -> None:
        self.reply = (lambda _: [500] * 3900) if list(request.prompt) == [LONG] else None
        super().submit(request)
        self.requests.clear()  # a soak test would only measure this list

    def step(self) -> list[Event]:
        events = super().step()
        running = [list(s.request.prompt) for s in self._running.values()]
        if [POISON] in running:
            os._exit(3)
        if [TRAP] in running:
            time.sleep(3600)
        return events


def build(spec: EngineSpec, progress: Progress) -> Built:
    if spec.model == "missing":
        raise ModelNotFound("no model is called 'missing'")
    if spec.model == "crashing":
        os._exit(9)
    progress(1, 2)
    step = float(sys.argv[1]) if len(sys.argv) > 2 else 0.0
    context = spec.context or 4096
    engine = Child(slots=spec.slots or 4, max_waiting=100_000, context=context, step_s=step)
    return Built(engine, context, engine.slots, engine.tokenizer.size, "fake", "cpu")


if __name__ == "__main__":
    run(build)
