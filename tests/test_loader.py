"""Names, contexts and generation_config.json: what `ds4.load` makes of them."""

import json
import re
import shutil
from pathlib import Path

import pytest

import ds4
from ds4.errors import BackendError, ConfigError, ModelNotFound, PromptError
from ds4.loader import choose_backend, find_model
from tests.conftest import Case


def test_names_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nonsense", str(tmp_path / "missing"), str(tmp_path / "file"), "no/such-model"):
        with pytest.raises(ModelNotFound, match=r"demo|folder|download"):
            ds4.load(name)
    assert (find_model("demo") / "config.json").exists()


def test_a_folder_without_a_tokenizer_takes_ids_only(tiny: Case) -> None:
    llm = ds4.load(tiny.folder, "reference", cache="exact")
    assert len(llm.generate([0, 5, 9], max_tokens=4, temperature=0).tokens) <= 4
    for prompt in ("text", [{"role": "user", "content": "hi"}]):
        with pytest.raises(PromptError, match=re.escape(f"{tiny.folder / 'tokenizer.json'} is")):
            llm.generate(prompt)


def test_prompts_that_cannot_run(tiny: Case) -> None:
    llm = ds4.load(tiny.folder, "reference", cache="exact", context=16)
    with pytest.raises(PromptError, match=r"16 tokens.*context of 16"):
        llm.generate([1] * 16)
    with pytest.raises(PromptError, match="17 tokens do not fit"):
        llm.logits([1] * 17)
    for token in (512, -1):
        with pytest.raises(PromptError, match=f"token {token} is not"):
            llm.generate([0, token])
    with pytest.raises(PromptError, match="empty"):
        llm.generate([])
    assert llm.generate([1] * 15, temperature=0).finish_reason == "length"


def test_backends_and_contexts_that_are_not_there(tiny: Case) -> None:
    with pytest.raises(BackendError, match="reference"):
        ds4.load(tiny.folder, "abacus")
    with pytest.raises(BackendError, match="cpu"):
        ds4.load(tiny.folder, "reference", "gpu")
    with pytest.raises(BackendError, match="device"):
        ds4.load(tiny.folder, "cuda", "nonsense")
    if not pytest.importorskip("torch").cuda.is_available():
        with pytest.raises(BackendError, match=r"no NVIDIA GPU.*--device cpu"):
            ds4.load(tiny.folder, "cuda")
    with pytest.raises(ConfigError, match="slots must be at least 1"):
        ds4.load(tiny.folder, "reference", cache="exact", slots=0)
    with pytest.raises(ConfigError, match="context must be from 1 to 4096"):
        ds4.load(tiny.folder, "reference", cache="exact", context=5000)
    with pytest.raises(ConfigError, match="cache=exact"):
        ds4.load(tiny.folder, "reference", cache="native")
    assert choose_backend()[0] in ("reference", "mlx", "cuda")


def test_the_model_says_how_it_wants_to_be_sampled(tiny: Case, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.folder, tmp_path / "model")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "do_sample": True}))
    llm = ds4.load(folder, "reference", cache="exact")
    assert llm.defaults == {"temperature": 0.6, "top_p": 0.9}
    file.write_text(json.dumps({"temperature": 0.6, "do_sample": False}))
    assert ds4.load(folder, "reference", cache="exact").defaults == {"temperature": 0}
    hot, many = '{"temperature": "hot"}', '{"top_k": 1e30}'
    for bad in ('{"temperature": -1}', hot, many, "[1]", "{"):
        file.write_text(bad)
        with pytest.raises(ConfigError, match="generation_config"):
            ds4.load(folder, "reference", cache="exact")


def test_a_drafter_is_reported_and_left_out(tmp_path: Path) -> None:
    from tests.fixtures import official_fixture

    official_fixture(tmp_path)
    llm = ds4.load(tmp_path, "reference")
    assert [extra.kind for extra in llm.unused] == ["mtp"]
    assert llm.unused[0].nbytes > 0


def test_public_names_exist() -> None:
    for name in ds4.__all__:
        assert getattr(ds4, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ds4.nonsense
