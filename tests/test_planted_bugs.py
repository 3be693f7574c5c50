"""Bugs that implementers really made, planted in the reference: the oracle must notice each."""

import inspect
from typing import Any

import ds4.backends.reference.ops as ops
import numpy as np
import pytest

from ds4.config import Config
from ds4.runner import Runner
from ds4.weights import Checkpoint, load_weights
from tests.conftest import Case
from tests.test_model import GATE

BUGS = {
    "no overlap with the previous block": ("if ratio == 4 and block > 0:", "if False:"),
    "no sink": (
        "logits, w.attn_sink[:, None]",
        "logits, np.full_like(w.attn_sink[:, None], -np.inf)",
    ),
    "entry visible one token early": (
        "np.arange((pos + 1) // w.ratio)",
        "np.arange((pos + 2) // w.ratio)",
    ),
    "window one short": ("pos - window + 1", "pos - window + 2"),
    "inverse rope dropped": ("-angle if inverse else angle", "0 * angle if inverse else angle"),
    "shared expert unclamped": (
        "times(swiglu(times(x, w.w1), times(x, w.w3), limit)",
        "times(swiglu(times(x, w.w1), times(x, w.w3), np.inf)",
    ),
    "hyper-connection matrix transposed": ("comb.swapaxes(1, 2) @ h", "comb @ h"),
}


def planted(right: str, wrong: str) -> Any:
    source = inspect.getsource(ops)
    assert source.count(right) == 1, f"the reference no longer says {right!r}"
    module: dict[str, Any] = {"__name__": "planted", "__package__": ops.__package__}
    exec(source.replace(right, wrong), module)
    return module["Reference"](cache="exact")


def error(be: Any, case: Case) -> float:
    cfg = Config.from_file(case.folder / "config.json")
    weights = load_weights(be, cfg, Checkpoint(case.folder))
    logits = Runner(be, cfg, weights, context=64).run({0: case.ids}, every_row=True)
    return float(np.abs(logits - case.want).max())


@pytest.mark.parametrize("bug", BUGS)
def test_the_oracle_notices(bug: str, blocky: Case) -> None:
    assert error(planted(*BUGS[bug]), blocky) > 100 * GATE


def test_without_a_bug_it_agrees(blocky: Case) -> None:
    assert (
        error(planted("if ratio == 4 and block > 0:", "if ratio == 4 and block >= 1:"), blocky)
        < GATE
    )
