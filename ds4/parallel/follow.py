"""Rank 0 tells each step before it runs it; the others run what they are told.

A follower makes the same runners as rank 0 does, and gives them the same steps. It draws no tokens.
"""

import itertools
import signal
import traceback
import weakref
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..backend import Backend, StepFunction
from ..errors import Ds4Error
from ..step import Step
from .crew import Follower, Lead
from .launch import join

if TYPE_CHECKING:
    from ..llm import LLM
    from ..runner import Runner

_numbers = itertools.count()


def lead(runner: "Runner", forward: StepFunction) -> StepFunction:
    """`forward`, which other processes run too if this is rank 0 of several."""
    crew = getattr(getattr(runner.be, "ranks", None), "crew", None)
    if not isinstance(crew, Lead) or not crew.tells:
        return forward
    number = next(_numbers)
    sizes = {"context": runner.context, "slots": runner.slots, "max_chunk": runner.max_chunk}
    crew.tell({"do": "make", "runner": number, **sizes})
    weakref.finalize(runner, crew.tell_later, {"do": "drop", "runner": number})

    def led(step: Step) -> Any:
        crew.tell(packed(number, _on_host(runner.be, step)))
        return forward(step)

    return led


def _on_host(be: Backend, step: Step) -> Step:
    """Tokens may still be on the device, and the others need them."""
    if isinstance(step.tokens, np.ndarray):
        return step
    return Step(be.download(step.tokens), step.slot, step.pos, step.emit, step.last, step.span)


def packed(number: int, step: Step) -> NDArray[np.int32]:
    """A step of the runner of this number as one array: sizes first, then its arrays."""
    emits = sorted(step.emit.items())
    sizes = [number, len(step.tokens), len(step.last), step.span, len(emits)]
    sizes += [x for ratio, blocks in emits for x in (ratio, len(blocks))]
    arrays = [step.tokens, step.slot, step.pos, step.last, *(b.reshape(-1) for _, b in emits)]
    return np.concatenate([np.array(sizes, np.int32), *arrays]).astype(np.int32, copy=False)


def unpacked(data: NDArray[np.int32]) -> tuple[int, Step]:
    number, tokens, rows, span, count = (int(x) for x in data[:5])
    ratios, lengths = data[5 : 5 + 2 * count].reshape(-1, 2).T.tolist() if count else ([], [])
    ends = np.cumsum([5 + 2 * count, *(3 * [tokens]), rows, *(2 * n for n in lengths)])
    parts = [data[a:b].copy() for a, b in itertools.pairwise(ends)]
    emit = dict(zip(ratios, (part.reshape(-1, 2) for part in parts[4:]), strict=True))
    return number, Step(parts[0], parts[1], parts[2], emit, parts[3], span)


def tell_model(crew: Lead, kind: str, model: Any, options: dict[str, Any]) -> None:
    """Let the others load what this process is about to load."""
    said = str(model) if kind == "load" else asdict(model)
    crew.tell({"do": kind, "model": said, "options": options})


def follow(crew: Follower) -> None:
    """Do what rank 0 says until it is over."""
    llm: LLM | None = None
    runners: dict[int, Runner] = {}
    while (message := crew.next()) is not None:
        if isinstance(message, np.ndarray):
            number, step = unpacked(message)
            runners[number].follow(step)
        elif message["do"] == "make":
            assert llm is not None
            runners[message["runner"]] = _make(llm, message)
        elif message["do"] == "drop":
            del runners[message["runner"]]
        else:
            llm = _load(message)


def _load(message: dict[str, Any]) -> "LLM":
    from .. import loader

    if message["do"] == "load":
        return loader.load(message["model"], **message["options"])
    model = loader.Synthetic(**message["model"])
    return loader.load_synthetic(model, **message["options"])


def _make(llm: "LLM", message: dict[str, Any]) -> "Runner":
    """The runner of rank 0's LLM is there already, with the first one's number."""
    from ..runner import Runner

    first = llm.runner
    sizes = {name: message[name] for name in ("context", "slots", "max_chunk")}
    if sizes == {name: getattr(first, name) for name in sizes} and not message["runner"]:
        return first
    return Runner(first.be, first.cfg, first.weights, **sizes)


def main() -> None:
    """A process of any rank but 0, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
    crew = join()
    assert isinstance(crew, Follower)
    try:
        follow(crew)
    except Ds4Error as error:
        crew.fail(str(error))
    except BaseException as error:
        traceback.print_exc()
        crew.fail(f"{type(error).__name__}: {error}")
    crew.end()
