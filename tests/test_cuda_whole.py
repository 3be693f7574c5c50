"""The whole model on the backend of kernels, without a GPU: what is launched, not what it gives."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from ds4.backend import CacheMode, open_backend
from ds4.draft.drafter import Ask
from ds4.draft.dspark import Dspark
from ds4.draft.mtp import Mtp
from ds4.loader import Synthetic
from ds4.runner import Runner
from ds4.sampler import Sampler, SamplingParams, pick
from ds4.weights import load_weights
from ds4.weights.load import load_drafter
from ds4.weights.names import Drafter
from ds4.weights.synthetic import SyntheticCheckpoint
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


@pytest.mark.parametrize("kind", ["mtp", "dspark"])
def test_a_replayed_draft_launches_and_uploads_nothing(
    launches: Counter[str], kind: Drafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything uploaded for the choice that ends a plain step, but the numbers it draws."""
    synthetic = Synthetic("tiny", layers=LAYERS)
    be, cfg = open_backend("cuda", "auto"), synthetic.config()
    source = SyntheticCheckpoint(cfg, recipe=synthetic.source().recipe, drafter=kind)
    runner = Runner(be, cfg, load_weights(be, cfg, synthetic.source()), 768, 2, 512)
    drafter: Any = {"mtp": Mtp, "dspark": Dspark}[kind](runner, load_drafter(be, cfg, source))
    runner.attach(drafter)
    uploads, upload = list[Any](), type(be).upload
    monkeypatch.setattr(type(be), "upload", lambda be, x: uploads.append(x) or upload(be, x))
    greedy, drawn = (
        Sampler(SamplingParams(temperature=heat, seed=1), [], cfg.vocab_size) for heat in (0, 1)
    )

    def made(work: Callable[[], object]) -> tuple[int, int]:
        """Launches and uploads once it is recorded."""
        for _ in range(3):
            launches.clear()
            uploads.clear()
            work()
        return launches.total(), len(uploads)

    def step(who: Sampler) -> None:
        rows = [(who, runner.lengths[0])]
        be.download(pick(be, runner.run({0: [7]}), rows))

    def draft(who: Sampler, count: int) -> None:
        texts = [[7] * (length + 1) for length in runner.lengths]
        drafter.propose([Ask(slot, text, count, who) for slot, text in enumerate(texts)])

    runner.run({0: [5] * 20, 1: [6] * 20})
    assert made(lambda: step(greedy)) == (2, 0)
    assert made(lambda: step(drawn))[1] == 1
    whole, said = drafter._whole, list[Any]()
    drafter._whole = lambda step: said.append(whole(step)) or said[-1]
    starts = set()
    for count, who in itertools.product((1, drafter.longest), (greedy, drawn)):
        assert made(partial(draft, who, count)) == (0, 0)
        logits = said[-1][1:] if kind == "mtp" else said[-1][2:3]  # of all recordings in one place
        at = [one.data_ptr() for one in logits]
        starts.add(at[0])
        assert np.diff(at).tolist() == [2 * 4 * cfg.vocab_size] * (len(at) - 1)
    assert len(starts) == 1


@pytest.mark.parametrize("cache", ["native", "exact"])
@pytest.mark.parametrize("drafter", [None, "mtp", "dspark"])
def test_guesses_of_many_sequences_are_verified_and_drafted_in_recorded_steps(
    launches: Counter[str], cache: CacheMode, drafter: Any
) -> None:
    synthetic = Synthetic("tiny", layers=LAYERS)
    be, cfg = open_backend("cuda", "auto", cache), synthetic.config()
    runner = Runner(be, cfg, load_weights(be, cfg, synthetic.source()), 768, 16, 512)
    if drafter:
        source = SyntheticCheckpoint(cfg, recipe=synthetic.source().recipe, drafter=drafter)
        own = load_drafter(be, cfg, source)
        guessing: Any = (Mtp if drafter == "mtp" else Dspark)(runner, own)
        runner.attach(guessing)

    def run(slots: int, rows: int) -> tuple[int, int]:
        """Launches, and where the logits lie."""
        launches.clear()
        step = {slot: [7] * rows for slot in range(slots)}
        logits = runner.run(step, pad_to=slots * rows, every_row=True)
        assert logits.shape == (slots * rows, cfg.vocab_size)
        return launches.total(), logits.data_ptr()

    places = set()
    for slots, rows in ((8, 5), (16, 6)):
        first, recorded, replayed = (run(slots, rows) for _ in range(3))
        assert first[0] == recorded[0] > 0
        assert replayed[0] == 0
        places |= {recorded[1], replayed[1]}
    assert len(places) == 1
    assert all(run(16, 9)[0] > 0 for _ in range(3))  # too long
    if drafter == "dspark":
        sampler, counts = Sampler(SamplingParams(temperature=0), [], cfg.vocab_size), []
        asks = [Ask(slot, [7] * runner.lengths[slot] + [5], 1, sampler) for slot in range(8)]
        for _ in range(3):
            launches.clear()
            guessing.propose(asks)
            counts.append(launches.total())
        assert counts[0] == counts[1] > counts[2]  # what remains chooses the tokens
