"""What a round of guesses does while the device works."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import ds4
from ds4.draft.policy import Policy, Record
from ds4.draft.speculate import Speculator, Turn
from ds4.sampler import Sampler, SamplingParams
from tests.test_draft import feed, make
from tests.test_speculate import VOCAB, Stub, greedy


class Noting(Policy):
    """Knows what steps take, and notes when it is asked and what it is told."""

    def __init__(self) -> None:
        super().__init__(2)
        self.calls: list[str] = []
        record = self.record()
        for count in (0, 1, 2) * 5:
            for at in (256, 512):
                self.costs.span = at
                super().learn([record], [count], [count], [count], 0.0, 1 + 0.1 * count)

    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        self.calls.append("asked")
        return super().lengths(records, most)

    def learn(self, records: Sequence[Record], *came: Any) -> None:
        self.calls.append("told")
        *counts, _, _ = came
        super().learn(records, *counts, 0.0, 1 + 0.1 * sum(counts[1]))


def test_it_thinks_while_the_device_works(tmp_path: Path) -> None:
    runner = ds4.load(make(tmp_path, "mtp")[0], "reference", context=256, slots=2).runner
    none = Sampler(SamplingParams(temperature=0.0), [], VOCAB)
    text = list(range(2, 12))
    want = greedy(runner, text, 40, slot=1)
    policy = Noting()
    speculator = Speculator(runner, Stub(lambda ask: want[len(ask.text) - 10 :]), policy)
    runner.rewind(0, 0)
    feed(runner, 0, text[:-1], [24])
    record, download = policy.record(), runner.be.download
    record.spare = 8.0

    def go_on(sequence: Record) -> None:
        turn = Turn(0, text, none, 99, sequence)
        (came,) = speculator.round([turn], speculator.lengths([turn]))
        assert came.guessed == 2
        text.extend(came.tokens)

    with pytest.MonkeyPatch.context() as patch:
        seen = lambda x: policy.calls.append("waits") or download(x)  # noqa: E731
        patch.setattr(runner.be, "download", seen)
        for _ in range(3):
            go_on(record)
        assert policy.calls == ["asked", "asked", "waits", *["told", "asked", "waits"] * 2]
        go_on(policy.record())  # of another text nothing was thought
    assert policy.calls[-4:] == ["told", "asked", "asked", "waits"]
    assert text[10:] == want[: len(text) - 10]
