"""Text made with guesses that are right if a coin says so: how fast it comes.

All the work of rounds is done. What a round brings is counted as the coin brings it on average, so
that its luck is not in the speeds. A step without guesses begins ahead of the host, as in LLM.
"""

import statistics
import time
from collections.abc import Sequence
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

    for count in range(most + 1):
        got[str(count)] = speed(Fixed(count), few, 3)
        times = [rounds[count] / brings(one, count) for one in stretches]
        want[str(count)] = 1e3 / statistics.fmean(times)
    adaptive = speed(None, max(period, tokens), 40)
    return {
        "tok_s": {name: round(speed, 1) for name, speed in got.items()},
        "model_tok_s": {name: round(speed, 1) for name, speed in want.items()},
        "adaptive_tok_s": round(adaptive, 1),
        "of_best_fixed": round(adaptive / max(got.values()), 3),
        "of_plain": round(adaptive / got["0"], 3),
    }


def text_speed(
    speculator: Tossed, model: Model, stretches: Sequence[float], tokens: int, warm: int
) -> float:
    """Tokens a second after `warm` rounds. Stretches take turns, a token of text at a time."""
    text = Text(speculator, model)
    while warm > 0:
        warm -= 1
        text.go_on(stretches[text.made // STRETCH % len(stretches)])
    text.made, since, begun = 0, speculator.brought, time.perf_counter()
    while text.made < tokens:
        text.go_on(stretches[text.made // STRETCH % len(stretches)])
    text.wait()
    return (speculator.brought - since) / (time.perf_counter() - begun)


class Text:
    """One sequence; its tokens are random. Steps without guesses begin ahead, as in LLM."""

    def __init__(self, speculator: Tossed, model: Model) -> None:
        self.speculator, self.runner, self.model = speculator, speculator.runner, model
        self.sampler = Sampler(GREEDY, [], model.cfg.vocab_size)
        self.record = speculator.policy.record()
        self.start = self.length = self.runner.context // 2
        self.made, self.stepped = 0, 0.0  # tokens; when the last step ended, if it was plain
        self.pending: Any = None  # what a plain step chose, on the device

    def go_on(self, chance: float) -> None:
        """A round, or a plain step."""
        speculator, self.speculator.chance = self.speculator, chance
        if self.length > self.runner.context - 2 * ROWS:
            self.length = self.start
        self.runner.lengths[0] = self.length
        (token,) = self.model.next_tokens(1)[0]
        turn = Turn(0, [7] * self.length + [token], self.sampler, ROWS, self.record)
        came = 1
        if not any(speculator.lengths([turn])):
            self.plain(turn)
        else:
            self.wait()
            came = len(speculator.round([turn])[0].tokens)
        self.made += came
        self.length += came

    def plain(self, turn: Turn) -> None:
        be = self.model.be
        token = be.upload(np.array(turn.text[-1:], np.int32))
        picked = pick(be, self.runner.run_ahead([0], token), [(self.sampler, len(turn.text))])
        if self.pending is not None:
            be.download(self.pending)
            now = time.perf_counter()
            if self.stepped:
                self.speculator.stepped([turn], now - self.stepped)
            self.stepped = now
        self.pending = picked
        self.speculator.brought += 1

    def wait(self) -> None:
        if self.pending is not None:
            self.model.be.download(self.pending)
        self.pending, self.stepped = None, 0.0
