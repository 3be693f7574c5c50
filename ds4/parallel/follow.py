"""Rank 0 tells each step before it runs it; the others run what they are told.

A follower makes the same runners as rank 0 does, and gives them the same steps. It draws no tokens.
"""

import itertools
import signal
import traceback
import weakref
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import Ds4Error
from ..step import Step
from .crew import Follower, Lead
from .launch import join

if TYPE_CHECKING:
    from ..llm import LLM
    from ..runner import Runner

_numbers = itertools.count()


class Led:
    """A runner whose steps, and whatever else changes its caches, the other processes repeat."""

    def __init__(self, runner: "Runner", crew: Lead) -> None:
        self._crew, self._ranks = crew, runner.be.ranks  # type: ignore[attr-defined]
        self._number = next(_numbers)
        sizes = {"context": runner.context, "slots": runner.slots, "max_chunk": runner.max_chunk}
        crew.tell({"do": "make", "runner": self._number, **sizes})
        weakref.finalize(runner, crew.tell_later, {"do": "drop", "runner": self._number})

    def step(self, step: Step, drafting: bool = False) -> Step:
        """Tell a step that is about to be run, of the model or of its drafter.

        Tokens on the device go from there to the others.
        """
        here = isinstance(step.tokens, np.ndarray)
        told = step if here else replace(step, tokens=np.zeros(len(step.tokens), np.int32))
        self._crew.tell(packed(self._number, told, not here, drafting))
        return step if here else replace(step, tokens=self._ranks.from_first(step.tokens))

    def change(self, name: str, at: Sequence[int], data: NDArray[np.uint8] | None = None) -> None:
        """Tell a function of engine/snapshot.py that is about to be called."""
        message = {"do": "change", "runner": self._number, "name": name, "at": list(at)}
        self._crew.tell(message | {"data": data is not None}, *([] if data is None else [data]))


def lead(runner: "Runner") -> Led | None:
    """Set if this is rank 0 of several processes that run the model."""
    crew = getattr(getattr(runner.be, "ranks", None), "crew", None)
    return Led(runner, crew) if isinstance(crew, Lead) and crew.tells else None


class Told(NamedTuple):
    """A step of the runner of this number."""

    number: int
    step: Step
    ahead: bool  # its tokens come from rank 0's device
    drafting: bool  # it is the drafter's


def packed(
    number: int, step: Step, ahead: bool = False, drafting: bool = False
) -> NDArray[np.int32]:
    """What is `Told` as one array: sizes first, then the step's arrays."""
    emits = sorted(step.emit.items())
    sizes = [number, ahead + 2 * drafting, len(step.tokens), len(step.slot)]
    sizes += [len(step.last), step.span, len(emits)]
    sizes += [x for ratio, blocks in emits for x in (ratio, len(blocks))]
    arrays = [step.tokens, step.slot, step.pos, step.last, *(b.reshape(-1) for _, b in emits)]
    return np.concatenate([np.array(sizes, np.int32), *arrays]).astype(np.int32, copy=False)


def unpacked(data: NDArray[np.int32]) -> Told:
    number, flags, tokens, rows, last, span, count = (int(x) for x in data[:7])
    start = 7 + 2 * count
    ratios, lengths = data[7:start].reshape(-1, 2).T.tolist() if count else ([], [])
    ends = np.cumsum([start, tokens, rows, rows, last, *(2 * n for n in lengths)])
    parts = [data[a:b].copy() for a, b in itertools.pairwise(ends)]
    emit = dict(zip(ratios, (part.reshape(-1, 2) for part in parts[4:]), strict=True))
    step = Step(parts[0], parts[1], parts[2], emit, parts[3], span)
    return Told(number, step, bool(flags & 1), bool(flags & 2))


def tell_model(crew: Lead, kind: str, model: Any, options: dict[str, Any]) -> None:
    """Let the others load what this process is about to load, and share it out alike."""
    said = str(model) if kind == "load" else asdict(model)
    crew.tell({"do": kind, "model": said, "options": options, "popularity": crew.popularity})


def follow(crew: Follower) -> None:
    """Do what rank 0 says until it is over."""
    from ..engine import snapshot

    llm: LLM | None = None
    own: Runner | None = None  # of the LLM, as long as rank 0 has not made that
    runners: dict[int, Runner] = {}
    while (message := crew.next()) is not None:
        if isinstance(message, np.ndarray):
            _run(runners, message)
        elif message["do"] == "change":
            data = [crew.next()] if message["data"] else []
            change = getattr(snapshot, message["name"])
            change(runners[message["runner"]], *message["at"], *data)
        elif message["do"] == "make":
            assert llm is not None
            runners[message["runner"]], own = _make(llm, own, message), None
        elif message["do"] == "drop":
            del runners[message["runner"]]
        else:
            crew.popularity = message["popularity"]
            llm = _load(message)
            own = llm.runner


def _run(runners: "dict[int, Runner]", message: NDArray[Any]) -> None:
    told = unpacked(message)
    runner, step = runners[told.number], told.step
    if told.ahead:
        ranks = runner.be.ranks  # type: ignore[attr-defined]
        step = replace(step, tokens=ranks.from_first(runner.be.upload(step.tokens)))
    if told.drafting:
        assert runner.drafter is not None
        runner.drafter.follow(step)
    else:
        runner.follow(step)


def _load(message: dict[str, Any]) -> "LLM":
    from .. import loader

    if message["do"] == "load":
        return loader.load(message["model"], **message["options"])
    model = loader.Synthetic(**message["model"])
    return loader.load_synthetic(model, **message["options"])


def _make(llm: "LLM", own: "Runner | None", message: dict[str, Any]) -> "Runner":
    """The first one that rank 0 makes after it loaded a model is its LLM's, which is here, too."""
    from ..runner import Runner

    first = llm.runner
    sizes = {name: message[name] for name in ("context", "slots", "max_chunk")}
    if own is not None and sizes == {name: getattr(own, name) for name in sizes}:
        return own
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
