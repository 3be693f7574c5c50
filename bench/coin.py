"""Text made with guesses that are right if a coin says so: how fast it comes.

All the work of rounds is done. What a round brings is counted as the coin brings it on average, so
that its luck is not in the speeds, and all ways have the same coins. A step without guesses begins
ahead of the host, as in LLM. Tokens are new in every text: with experts in host memory one that was
just made would be fast. Where routing is skewed, three of ten are the token before, in any text.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ds4.draft.drafter import Ask, Draft
from ds4.draft.lookup import Lookup
from ds4.draft.policy import Policy, Record
from ds4.draft.speculate import Round, Speculator, Turn
from ds4.runner import Runner
from ds4.sampler import Sampler, SamplingParams, pick

from .models import REPETITION, Model

ROWS = 6  # of a sequence in a step, at most
STRETCH = 64  # tokens for which a mixed text is alike
MIXED = (0.9, 0.2, 0.7, 0.5, 0.0)  # chances of its stretches
SETTLE = 32  # plain steps of another text before one that is timed, with experts in host memory
BLOCK = 10  # tokens of which as many are the one before as should be
GREEDY = SamplingParams(temperature=0.0)


class Script:
    """What a text will say, and which guesses are right; `at` is the token the model sees next."""

    def __init__(self, model: Model, stretches: Sequence[float], seed: int = 0) -> None:
        self.model, self.stretches, self.at = model, stretches, 0
        self.rng = np.random.default_rng(seed)
        self.others = random.Random(model.tokens(1)[0])  # new ones in every text, soon drawn
        self.tokens = list[int]()
        self.coins = list[float]()

    @property
    def chance(self) -> float:
        return self.stretches[self.at // STRETCH % len(self.stretches)]

    def ahead(self, count: int) -> list[int]:
        """The next tokens of the text."""
        while len(self.tokens) < self.at + count:
            again = np.zeros(BLOCK, bool)
            if self.model.synthetic.routing == "skewed":
                again[self.rng.permutation(BLOCK)[: round(REPETITION * BLOCK)]] = True
            for same, coin in zip(again, self.rng.random(BLOCK), strict=True):
                self.tokens.append(self.tokens[-1] if same and self.tokens else self.other())
                self.coins.append(coin)
        return self.tokens[self.at : self.at + count]

    def other(self) -> int:
        return self.others.randrange(3, self.model.cfg.vocab_size)

    def guesses(self, count: int) -> tuple[list[int], int]:
        """So many, and how many of them are right."""
        _, *text = self.ahead(count + 1)
        coins = self.coins[self.at + 1 : self.at + 1 + count]
        right = next((n for n, coin in enumerate(coins) if coin >= self.chance), count)
        return text[:right] + [self.other() for _ in range(count - right)], right


class Coin(Lookup):
    """It takes no time to guess; what, a script says."""

    name = "coin"

    def __init__(self) -> None:
        super().__init__(ROWS - 1)

    def propose(self, asks: Sequence[Ask]) -> Draft:
        return Draft([[0] * ask.count for ask in asks])


class Fixed(Policy):
    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        return [min(self.longest, count) for count in most]


class Tossed(Speculator):
    """Guesses are those of a script; all the work is done as if they were checked.

    `brought` is how many tokens a round brings on average, summed.
    """

    script: Script
    brought = 0.0

    def _verify(self, turns: Sequence[Turn], draft: Draft) -> list[Round]:
        (turn,), (guess,) = turns, draft.guesses
        guess, right = self.script.guesses(len(guess))
        super()._verify(turns, replace(draft, guesses=[guess]))
        self.runner.lengths[turn.slot] = len(turn.text) + right
        self.brought += brings(self.script.chance, len(guess))
        return [Round([turn.text[-1], *guess][: right + 1], len(guess))]


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
    texts: int,
    most: int,
) -> dict[str, Any]:
    """Tokens a second of plain steps, of lengths up to `most`, and of `texts` policies.

    A policy makes two texts: one knowing nothing, and the next. Each text has coins of its own, as
    luck with the first guesses decides much of what a policy does with it; plain steps and fixed
    lengths make all of these texts too.
    `rounds` are milliseconds with 0, 1 ... guesses, from which follows what is to be expected.
    """
    most = min(drafter.longest, most)
    stretches = MIXED if isinstance(chance, str) else (chance,)
    period = STRETCH * len(stretches) if isinstance(chance, str) else 1
    many = max(1, tokens // period) * period

    def speed(speculator: Tossed, tokens: int, seed: int = 0) -> float:
        if getattr(model.be, "placement", None) is not None:  # let it forget the text before
            run_text(Tossed(runner, drafter, Fixed(0)), Script(model, stretches, 1), SETTLE)
        return run_text(speculator, Script(model, stretches, seed), tokens)

    want = {}
    for count in range(most + 1):
        times = [rounds[count] / brings(one, count) for one in stretches]
        want[str(count)] = 1e3 / statistics.fmean(times)
    fixed = [Tossed(runner, drafter, Fixed(count)) for count in range(most + 1)]
    for count in range(min(drafter.longest, ROWS - 1) + 1):  # compile and record
        run_text(Tossed(runner, drafter, Fixed(count)), Script(model, (1.0,), 1), 3 * (count + 1))
    adaptive = [Tossed(runner, drafter, None) for _ in range(texts)]
    plain, first, later = list[float](), list[float](), list[float]()
    got = [list[float]() for _ in range(most)]
    for seed in range(2 * texts):  # in turn, since a machine's speed drifts
        plain.append(speed(fixed[0], many, seed))
        for speeds, one in zip(got, fixed[1:], strict=True):
            speeds.append(speed(one, max(period, tokens // 2), seed))
        (first if seed < texts else later).append(speed(adaptive[seed % texts], many, seed))
    means = [statistics.fmean(speeds) for speeds in (plain, *got)]
    adapted = statistics.fmean(first), statistics.fmean(later)
    return {
        "tok_s": {str(count): round(one, 1) for count, one in enumerate(means)},
        "plain_tok_s": [round(one, 1) for one in plain],
        "model_tok_s": {name: round(one, 1) for name, one in want.items()},
        "adaptive_tok_s": [[round(one, 1) for one in each] for each in (first, later)],
        "of_best_fixed": [round(one / max(means), 3) for one in adapted],
        "of_plain": [round(one / means[0], 3) for one in adapted],
        "tokens": many,
    }


def run_text(speculator: Tossed, script: Script, tokens: int) -> float:
    """Tokens a second."""
    text = Text(speculator, script)
    script.ahead(tokens + 2 * ROWS)  # not while time is taken
    since, begun = speculator.brought, time.perf_counter()
    while script.at < tokens:
        text.go_on()
    text.wait()
    return (speculator.brought - since) / (time.perf_counter() - begun)


class Text:
    """One sequence. Steps without guesses begin ahead, as in LLM."""

    def __init__(self, speculator: Tossed, script: Script) -> None:
        self.speculator, self.runner, self.script = speculator, speculator.runner, script
        self.sampler = Sampler(GREEDY, [], script.model.cfg.vocab_size)
        self.record = speculator.policy.record()
        self.start = self.length = self.runner.context // 2
        self.stepped = 0.0  # when the last step ended, if it was plain
        self.pending: Any = None  # what a plain step chose, on the device
        speculator.script = script

    def go_on(self) -> None:
        """A round, or a plain step."""
        speculator = self.speculator
        if self.length > self.runner.context - 2 * ROWS:
            self.length = self.start
        self.runner.lengths[0] = self.length
        turn = Turn(0, [7] * self.length + self.script.ahead(1), self.sampler, ROWS, self.record)
        came = 1
        asked = speculator.lengths([turn])
        if not any(asked):
            self.plain(turn)
        else:
            self.wait()
            came = len(speculator.round([turn], asked)[0].tokens)
        self.script.at += came
        self.length += came

    def plain(self, turn: Turn) -> None:
        be = self.runner.be
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
            self.runner.be.download(self.pending)
        self.pending, self.stepped = None, 0.0
