"""Likelihoods for tasks, and lm-evaluation-harness itself where it is installed (extra `eval`)."""

import json
import subprocess
import sys
import warnings
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ds4
from ds4.errors import PromptError
from ds4.eval.likelihood import Scorer
from ds4.eval.score import log_softmax
from ds4.llm import LLM

DEMO = Path(str(resources.files("ds4") / "demo"))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return ds4.load(DEMO, "cuda", "cpu", context=300)


def by_hand(llm: LLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    rows = log_softmax(llm.logits([*context, *continuation]))[len(context) - 1 : -1]
    found = rows[np.arange(len(rows)), continuation].sum()
    return float(found), rows.argmax(-1).tolist() == continuation


def test_likelihoods_do_not_depend_on_what_was_read_before(llm: LLM) -> None:
    scorer, rng = Scorer(llm), np.random.default_rng(0)
    base = [0, *rng.integers(3, 4000, 280).tolist()]
    greedy = int(llm.logits(base[:270])[-1].argmax())
    asked = [
        (base[:270], [5, 6, 7]),
        (base[:270], [greedy]),
        (base[:270], rng.integers(3, 4000, 20).tolist()),
        (base[:20], [9]),  # further back than a cache can go
        (base[:1], base[1:280]),  # longer than a chunk
        (base[:276], base[276:280]),
    ]
    for context, continuation in asked:
        want, best = by_hand(llm, context, continuation)
        found = scorer.score(context, continuation)
        assert found.log_probability == pytest.approx(want, abs=2e-2 * len(continuation))
        assert found.greedy == best
    assert scorer.score(base[:270], [greedy]).greedy


def test_a_long_context_loses_its_beginning(llm: LLM) -> None:
    scorer, rng = Scorer(llm), np.random.default_rng(1)
    long, end = rng.integers(3, 4000, 400).tolist(), [7, 8]
    assert scorer.score(long, end) == Scorer(llm).score(long[-299:], end)
    with pytest.raises(PromptError, match="does not fit the context of 300"):
        scorer.score([0], long)
    with pytest.raises(PromptError, match="begin token"):
        scorer.score([], end)


def test_without_the_harness_the_remedy_is_said() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; from runpy import run_module as run; "
    code += "run('ds4.eval', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "lm_eval.__main__ is missing: pip install 'ds4[eval]'" in done.stderr


# the harness itself

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
  cache_dir: {cache}
test_split: train
output_type: {kind}
doc_to_text: {text}
doc_to_target: {target}
target_delimiter: " "
{more}
metric_list:
  - metric: {metric}
"""
DOCS = [
    {"question": "He took off his hat and bowed to the", "choices": ["qx zz", "lady"], "answer": 1},
    {"question": "It was a dark and stormy", "choices": ["night", "purple of"], "answer": 0},
]
KINDS: list[dict[str, Any]] = [
    {
        "name": "choose",
        "kind": "multiple_choice",
        "text": "'{{question}}'",
        "target": "answer",
        "more": "doc_to_choice: choices",
        "metric": "acc",
    },
    {
        "name": "write",
        "kind": "generate_until",
        "text": "'{{question}}'",
        "target": "'{{choices[answer]}}'",
        "more": "generation_kwargs: {until: ['.'], max_gen_toks: 6}",
        "metric": "exact_match",
    },
    {
        "name": "read",
        "kind": "loglikelihood_rolling",
        "text": "''",
        "target": "question",
        "more": "",
        "metric": "byte_perplexity",
    },
]


@pytest.fixture(scope="module")
def harness() -> Any:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'ds4[eval]'")
    with warnings.catch_warnings(action="ignore"):  # of the harness's own imports
        from ds4.eval import harness

    return harness


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_the_three_requests_of_the_harness(harness: Any, llm: LLM) -> None:
    tokens = llm.tokenizer
    assert tokens is not None
    lm = harness.Ds4LM.create_from_arg_string("model=demo,backend=cuda,device=cpu,context=300")
    context, ends = "The old man looked at the", [" sea", " sky and said"]
    found = lm.loglikelihood([request(context, end) for end in ends], disable_tqdm=True)
    for end, (value, greedy) in zip(ends, found, strict=True):
        before, both = ([0, *tokens.encode(text)] for text in (context, context + end))
        want = by_hand(llm, before, both[len(before) :])
        assert (value, greedy) == (pytest.approx(want[0], abs=2e-2), want[1])

    text = "It was a dark night, and the sun began to fall upon the sea. " * 24
    ids = tokens.encode(text)
    assert len(ids) > 300
    first = by_hand(llm, [0], ids[:299])[0]
    last = by_hand(llm, ids[len(ids) - 300 : 299], ids[299:])[0]
    rolled = lm.loglikelihood_rolling([request(text)], disable_tqdm=True)[0]
    assert rolled == pytest.approx(first + last, abs=1.0)

    want = llm.generate("Once upon a", max_tokens=12, temperature=0)
    asked = {"until": [want.text[-3:]], "max_gen_toks": 12}
    answer = lm.generate_until([request("Once upon a", asked)], disable_tqdm=True)[0]
    assert want.text.startswith(answer)
    assert want.text[-3:] not in answer
    chat = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert llm.chat is not None
    assert lm.tok_encode(chat) == llm.chat.encode([{"role": "user", "content": "Hi"}], "off")


@pytest.mark.filterwarnings("ignore")
def test_the_harness_runs_local_tasks(harness: Any, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    data = tmp_path / "docs.json"
    data.write_text("\n".join(json.dumps(doc) for doc in DOCS))
    for kind in KINDS:
        text = TASK.format(data=data, cache=tmp_path / "cache", **kind)
        (tmp_path / f"{kind['name']}.yaml").write_text(text)
    found = lm_eval.simple_evaluate(
        model="ds4",
        model_args={"model": "demo", "backend": "cuda", "device": "cpu", "context": 128},
        tasks=[kind["name"] for kind in KINDS],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    assert found["choose"]["acc,none"] == 1
    assert found["write"]["exact_match,none"] in (0, 0.5, 1)
    assert 1.5 < found["read"]["byte_perplexity,none"] < 4
