"""From a way of guessing that was asked for to a drafter."""

from typing import Any, Literal

from ..config import Config
from ..errors import BackendError
from ..runner import Runner
from ..weights import Checkpoint
from ..weights.load import load_drafter
from .drafter import Drafter
from .dspark import Dspark
from .lookup import Lookup
from .mtp import Mtp
from .speculate import Speculator

Speculate = Literal["off", "lookup", "mtp", "auto"]
WAYS: tuple[Speculate, ...] = ("off", "lookup", "mtp", "auto")


def speculator(runner: Runner, checkpoint: Checkpoint, way: Speculate) -> Speculator | None:
    """What `ds4.load(speculate=way)` asks for; "mtp" is the checkpoint's own drafter, of any kind.

    "auto" takes that if there is one and the backend can run it, else look-up. Raises
    CheckpointError or BackendError if "mtp" cannot be had.
    """
    if way == "off":
        return None
    if way not in WAYS:
        raise BackendError(f"speculate must be one of {', '.join(WAYS)}, not {way!r}")
    ranks: Any = getattr(runner.be, "ranks", None)
    if ranks is not None and ranks.size > 1 and not hasattr(ranks, "crew"):
        raise BackendError(
            f"{ranks.size} processes of {runner.be.name} each plan their own steps, and would not "
            "agree how many tokens to guess: leave speculate out"
        )
    can = hasattr(runner.be, "attend_block")
    if way == "mtp" and not can:
        raise BackendError(
            f"{runner.be.name} cannot run a checkpoint's own drafter yet: use speculate=lookup"
        )
    if way == "mtp" or (way == "auto" and checkpoint.drafter and can):
        return Speculator(runner, own_drafter(runner, checkpoint))
    return Speculator(runner, Lookup())


def drafter_bytes(cfg: Config, checkpoint: Checkpoint, way: Speculate) -> int | None:
    """Bytes of weights that guesses take beside the model; None if there are to be none."""
    if way == "off":
        return None
    if way == "lookup" or checkpoint.drafter is None:
        return 0
    return checkpoint.check_drafter(cfg)[1]


def own_drafter(runner: Runner, checkpoint: Checkpoint) -> Drafter:
    """The checkpoint's, loaded. Raises CheckpointError if it has none."""
    own = load_drafter(runner.be, runner.cfg, checkpoint)
    return Mtp(runner, own) if own.kind == "mtp" else Dspark(runner, own)
