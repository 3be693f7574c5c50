"""Each backend against transformers, in every order in which tokens can arrive."""

import numpy as np
import pytest

import ds4
from ds4.llm import LLM
from ds4.runner import Runner
from tests import oracle
from tests.conftest import Case

GATE = 5e-4  # float32, logits of standard deviation 2


def load(case: Case, backend: str, slots: int = 1) -> LLM:
    return ds4.load(case.folder, backend, cache="exact", context=128, slots=slots)


def distance(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max())


def absorb(runner: Runner, slot: int, ids: list[int], sizes: list[int]) -> np.ndarray:
    """Logits (T, vocab) of ids given in chunks of these sizes."""
    rows, start = [], runner.lengths[slot]
    for size in sizes:
        at = runner.lengths[slot] - start
        logits = runner.run({slot: ids[at : at + size]}, every_row=True)
        rows.append(runner.be.download(logits))
    return np.concatenate(rows)


def test_logits_equal_transformers_at_every_length(case: Case, backend: str) -> None:
    llm = load(case, backend)
    for length in (*range(1, 10), 16, 17, 60):
        got = llm.logits(case.ids[:length])
        assert distance(got, oracle.logits(case.model, case.ids[:length])) <= GATE


def test_chunks_equal_the_whole(case: Case, backend: str) -> None:
    runner = load(case, backend).runner
    for sizes in ([1] * 60, [20, 1, 13, 26], [5, 3, 52], [7] * 8 + [4], [8, 1, 8, 1, 8, 34]):
        runner.rewind(0, 0)
        assert distance(absorb(runner, 0, case.ids, sizes), case.want) <= GATE


def test_two_sequences_interleave(case: Case, backend: str) -> None:
    runner = load(case, backend, slots=3).runner
    other = case.ids[::-1]
    want_other = load(case, "reference").logits(other)
    schedule = [(20, 10), (1, 1), (0, 13), (7, 1), *[(1, 1)] * 16, (16, 19)]
    got: dict[int, list[np.ndarray]] = {2: [], 0: []}
    for first, second in schedule:
        sizes = {2: first, 0: second}
        chunks = {
            slot: (case.ids if slot == 2 else other)[runner.lengths[slot] :][:n]
            for slot, n in sizes.items()
            if n
        }
        rows = runner.be.download(runner.run(chunks, pad_to=48, every_row=True))
        for slot, ids in chunks.items():
            got[slot].append(rows[: len(ids)])
            rows = rows[len(ids) :]
    assert distance(np.concatenate(got[2]), case.want) <= GATE
    assert distance(np.concatenate(got[0]), want_other) <= GATE


@pytest.mark.parametrize("backend", ["reference", "mlx"])
def test_a_token_of_a_short_step_has_the_bits_that_it_has_alone(case: Case, backend: str) -> None:
    """On a CPU, so that no text can come out another way with guesses or in company."""
    runner = ds4.load(case.folder, backend, "cpu", cache="exact", context=128, slots=2).runner
    alone = absorb(runner, 0, case.ids, [1] * 60)
    runner.rewind(0, 0)
    assert np.array_equal(absorb(runner, 0, case.ids, [9, 1, 2, 3, 32, 6, 7]), alone)
    runner.rewind(0, 0)
    for at in range(0, 60, 6):
        chunks = {1: case.ids[at : at + 5][::-1], 0: case.ids[at : at + 6]}
        rows = runner.be.download(runner.run(chunks, every_row=True))[5:]
        assert np.array_equal(rows, alone[at : at + 6])


@pytest.mark.parametrize("back", [1, 2, 3, 4, 5])
def test_rewind_and_rerun(tiny: Case, backend: str, back: int) -> None:
    """From every residue of 4 and of 8: wrong tokens, back again, the right ones."""
    runner = load(tiny, backend).runner
    wrong = [(token + 1) % tiny.shape["vocab_size"] for token in tiny.ids]
    absorb(runner, 0, tiny.ids[:20], [20])
    got = []
    for length in range(20, 30):
        absorb(runner, 0, wrong[length : length + back], [back])
        runner.rewind(0, length)
        got.append(absorb(runner, 0, tiny.ids[length : length + 1], [1]))
    got.append(absorb(runner, 0, tiny.ids[30:], [3, 27]))
    assert distance(np.concatenate(got), tiny.want[20:]) <= GATE


def test_rewind_and_rerun_other_shapes(case: Case, backend: str) -> None:
    runner = load(case, backend).runner
    wrong = [(token + 1) % case.shape["vocab_size"] for token in case.ids]
    absorb(runner, 0, [*case.ids[:33], *wrong[33:38]], [17, 21])
    runner.rewind(0, 33)
    assert distance(absorb(runner, 0, case.ids[33:], [2, 25]), case.want[33:]) <= GATE


def test_memory_that_was_never_written_is_never_read(case: Case, backend: str) -> None:
    runner = load(case, backend).runner
    for layer in runner.cache:
        for rows in vars(layer).values():
            if rows is not None:
                rows.data[:] = np.nan
    sizes = [3, 17, 1, 39]
    got = []
    for size in sizes:
        at = runner.lengths[0]
        logits = runner.run({0: case.ids[at : at + size]}, pad_to=size + 3, every_row=True)
        got.append(runner.be.download(logits)[:size])
    assert distance(np.concatenate(got), case.want) <= GATE


def test_native_prefill_equals_native_decode(blocky: Case, backend: str) -> None:
    """The same rounding either way. A difference in the last bit may flip a code, or a choice of
    the indexer, and so move logits from there on; rounding one way only would move them all."""
    llm = ds4.load(blocky.folder, backend, cache="native", context=128)
    whole = llm.logits(blocky.ids)
    llm.runner.rewind(0, 0)
    steps = absorb(llm.runner, 0, blocky.ids, [1] * 60)
    exact = ds4.load(blocky.folder, backend, cache="exact", context=128).logits(blocky.ids)
    effect = np.abs(whole - exact).mean()
    assert effect > 0.05  # it does round
    assert np.abs(steps - whole).mean() < effect / 5


def test_an_expert_named_twice_counts_twice(backend: str, tiny: Case) -> None:
    llm = load(tiny, backend)
    be, w = llm.runner.be, llm.runner.weights.layers[0].ffn
    x = be.upload(np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32))

    def run(ids: list[list[int]], weights: list[list[float]]) -> np.ndarray:
        pick, share = np.array(ids, np.int32), np.array(weights, np.float32)
        return be.download(be.experts(w, x, be.upload(pick), be.upload(share), 10.0))

    twice = run([[5, 5], [1, 2], [5, 5]], [[0.25, 0.5], [1, 1], [0.5, 0.5]])
    once = run([[5, 0], [1, 2], [5, 1]], [[0.75, 0], [1, 1], [1, 0]])
    assert distance(twice, once) <= 1e-5


def test_an_interrupted_step_loses_nothing(
    tiny: Case, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Rows written before Ctrl-C count: a rewind that would need older ones is refused."""
    llm = load(tiny, backend)
    llm.runner = runner = Runner(
        llm.runner.be, llm.config, llm.runner.weights, context=128, max_chunk=8
    )
    absorb(runner, 0, tiny.ids[:40], [8] * 5)
    with monkeypatch.context() as patch:
        patch.setattr(llm.runner.be, "hc_head", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.run({0: tiny.ids[::-1][:8]})
    assert runner.lengths == [40]
    assert runner.can_rewind(0, 40)
    assert not runner.can_rewind(0, 39)
    assert distance(absorb(runner, 0, tiny.ids[40:], [8, 8, 4]), tiny.want[40:]) <= GATE


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt
