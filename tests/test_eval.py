"""Scores of a model on a text, the ladder of recipes, and the command."""

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import ds4
from ds4.cli import app
from ds4.errors import PromptError
from ds4.eval.ladder import Ladder, Row
from ds4.eval.markdown import write
from ds4.eval.report import Tables, cells, entry
from ds4.eval.score import Reference, Score, reader, score
from ds4.eval.variants import Variant, methods, prunings, recipes
from ds4.eval.windows import Windows, cut
from ds4.llm import LLM
from ds4.quant.calibration import Calibration
from ds4.runner import Runner
from tests.fixtures import official_fixture

DEMO = Path(str(resources.files("ds4") / "demo"))
TEXT = (DEMO / "heldout.txt").read_text("utf-8")[:900]


@pytest.fixture(scope="module")
def exact() -> LLM:
    return ds4.load(DEMO, "reference", cache="exact", context=1)


@pytest.fixture(scope="module")
def native() -> LLM:
    return ds4.load(DEMO, "reference", cache="native", context=1)


# a score


def log_probabilities(llm: LLM, ids: tuple[int, ...]) -> np.ndarray:
    """Another way: the whole window at once, in float64."""
    runner = Runner(llm.runner.be, llm.config, llm.runner.weights, 256)
    rows = llm.runner.be.download(runner.run({0: ids}, every_row=True)).astype(np.float64)[:-1]
    peak = rows.max(-1, keepdims=True)
    return rows - peak - np.log(np.exp(rows - peak).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def windows(exact: LLM) -> Windows:
    assert exact.tokenizer is not None
    return cut(exact.tokenizer, TEXT, 70)


def test_windows_hold_every_token_once(exact: LLM, windows: Windows) -> None:
    assert exact.tokenizer is not None
    ids = exact.tokenizer.encode(TEXT)
    assert [token for window in windows.ids for token in window[1:]] == ids
    assert {window[0] for window in windows.ids} == {exact.tokenizer.bos_id}
    assert {len(window) for window in windows.ids[:-1]} == {71}
    assert (windows.tokens, windows.nbytes) == (len(ids), len(TEXT.encode()))
    assert cut(exact.tokenizer, TEXT, 70, 75).tokens == 75
    with pytest.raises(PromptError, match="empty"):
        cut(exact.tokenizer, "", 70)


def test_scores_by_definition(exact: LLM, native: LLM, windows: Windows) -> None:
    found = score(reader(native, windows), windows, Reference(reader(exact, windows), windows))
    theirs = [log_probabilities(exact, ids) for ids in windows.ids]
    ours = [log_probabilities(native, ids) for ids in windows.ids]
    losses = -np.concatenate(
        [a[np.arange(len(a)), ids[1:]] for a, ids in zip(ours, windows.ids, strict=True)]
    )
    p, q = np.concatenate(theirs), np.concatenate(ours)
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert found.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    bits = losses.sum() / np.log(2) / len(TEXT.encode())
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert kl.mean() > 1e-4
    assert found.mean_kl == pytest.approx(kl.mean(), abs=1e-6)
    assert found.kl_error == pytest.approx(kl.std() / np.sqrt(len(kl)), rel=1e-2)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean() < 1


def test_several_windows_at_once_score_alike(native: LLM, windows: Windows, backend: str) -> None:
    llm = native if backend == "reference" else ds4.load(DEMO, backend, "cpu", context=1)
    alone = score(reader(llm, windows), windows)
    together = Runner(llm.runner.be, llm.config, llm.runner.weights, 71, 3, max_chunk=32)
    np.testing.assert_allclose(score(together, windows).losses, alone.losses, atol=2e-2)
    found: list[tuple[int, int]] = []
    score(together, windows, progress=lambda *now: found.append(now))
    assert found[-1] == (windows.tokens, windows.tokens)
    assert [done for done, _ in found] == sorted({done for done, _ in found})


def test_a_model_beside_itself(native: LLM, windows: Windows) -> None:
    runner = reader(native, windows)
    found = score(runner, windows, Reference(runner, windows))
    assert (found.mean_kl, found.top1, found.kl_error) == (0, 1, 0)


def test_what_cannot_be_compared(
    native: LLM, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.tokenizer is not None
    short = cut(native.tokenizer, "Once upon", 8)
    runner = reader(native, short)
    reference = Reference(runner, short)
    with pytest.raises(PromptError, match="differ in tokenizer or vocabulary"):
        score(runner, windows, reference)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(PromptError, match=r"take .* bytes, but 9 are free.*TMPDIR"):
        Reference(runner, short)


# the ladder


def row(variant: Variant | None, kl: float, top1: float, nbytes: int = 3 << 20) -> Row:
    each = None if variant is None else np.array([kl, kl])
    share = None if variant is None else np.array([True] * round(top1 * 10) + [False] * 10)[:10]
    return Row(variant, nbytes, 8 << 20, Score(Windows(((0, 1, 2),), 5), np.ones(2), each, share))


def tables(better: float = 1.0) -> Tables:
    """As they should be; `better` spoils what should be small."""
    steps = [
        row(v, 0.6 - i / 10, i / 10 + 0.4) for i, v in enumerate(recipes())
    ]  # the last one is equal
    ways = {("rtn", False): 1.0, ("ls", False): 0.8, ("ls", True): 0.5, ("gptq", True): 0.45}
    found = [row(v, ways[v.method, v.calibrated] * 0.1, 0.5) for v in methods()]
    found = [row(r.variant, r.score.mean_kl * better, 0.5) if _best(r) else r for r in found]
    rules = [0.3 * better, 0.5, 0.4, 0.5, 0.6, 0.5, 0.5]
    dropped = [row(v, kl, 0.5) for v, kl in zip(prunings(16), rules, strict=True)]
    return Tables(row(None, 0, 0), steps, found, dropped)


def _best(r: Row) -> bool:
    return r.variant is not None and r.variant.method == "gptq"


def test_findings_say_what_the_rows_show() -> None:
    good = tables().findings()
    assert [finding.holds for finding in good] == [True] * 6
    bad = tables(better=2).findings()
    assert [finding.holds for finding in bad] == [True, True, True, True, False, False]
    assert "q2 1.80 times" in bad[4].figures
    assert "0.6000; by frequency 0.5000; at random 0.5000 (mean of 5" in bad[5].figures
    assert "0.4000 to 0.6000, of which 4 below REAP" in bad[5].figures
    upside_down = tables()
    upside_down.recipes.reverse()
    assert [finding.holds for finding in upside_down.findings()][:3] == [False] * 3
    slow = tables()
    slow.methods[2] = row(slow.methods[2].variant, 0.061, 0.5)
    assert not slow.findings()[3].holds


def test_rows_as_people_and_programs_read_them() -> None:
    found = row(Variant("q2"), 0.25, 0.9)
    assert cells(found) == [
        *("q2", "ls + calibration", "3.00 MiB", "3.00", "0.25000", "0.00000", "90.00%", "2.718")
    ]
    assert cells(row(None, 0, 0))[:2] == ["source", ""]
    assert cells(row(prunings(16)[0], 0, 1))[1] == "12 experts, REAP"
    assert entry(found)["kl"] == 0.25
    assert json.loads(json.dumps(entry(row(None, 0, 0))))["recipe"] is None


def test_variants_have_names_of_their_own() -> None:
    every = {*recipes(), *methods(), *prunings(16)}
    assert len({variant.name for variant in every}) == len(every) == 7 + 9 + 7
    seen = Calibration(9, {0: np.array([3, 1, 2])}, {0: np.array([1.0, 9.0, 2.0])}, {})
    assert Variant("q2").saliency(seen) is None
    by = {
        rule: Variant("q2", experts=2, rule=rule).saliency(seen) for rule in ("frequency", "REAP")
    }
    assert [np.argmax(found[0]) for found in by.values() if found] == [0, 1]
    first, again, other = (
        Variant("q2", experts=2, rule=f"random {n}").saliency(seen) for n in (0, 0, 1)
    )
    assert first is not None
    assert again is not None
    assert other is not None
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random"
    official_fixture(
        folder,
        num_hidden_layers=2,
        num_hash_layers=1,
        compress_ratios=[0, 4, 0],
        vocab_size=4096,
    )
    shutil.copy(DEMO / "tokenizer.json", folder)
    return folder


def test_a_ladder_is_made_once(random_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text((DEMO / "calibration.txt").read_text("utf-8")[:2000])
    said: list[str] = []

    def climb() -> tuple[Ladder, list[Row]]:
        def watch(what: str) -> None:
            said.append(what)

        def load(folder: Path) -> LLM:
            return ds4.load(folder, "cuda", "cpu", context=1)

        folder = tmp_path / "ladder"
        with Ladder(random_model, load, TEXT, other, 100, 120, folder, watch) as ladder:
            experts = Variant("q8_0", "rtn", False, 6, "REAP")
            return ladder, ladder.measure([Variant("q8_0"), Variant("q3_K_S"), experts])

    ladder, (lossless, small, pruned) = climb()
    assert (ladder.windows.tokens, len(ladder.windows.ids)) == (120, 2)
    assert (lossless.score.mean_kl, lossless.score.top1) == (0, 1)
    assert lossless.score.perplexity == ladder.top.score.perplexity
    assert small.score.mean_kl is not None
    assert small.score.mean_kl > 0
    assert pruned.score.mean_kl is not None
    assert pruned.score.mean_kl > 0
    assert small.nbytes < pruned.nbytes < lossless.nbytes
    assert pruned.parameters < small.parameters == lossless.parameters == ladder.top.parameters
    assert 3.25 < small.bits_per_weight < lossless.bits_per_weight
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(made) == 4 + 4 + 3  # a file a layer, and the drafter's, which pruning leaves out
    assert said[:2] == ["reading with the source", "calibrating"]
    said.clear()
    again = climb()[1]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert "calibrating" not in said
    assert [r.score.mean_kl for r in again] == [0, small.score.mean_kl, pruned.score.mean_kl]
    page = write(ladder, tables(), "ds4 eval X --ladder", ["backend cuda"])
    assert "\n- backend cuda\n" in page
    assert page.count("\n| q2 |") == 5
    assert page.count(": yes. ") == 6


# the command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *arguments])


def test_the_command(random_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    place = "--backend", "reference", "--window", "50"
    done = run(str(random_model), str(text), "--reference", str(random_model), "--json", *place)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["kl"], report["top1"], report["bytes"]) == (0, 1, len(TEXT.encode()))
    assert report["perplexity"] > 1000  # a random model of 4096 tokens
    assert report["backend"] == "reference"
    done = run(str(random_model), str(text), "--tokens", "20", *place)
    assert "text.txt, 20 tokens in 1 window: perplexity" in done.stdout
    assert "beside" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("demo", "--folder", "x"), "belong to --ladder"),
        (("demo", "--markdown", "x"), "belong to --ladder"),
        (("demo", "--ladder", "--reference", "demo"), "with the model itself"),
        (("demo", "--window", "0"), "--window"),
    ],
)
def test_options_that_do_not_fit(arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())


def test_a_report_that_cannot_be_written_is_noticed_at_once(tmp_path: Path) -> None:
    done = run("demo", "--ladder", "--markdown", str(tmp_path / "no" / "x.md"))
    assert isinstance(done.exception, FileNotFoundError)
    assert done.exception.filename == str(tmp_path / "no" / "x.md")


def test_texts_that_do_not_serve(random_model: Path, tmp_path: Path) -> None:
    text = str(DEMO / "heldout.txt")
    done = run(str(random_model), text, "--ladder", "--calibrate", text)
    assert isinstance(done.exception, PromptError)
    assert "the same" in str(done.exception)
    (tmp_path / "empty").touch()
    assert "empty" in str(run(str(random_model), str(tmp_path / "empty")).exception)
    assert "no such file" in str(run(str(random_model), str(tmp_path / "no")).exception).lower()
    bare = shutil.copytree(random_model, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert "tokenizer.json" in str(run(str(bare)).exception)
