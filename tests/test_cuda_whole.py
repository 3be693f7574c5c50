"""The whole model on the backend of kernels, without a GPU: what is launched, not what it gives."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from ds4.backend import CacheMode, open_backend
from ds4.loader import Synthetic
from ds4.runner import Runner
from ds4.weights import load_weights
from tests.pretend_gpu import pretend

if torch.cuda.is_available():  # modules of kernels, made once, would be those of the pretended GPU
    pytest.skip("there is a GPU: what it computes is checked instead", allow_module_level=True)

LAYERS = 4  # one of each kind
A_LAYER = 20  # launches for one token, at most; the head and the embedding take a few besides


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    mode, counted = pretend(monkeypatch)
    with mode:
        yield counted


@pytest.mark.parametrize("recipe", ["native", "q2"])
@pytest.mark.parametrize("cache", ["native", "exact"])
def test_steps_are_launched_recorded_and_replayed(
    launches: Counter[str], recipe: str, cache: CacheMode
) -> None:
    synthetic = Synthetic("tiny", recipe=recipe, layers=LAYERS)
    be, cfg = open_backend("cuda", "auto", cache), synthetic.config()
    runner = Runner(be, cfg, load_weights(be, cfg, synthetic.source()), 768, 8, 512)

    def launched(step: dict[int, list[int]]) -> int:
        launches.clear()
        assert runner.run(step).shape == (len(step), cfg.vocab_size)
        return launches.total()

    for tokens in (40, 300):  # a prompt's chunk that would be recorded, and one that is too long
        assert launched({0: [5] * tokens}) > 0
        assert launches["attend"] == LAYERS
    for batch in (1, 3, 8):
        step = {slot: [7] for slot in range(batch)}
        first, recorded, replayed = (launched(step) for _ in range(3))
        assert first == recorded <= LAYERS * A_LAYER
        assert replayed == 0
