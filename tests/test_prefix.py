"""The prefix cache: what it keeps in memory and on disk, and what it does not trust."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ds4.engine import snapshot
from ds4.engine.prefix import PrefixCache, fingerprint
from ds4.runner import Runner
from tests.test_snapshot import CONTEXT, feed, make_runner, some_tokens

PLENTY = 1 << 30

# conversations on a model


class Chat:
    """What an engine does with a slot and a prefix cache; counts the tokens it runs."""

    def __init__(self, runner: Runner, cache: PrefixCache) -> None:
        self.runner, self.cache, self.ran = runner, cache, 0

    def answer(self, prompt: list[int], count: int = 4) -> list[int]:
        """Greedy tokens; the slot is kept at its last whole page and at the turn's end."""
        self.ran, slot = 0, 1
        at = self.cache.resume(self.runner, slot, prompt)
        assert self.runner.lengths[slot] == at
        for stop in [*self.cache.stops(prompt, at), len(prompt)]:
            while at < stop:
                chunk = prompt[at : min(stop, at + self.runner.max_chunk)]
                logits = self.step(chunk)
                at += len(chunk)
            if stop < len(prompt):
                self.cache.keep(self.runner, slot, prompt[:stop])
        out = [int(logits[-1].argmax())]
        for _ in range(count - 1):
            out.append(int(self.step(out[-1:])[-1].argmax()))
        self.cache.keep(self.runner, slot, prompt + out[:-1])
        return out

    def step(self, tokens: list[int]) -> Any:
        self.ran += len(tokens)
        return self.runner.be.download(self.runner.run({1: tokens}))


@pytest.fixture(scope="module")
def runner() -> Runner:
    return make_runner("torch")


def fresh(runner: Runner, prompt: list[int]) -> list[int]:
    return Chat(runner, PrefixCache(runner, 0)).answer(prompt)


def test_a_second_turn_runs_only_what_is_new(runner: Runner) -> None:
    cache = PrefixCache(runner, PLENTY)
    chat, prompt = Chat(runner, cache), some_tokens(300)
    prompt += chat.answer(prompt) + some_tokens(20, seed=1)
    assert chat.ran == 303
    again = chat.answer(prompt)
    assert chat.ran == 24 - 3 + 3  # the last answered token was never run; 3 of the new answer
    assert again == fresh(runner, prompt)
    edited = prompt[:290] + some_tokens(15, seed=2)
    answer = chat.answer(edited)
    assert chat.ran == 305 - 256 + 3  # from the last whole page of the first prompt
    assert answer == fresh(runner, edited)
    assert cache.counts["reused_tokens"] == 303 + 256
    assert (cache.counts["hits_memory"], cache.counts["misses"]) == (2, 1)


def test_a_long_conversation_runs_only_what_is_new(tmp_path: Path) -> None:
    small = make_runner("torch", slots=2)
    runner = Runner(
        small.be, small.cfg, small.weights, 4200, 2, 256, identity=lambda: "long conversation"
    )
    cache = PrefixCache(runner, PLENTY, tmp_path, PLENTY)
    chat, prompt = Chat(runner, cache), some_tokens(4000)
    prompt += chat.answer(prompt) + some_tokens(30, seed=1)
    assert chat.ran == 4003
    second = chat.answer(prompt)
    assert chat.ran == 34 - 3 + 3
    cache.close()
    cache = PrefixCache(runner, PLENTY, tmp_path, PLENTY)  # after a restart
    chat = Chat(runner, cache)
    prompt += second + some_tokens(10, seed=2)
    chat.answer(prompt)
    assert chat.ran == 14 - 3 + 3
    assert cache.counts["hits_disk"] == 1
    assert cache.counts["reused_tokens"] == len(prompt) - 11
    cache.close()


def test_prompts_share_their_beginning(runner: Runner) -> None:
    cache = PrefixCache(runner, PLENTY)
    chat, system = Chat(runner, cache), some_tokens(150)
    sizes, ran = [], []
    for seed in range(3):
        chat.answer(system + some_tokens(150, seed=9 + seed))
        sizes.append(cache.bytes)
        ran.append(chat.ran)
    assert ran == [303, 303, 303 - 128]  # the second one finds where prompts part, and keeps it
    assert sizes[2] - sizes[1] < 1.1 * (sizes[1] - sizes[0])


def test_memory_is_bounded(runner: Runner) -> None:
    cache = PrefixCache(runner, 0)
    assert Chat(runner, cache).answer(some_tokens(140))
    assert cache.bytes == 0
    assert cache.find(some_tokens(200)) is None
    with pytest.raises(ValueError, match="holds"):
        cache.keep(runner, 1, some_tokens(3))


def test_what_memory_does_not_suffice_for_leaves_nothing(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PrefixCache(runner, PLENTY)

    def none(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(snapshot, "save_ending", none)
    with pytest.raises(MemoryError):
        Chat(runner, cache).answer(some_tokens(140))
    assert cache.bytes == 0


# on disk


def test_after_a_restart_a_conversation_comes_from_disk(runner: Runner, tmp_path: Path) -> None:
    folder, prompt = tmp_path / "snapshots", some_tokens(300)
    first = PrefixCache(runner, PLENTY, folder, PLENTY)
    prompt += Chat(runner, first).answer(prompt) + some_tokens(20, seed=1)
    first.close()
    want = fresh(runner, prompt)

    second = PrefixCache(runner, PLENTY, folder, PLENTY)
    assert second.bytes == 0
    assert second.disk_bytes == sum(file.stat().st_size for file in folder.glob("*/*"))
    chat = Chat(runner, second)
    assert chat.answer(prompt) == want
    assert chat.ran == 24 - 3 + 3
    assert (second.counts["hits_disk"], second.counts["reused_tokens"]) == (1, 303)
    assert second.find(prompt).where == "memory"  # type: ignore[union-attr]
    second.close()


def test_the_folder_is_private_and_its_names_are_hashes(runner: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "snapshots"
    cache = PrefixCache(runner, 0, folder, PLENTY)  # what memory cannot hold is written too
    Chat(runner, cache).answer(some_tokens(130))
    cache.flush()
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) == cache.counts["written"] == 3
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert len(bytes.fromhex(file.name)) == 16
    for private in (folder, folder / fingerprint(runner).hex()):
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    cache.close()


HARMS = [("ending", harm) for harm in ("flip", "header", "short", "empty", "long")]


@pytest.mark.parametrize(("what", "harm"), [*HARMS, ("segment", "flip"), ("segment", "short")])
def test_damage_is_found_and_computed_again(
    runner: Runner, tmp_path: Path, what: str, harm: str
) -> None:
    prompt = some_tokens(140)
    cache = PrefixCache(runner, PLENTY, tmp_path, PLENTY)
    Chat(runner, cache).answer(prompt)
    cache.close()
    for file in tmp_path.glob("*/*"):
        data = bytearray(file.read_bytes())
        if what.encode() not in data[:400]:
            continue
        if harm == "flip":
            data[-7] ^= 4
        elif harm == "header":
            data[60] ^= 1
        data = {"short": data[:-1], "empty": bytearray(), "long": data + b"0"}.get(harm, data)
        file.write_bytes(data)
    prompt += some_tokens(5)
    want = fresh(runner, prompt)
    cache = PrefixCache(runner, PLENTY, tmp_path, PLENTY)
    chat = Chat(runner, cache)
    assert chat.answer(prompt) == want
    assert cache.counts["corrupt"] >= 1
    assert chat.ran == len(prompt) + 3
    cache.close()
    cache = PrefixCache(runner, PLENTY, tmp_path, PLENTY)  # what was written anew is good
    chat = Chat(runner, cache)
    assert len(chat.answer([*prompt, *want[:3], 5])) == 4
    assert chat.ran == 1 + 3
    cache.close()


def test_disk_is_bounded(runner: Runner, tmp_path: Path) -> None:
    cache = PrefixCache(runner, 0, tmp_path, PLENTY)
    chat = Chat(runner, cache)
    chat.answer(some_tokens(140))
    cache.flush()
    budget = int(cache.disk_bytes * 2.5)
    cache.close()
    cache = PrefixCache(runner, 0, tmp_path, budget)
    chat = Chat(runner, cache)
    for seed in range(1, 5):
        chat.answer(some_tokens(140, seed))
        cache.flush()
        assert (
            sum(file.stat().st_size for file in tmp_path.glob("*/*")) == cache.disk_bytes <= budget
        )
    assert cache.counts["evicted"] >= 4
    chat.answer([*some_tokens(140, 4), 5])
    assert chat.ran < 140
    cache.close()


def test_snapshots_of_other_weights_are_not_taken(runner: Runner, tmp_path: Path) -> None:
    cache = PrefixCache(runner, PLENTY, tmp_path, PLENTY)
    Chat(runner, cache).answer(some_tokens(140))
    cache.close()
    other = make_runner("torch")
    other.identity = lambda: "other"
    cache = PrefixCache(other, PLENTY, tmp_path, PLENTY)
    assert cache.find(some_tokens(150)) is None
    mine, others = (tmp_path / fingerprint(r).hex() for r in (other, runner))
    assert len(list(others.iterdir())) == 3
    cache.close()
    for file in others.iterdir():  # renamed, another model's rows are still another model's
        file.rename(mine / file.name)
    cache = PrefixCache(other, PLENTY, tmp_path, PLENTY)
    assert cache.find(some_tokens(150)) is None
    assert cache.disk_bytes == 0
    cache.close()
    other.identity = None
    with pytest.raises(ValueError, match="identity"):
        PrefixCache(other, PLENTY, tmp_path, PLENTY)


def test_old_models_snapshots_go_beyond_the_budget(runner: Runner, tmp_path: Path) -> None:
    old = tmp_path / ("0" * 32)
    old.mkdir()
    for age in range(3):
        (old / f"{age}").write_bytes(bytes(1000))
        os.utime(old / f"{age}", (1e9 - age, 1e9 - age))
    PrefixCache(runner, 0, tmp_path, 2500).close()
    assert sorted(file.name for file in old.iterdir()) == ["0", "1"]


def test_a_full_disk_costs_only_the_snapshots(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache = PrefixCache(runner, PLENTY, tmp_path, PLENTY)
    chat = Chat(runner, cache)
    first = chat.answer(some_tokens(140))
    cache.flush()
    assert "No space left" in caplog.text
    assert cache.counts["skipped"] >= 1
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(chat.answer([*some_tokens(140), *first])) == 4
    assert chat.ran == 4 - 3 + 3
    cache.close()


def test_a_snapshot_of_a_longer_context_that_does_not_fit_is_left(
    runner: Runner, tmp_path: Path
) -> None:
    ids = some_tokens(400)
    cache = PrefixCache(runner, 0, tmp_path, PLENTY)
    runner.rewind(1, 0)
    feed(runner, 1, ids)
    cache.keep(runner, 1, ids)
    runner.rewind(1, 390)
    cache.close()
    assert CONTEXT > 400
    cache = PrefixCache(runner, 0, tmp_path, PLENTY)
    full, runner.context = runner.context, 300
    try:
        assert cache.resume(runner, 1, ids[:350]) == 0
    finally:
        runner.context = full
    assert cache.resume(runner, 1, [*ids, 5]) == 400
    cache.close()
