"""Text made with guesses that are right if a coin says so: how fast it comes.

All the work of rounds is done. What a round brings is counted as the coin brings it on average, so
that its luck is not in the speeds.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ds4.draft.drafter import Ask, Draft
from ds4.draft.lookup import Lookup
from ds4.draft.policy import Policy, Record
from ds4.draft.speculate import Round, Speculator, Turn
from ds4.runner import Runner
from ds4.sampler import Sampler, SamplingParams, pick

from .models import Model

ROWS = 6  # of a sequence in a step, at most
STRETCH = 64  # tokens for which a mixed text is alike
MIXED = (0.9, 0.2, 0.7, 0.5, 0.0)  # chances of its stretches
GREEDY = SamplingParams(temperature=0.0)


class Coin(Lookup):
    """Guesses that mean nothing, of the tokens that a text has."""

    name = "coin"

    def __init__(self, model: Model) -> None:
        super().__init__(ROWS - 1)
        self.model = model

    def propose(self, asks: Sequence[Ask]) -> Draft:
        return Draft([self.model.tokens(ask.count) for ask in asks])


class Fixed(Policy):
    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        return [min(self.longest, count) for count in most]


class Tossed(Speculator):
    """A guess is right if a coin says so; all the work is done as if it were checked.

    `brought` is how many tokens a round brings on average, summed; `chance` may be changed.
    """

    def __init__(self, runner: Runner, drafter: Any, policy: Policy | None) -> None:
        super().__init__(runner, drafter, policy)
        self.chance, self.brought, self.rng = 0.0, 0.0, np.random.default_rng(0)

    def _verify(self, turns: Sequence[Turn], draft: Draft) -> list[Round]:
        super()._verify(turns, draft)
        rounds = []
        for turn, guess in zip(turns, draft.guesses, strict=True):
            right = 0
            while right < len(guess) and self.rng.random() < self.chance:
                right += 1
            self.runner.lengths[turn.slot] = len(turn.text) + right
            self.brought += brings(self.chance, len(guess))
            rounds.append(Round([turn.text[-1], *guess][: right + 1], len(guess)))
        return rounds


def brings(chance: float, guesses: int) -> float:
    """Tokens of a round, on average."""
    return sum(chance**n for n in range(guesses + 1))


def text_row(
    model: Model,
    runner: Runner,
    drafter: Any,
    chance: float | str,
    rounds: Sequence[float],
    tokens: int,
) -> dict[str, Any]:
    """Tokens a second with the policy and with each fixed length.

    `rounds` are milliseconds with 0, 1 ... guesses, from which follows what is to be expected.
    """
    most = min(drafter.longest, ROWS - 1)
    stretches = MIXED if isinstance(chance, str) else (chance,)
    period = STRETCH * len(stretches) if isinstance(chance, str) else 1
    few = max(period, tokens // 3)
    got: dict[str, float] = {}
    want: dict[str, float] = {}

    def speed(policy: Policy | None, tokens: int, warm: int) -> float:
        speculator = Tossed(runner, drafter, policy)
        return text_speed(speculator, model, stretches, tokens, warm)

    ahead = decode_speed(runner, model, tokens // 3)
    for count in range(most + 1):
        got[str(count)] = speed(Fixed(count), few, 3)
        times = [rounds[count] / brings(one, count) for one in stretches]
        want[str(count)] = 1e3 / statistics.fmean(times)
    adaptive = speed(None, max(period, tokens), 40)
    return {
        "tok_s": {name: round(speed, 1) for name, speed in got.items()},
        "model_tok_s": {name: round(speed, 1) for name, speed in want.items()},
        "adaptive_tok_s": round(adaptive, 1),
        "decode_ahead_tok_s": round(ahead, 1),
        "of_best_fixed": round(adaptive / max(got.values()), 3),
        "of_plain": round(adaptive / got["0"], 3),
    }


def decode_speed(runner: Runner, model: Model, tokens: int) -> float:
    """Plain decoding as the engine does it, a step ahead of the host; the tokens are random."""
    be, sampler = model.be, Sampler(GREEDY, [], runner.cfg.vocab_size)
    runner.lengths[0] = start = runner.context // 2
    before: Any = None

    def step() -> None:
        nonlocal before
        if runner.lengths[0] >= runner.context - 2 * ROWS:
            runner.lengths[0] = start
        token = be.upload(np.array(model.next_tokens(1)[0], np.int32))
        picked = pick(be, runner.run_ahead([0], token), [(sampler, runner.lengths[0])])
        if before is not None:
            be.download(before)
        before = picked

    return tokens / _seconds(step, tokens, warm=4)


def _seconds(step: Callable[[], None], count: int, warm: int) -> float:
    for _ in range(warm):
        step()
    begun = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - begun


def text_speed(
    speculator: Tossed, model: Model, stretches: Sequence[float], tokens: int, warm: int
) -> float:
    """Tokens a second after `warm` rounds. Stretches take turns, a token of text at a time."""
    runner = speculator.runner
    sampler, record = Sampler(GREEDY, [], runner.cfg.vocab_size), speculator.policy.record()
    start = length = runner.context // 2
    made, since, begun = 0, 0.0, 0.0
    while warm >= 0 or made < tokens:
        if warm == 0:
            made, since, begun = 0, speculator.brought, time.perf_counter()
        warm -= 1
        speculator.chance = stretches[made // STRETCH % len(stretches)]
        runner.lengths[0] = length
        text = [7] * length + model.tokens(1)
        (came,) = speculator.round([Turn(0, text, sampler, ROWS, record)])
        made += len(came.tokens)
        length += len(came.tokens)
        if length > runner.context - 2 * ROWS:
            length = start
    return (speculator.brought - since) / (time.perf_counter() - begun)
