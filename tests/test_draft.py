"""Drafters: the two in checkpoints against a transcription of their description, and look-up."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ds4.backend import CacheMode, open_backend
from ds4.config import Config
from ds4.draft.drafter import Ask
from ds4.draft.dspark import Dspark
from ds4.draft.lookup import Lookup
from ds4.draft.mtp import Mtp
from ds4.errors import CheckpointError
from ds4.runner import Runner
from ds4.sampler import Sampler, SamplingParams
from ds4.step import Chunk, plan
from ds4.weights import Checkpoint, load_weights
from ds4.weights.load import load_drafter
from ds4.weights.names import Drafter, expected_drafter
from ds4.weights.tensor import HostTensor
from tests import draft_oracle as oracle
from tests.conftest import BACKENDS
from tests.fixtures import plain_tensors, random_official_state, small_config, values, write_folder
from tests.loading import Keep

TAPS, CHUNK = [0, 1, 3], 64
NARROW = {
    "num_hidden_layers": 4,
    "compress_ratios": [0, 4, 8, 4, 0],
    "num_hash_layers": 1,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "head_dim": 128,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "vocab_size": 96,
    "sliding_window": 8,
    "dspark_target_layer_ids": TAPS,
    "dspark_markov_rank": 16,
    "dspark_noise_token_id": 95,
}
GREEDY = Sampler(SamplingParams(temperature=0.0), [], 96)
Made = tuple[Path, Config, dict[str, np.ndarray]]


@pytest.fixture(scope="module", params=["mtp", "dspark"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp(request.param), request.param)


def make(folder: Path, kind: Drafter) -> Made:
    fields = small_config(**NARROW)
    cfg = Config.from_dict(fields)
    rng = np.random.default_rng(5)
    state = random_official_state(fields, 3)
    state |= {name: values(name, s, cfg, rng) for name, s in expected_drafter(cfg, kind).items()}
    write_folder(folder, fields, plain_tensors(state))
    return folder, cfg, state


def runner_of(made: Made, backend: str, cache: CacheMode, slots: int = 2) -> tuple[Runner, Any]:
    folder, cfg, _ = made
    be: Any = open_backend(backend, "cpu", cache)
    checkpoint = Checkpoint(folder)
    weights, own = load_weights(be, cfg, checkpoint), load_drafter(be, cfg, checkpoint)
    runner = Runner(be, cfg, weights, 128, slots, CHUNK)
    drafter = (Mtp if own.kind == "mtp" else Dspark)(runner, own)
    runner.attach(drafter)
    return runner, drafter


def streams_of(made: Made, cache: CacheMode, ids: list[int]) -> list[np.ndarray]:
    """The reference's streams after each layer, (T, H, D)."""
    folder, cfg, _ = made
    be, seen = open_backend("reference", cache=cache), dict[int, np.ndarray]()
    runner = Runner(be, cfg, load_weights(be, cfg, Checkpoint(folder)), 128, 1, len(ids))
    spy: Any = Lookup()
    spy.near, spy.watch = 1000, lambda step: seen.__setitem__
    runner.attach(spy)
    runner.run({0: ids})
    return [seen[layer] for layer in range(cfg.num_hidden_layers)]


def feed(runner: Runner, slot: int, ids: list[int], chunks: list[int]) -> None:
    at = 0
    while at < len(ids):
        size = chunks[at % len(chunks)]
        runner.run({slot: ids[at : at + size]})
        at += size


@pytest.mark.parametrize(
    ("backend", "cache"), [("reference", "native"), *((name, "exact") for name in BACKENDS)]
)
def test_a_drafter_says_what_its_description_says(
    made: Made, backend: str, cache: CacheMode
) -> None:
    _, cfg, state = made
    runner, drafter = runner_of(made, backend, cache)
    rng = np.random.default_rng(0)
    said: list[np.ndarray] = []
    spy(drafter, said)
    for length, chunks in ((1, [1]), (6, [3, 1]), (8, [8]), (41, [1, 5, 24]), (60, [24])):
        ids = rng.integers(0, 96, length + 1).tolist()
        runner.rewind(1, 0)
        # rounded, what the model leaves would depend on its chunks: a value may fall to either side
        feed(runner, 1, ids[:-1], chunks if cache == "exact" else [length])
        streams = streams_of(made, cache, ids[:-1])
        if drafter.name == "mtp":
            want = oracle.mtp(state, cfg, streams[-1], ids, 3, cache == "native")
        else:
            taps = [streams[layer] for layer in TAPS]
            want, sure = oracle.dspark(state, cfg, taps, ids[-1], cache == "native")
        said.clear()
        draft = drafter.propose([Ask(1, ids, 5, GREEDY)])
        got = np.concatenate([runner.be.download(x) for x in said])
        tolerance = 5e-4 if cache == "exact" else 3e-2
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)
        if cache == "exact":
            assert draft.guesses == [want.argmax(-1).tolist()]
        if drafter.name == "dspark" and cache == "exact":
            word = 1 / (1 + np.exp(-np.asarray(sure)))
            np.testing.assert_allclose(draft.sure[0], word, atol=1e-3)


def spy(drafter: Any, said: list[Any]) -> None:
    """Note the logits that a drafter's guesses are taken from."""
    best = drafter.be.best

    def noted(logits: Any) -> Any:
        said.append(logits)
        return best(logits)

    drafter.be.best = noted


def test_blocks_are_attended_to_with_rounded_rows(backend: str) -> None:
    cfg = Config.from_dict(small_config(**NARROW))
    rng, size = np.random.default_rng(0), cfg.dspark.block_size
    q = rng.standard_normal((2 * size, cfg.num_attention_heads, cfg.head_dim), np.float32)
    kv, stored = (rng.standard_normal((n, cfg.head_dim), np.float32) for n in (2 * size, 11))
    step = plan([Chunk(1, 11, [0] * size), Chunk(0, 3, [0] * size)], [])
    outs = []
    for name in (backend, "reference"):
        be: Any = open_backend(name, "cpu", "native")
        w = SimpleNamespace(
            **{
                part: be.load(part, HostTensor("f32", x.astype(np.float32)))
                for part, x in {
                    "kv_norm": np.linspace(0.5, 2, cfg.head_dim),
                    "attn_sink": np.arange(cfg.num_attention_heads),
                    "freqs": cfg.rope_freqs(0),
                }.items()
            }
        )
        ring = be.alloc("kv", 2, 16, cfg.head_dim, cfg.qk_rope_head_dim)
        for slot, count in ((0, 3), (1, 11)):
            be.write(
                ring, be.upload(stored[:count]), plan([Chunk(slot, 0, [0] * count)], []).on(be)
            )
        args = step.on(be), be.upload(q), be.upload(kv)
        outs.append(be.download(be.attend_block(w, ring, *args, size, cfg)))
    np.testing.assert_allclose(*outs, atol=1e-5)


def guess(lookup: Lookup, text: list[int], count: int = 4, slot: int = 0) -> list[int]:
    return lookup.propose([Ask(slot, text, count, GREEDY)]).guesses[0]


def test_lookup_says_what_followed_the_longest_run() -> None:
    lookup = Lookup(longest=3)
    assert guess(lookup, [1]) == []
    assert guess(lookup, [1, 2, 3]) == []
    text = [1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2, 3]
    assert guess(lookup, text) == [4, 5, 9]  # after 1 2 3, though 2 3 was last followed by 7
    assert guess(lookup, text, count=2) == [4, 5]
    assert guess(lookup, [*text, 7, 2, 3]) == [7, 2, 3]
    assert guess(lookup, [5, 5, 5]) == [5]
    assert guess(lookup, [8, 6, 8, 6], slot=1) == [8, 6]
    assert guess(lookup, [0, 2, 3]) == []  # another text in the slot


def test_a_checkpoint_says_which_drafter_it_has(made: Made, tmp_path: Path) -> None:
    folder, cfg, state = made
    kind, nbytes = Checkpoint(folder).check_drafter(cfg)
    assert kind == folder.name[: len(kind)]
    assert nbytes == 4 * sum(x.size for name, x in state.items() if name.startswith("mtp."))
    kept = Keep()
    load_drafter(kept, cfg, Checkpoint(folder))
    loaded = sum(tensor.decode().size for name, tensor in kept.given.items() if "freqs" not in name)
    assert 4 * loaded == nbytes
    fields = small_config(**NARROW)
    missing = {name: x for name, x in state.items() if name != "mtp.0.ffn.experts.3.w2.weight"}
    for change, want in (
        (missing, "mtp.0.ffn.experts.3.w2.weight"),
        (state | {"mtp.0.ffn.gate.tid2eid": np.zeros(2)}, "no place"),
        ({name: x for name, x in state.items() if "mtp" not in name}, "no drafter"),
    ):
        target = tmp_path / want.replace(" ", "")
        write_folder(target, fields, plain_tensors(change))
        with pytest.raises(CheckpointError, match=want):
            load_drafter(Keep(), cfg, Checkpoint(target))
