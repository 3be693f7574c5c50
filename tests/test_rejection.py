"""Guesses taken by rejection: what is drawn is distributed as without them."""

from typing import Any

import numpy as np
import pytest

import ds4
from bench.rejection import LONGEST, STRAY, WAYS, draw, judged
from ds4.backend import open_backend
from ds4.draft.speculate import Turn
from ds4.sampler import Sampler, SamplingParams, uniform
from tests.test_speculate import Always

ROWS, VOCAB = 6, 11


def logits(seed: int = 0) -> np.ndarray:
    x = 2 * np.random.default_rng(seed).standard_normal((ROWS, VOCAB)).astype(np.float32)
    x[1, 3:6] = x[1].max() + 1  # equal ones
    return x


def options(be: Any) -> list[Any]:
    columns = [
        np.array([0, 1, 0.3, 2, 1, 1], np.float32),
        np.array([0, 4, 0, 0, 5, 1], np.int32),
        np.array([1, 1, 0.7, 1, 0.9, 1], np.float32),
        np.array([0, 0, 0, 0.1, 0.02, 0], np.float32),
    ]
    return [be.upload(column) for column in columns]


def test_chances_are_what_sample_draws_by(backend: str) -> None:
    be: Any = open_backend(backend, "cpu")
    x, numbers = be.upload(logits()), (np.arange(500, dtype=np.float32) + 0.5) / 500
    got = be.download(be.chances(x, *options(be)))
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)
    counts = np.zeros_like(got)
    for u in numbers:
        drawn = be.sample(x, *options(be), be.upload(np.full(ROWS, u, np.float32)))
        counts[np.arange(ROWS), be.download(drawn)] += 1
    np.testing.assert_allclose(counts / len(numbers), got, atol=1.01 / len(numbers))


def test_a_guess_is_settled(backend: str) -> None:
    """p has all of tokens 0 and 1; q guesses 1 too seldom, 2 and 0 too often."""
    be: Any = open_backend(backend, "cpu")
    p, q = ([0.6, 0.4, 0, 0], [0.8, 0, 0.2, 0])

    def settle(guess: int, accept: float, draw: float, p: list[float] = p) -> int:
        rows = (be.upload(np.array([row], np.float32)) for row in (p, q))
        numbers = (be.upload(np.array([x], np.float32)) for x in (accept, draw))
        return int(
            be.download(be.settle(*rows, be.upload(np.array([guess], np.int32)), *numbers))[0]
        )

    assert settle(0, 0.74, 0.5) == 0
    assert settle(0, 0.76, 0.5) == 1  # what p has more of
    assert settle(2, 0.0, 0.5) == 1
    assert [settle(-1, 0.0, u) for u in (0.59, 0.61, 1 - 2**-24)] == [0, 1, 1]
    assert settle(2, 0.5, 0.1, q) == 2  # where both are alike all is kept
    most = 1 - 2**-24
    assert settle(0, most, most, [0.8 - 1e-7, 1e-7, 0.2, 0]) in (0, 1)


@pytest.mark.parametrize(
    "way", ["rejection", "rejection, by confidence", "length chosen after seeing"]
)
def test_texts_are_distributed_as_the_model_says_unless_a_length_was_chosen_too_late(
    way: str,
) -> None:
    """bench/rejection.py does it with 100,000 draws."""
    policy, drafter = WAYS[way]
    runs, speculator = draw(open_backend("reference"), 6000, policy(LONGEST), drafter, seed=1)
    assert 0 < speculator.tally.accepted_tokens < speculator.tally.drafted_tokens
    assert (judged(runs)["z"] > STRAY) == (way == "length chosen after seeing")
    if way == "rejection, by confidence":  # else nothing was shown
        assert speculator.policy.cut > 0.05 * speculator.tally.drafted_tokens


def test_numbers_for_guesses_are_others_than_those_that_choose() -> None:
    drawn = [uniform(5, 7), uniform(5, 7, "guess"), uniform(5, 7, "accept"), uniform(5, 8)]
    assert len(set(drawn)) == 4
    assert uniform(5, 7, "choose") == drawn[0]
    for seed, position in ((5, 7), (2**64 + 3, 0), (1, 31), (1, 32), (9, 2**40 + 5)):
        philox = np.random.Philox(key=seed % 2**64, counter=position + (1 << 64))
        assert uniform(seed, position, "guess") == int(philox.random_raw() >> 40) * 2.0**-24


@pytest.mark.parametrize("given", [{"seed": 4}, {"temperature": 0.0}, {}])
def test_only_texts_that_nobody_can_ask_for_again_are_drawn_by_rejection(
    given: dict[str, Any],
) -> None:
    llm = ds4.load("demo", "reference", context=64, speculate="mtp")
    speculator, calls = llm.speculator, []
    assert speculator is not None
    speculator.policy = Always(3)
    be: Any = llm.runner.be
    settle = be.settle
    be.settle = lambda p, *rest: calls.append(len(p)) or settle(p, *rest)
    sampler = Sampler(SamplingParams(**given), [], llm.config.vocab_size)
    prompt = llm.encode("The king")
    llm.runner.run({0: prompt[:-1]})
    guided = (None, lambda guess: (list(guess), np.full((len(guess) + 1, 1 << 10), -1, np.int32)))
    for guide in guided:
        turn = Turn(0, prompt, sampler, 9, speculator.policy.record(), False, guide)
        speculator.round([turn])
        llm.runner.rewind(0, len(prompt) - 1)
    assert calls == ([] if given else [4])
