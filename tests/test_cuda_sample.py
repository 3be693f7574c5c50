"""Penalties, greedy choice and draws of the CUDA backend, interpreted and compiled."""

import numpy as np
import pytest
import torch
from ds4.backends.reference.ops import Reference

pytest.importorskip("triton")

from ds4.backends.cuda.kernels import draw as drawing
from ds4.backends.cuda.kernels import sample

f32 = np.float32


@pytest.mark.interpret
def test_greedy_takes_the_lower_of_equal_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "CHUNK", 512)
    logits = np.random.default_rng(0).integers(-9, 9, (3, 1201)).astype(f32)
    logits[1, [700, 17, 1199]] = 20
    logits[2] = -np.inf
    logits[2, 1150] = -3
    want = logits.argmax(-1).tolist()
    assert sample.greedy(torch.from_numpy(logits)).tolist() == want


@pytest.mark.interpret
def test_adjust() -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((3, 700)).astype(f32)
    ids = np.stack([rng.permutation(700)[:300] for _ in range(3)]).astype(np.int32)
    ids[0, 5:9] = -1
    factor, offset = rng.random((3, 300), f32) + 0.5, rng.standard_normal((3, 300)).astype(f32)
    want = Reference().adjust(logits, ids, factor, offset)
    tensors = [torch.from_numpy(x) for x in (logits.copy(), ids, factor, offset)]
    np.testing.assert_array_equal(sample.adjust(*tensors), want)
    np.testing.assert_array_equal(tensors[0], logits)


def rules(rows: int, rng: np.random.Generator) -> list[np.ndarray]:
    """temperature, top_p, min_p, u."""
    return [
        rng.choice([0, 0.3, 1, 2.5], rows).astype(f32),
        rng.choice([0.01, 0.5, 0.9, 1], rows).astype(f32),
        rng.choice([0, 0.02, 0.5, 1], rows).astype(f32),
        rng.random(rows, f32),
    ]


@pytest.mark.interpret
@pytest.mark.parametrize("limited", [False, True])
def test_draws_follow_the_rule(limited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of distinct and of equal logits, in several chunks."""
    monkeypatch.setattr(drawing, "CHUNK", 64)
    monkeypatch.setattr(drawing, "STEP", 64)
    rng, rows = np.random.default_rng(2), 6
    logits = (3 * rng.standard_normal((rows, 97))).astype(f32)
    logits[::2] = np.round(logits[::2])
    logits[1, 50:] = -np.inf
    temperature, top_p, min_p, u = rules(rows, rng)
    temperature[:2] = 0.8
    top_k = rng.choice([0, 1, 2, 50, 97, 1000], rows).astype(np.int32)
    if not limited:
        top_k[:] = 0
    want = Reference().sample(logits, temperature, top_k, top_p, min_p, u)
    x, k, *rule = (torch.from_numpy(a) for a in (logits, top_k, top_p, min_p, u))
    heat = torch.from_numpy(temperature)
    assert drawing.draw(x, heat, k if limited else None, *rule).tolist() == want.tolist()


@pytest.mark.interpret
def test_draws_from_few_and_negative_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a grammar leaves them: the sign must not reach into the digits."""
    monkeypatch.setattr(drawing, "CHUNK", 64)
    monkeypatch.setattr(drawing, "STEP", 64)
    rng = np.random.default_rng(5)
    logits = -1 - np.abs(3 * rng.standard_normal((4, 97))).astype(f32)
    for row, count in enumerate((1, 2, 9)):
        logits[row, rng.permutation(97)[count:]] = -np.inf
    u = np.array([0, 0.9, 0.4, 0.7], f32)
    one, none = np.ones(4, f32), np.zeros(4, f32)
    want = Reference().sample(logits, one, none.astype(np.int32), one, none, u)
    x, heat, *rule = (torch.from_numpy(a) for a in (logits, one, one, none, u))
    assert drawing.draw(x, heat, None, *rule).tolist() == want.tolist()


SIGNATURE = dict.fromkeys(["logits", "value", "temperature", "top_p", "min_p", "u"], "*fp32")
SIGNATURE |= {"tables": "*i64", "likely": "*i64", "after": "*i64", "V": "i32:16", "row": "i32:16"}
SIGNATURE |= dict.fromkeys(["top_k", "equal", "id", "out"], "*i32")
SHAPE = {"CHUNK": 1024, "CHUNKS": 127, "BLOCK": 128, "STEP": drawing.STEP, "TOP_K": True}
KERNELS = {
    "first": (drawing._histogram, {"DIGIT": 0, "KIND": 0}),
    "last": (drawing._histogram, {"DIGIT": 3, "KIND": 1}),
    "equals": (drawing._equals, {}),
    "pick": (drawing._pick, {}),
}


@pytest.mark.parametrize("arch", [90, 120])
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled(kernel: str, arch: int) -> None:
    from tests.triton_compile import compile_kernel

    fn, constants = KERNELS[kernel]
    constants = {k: v for k, v in (SHAPE | constants).items() if k in fn.arg_names}
    types = {k: v for k, v in SIGNATURE.items() if k in fn.arg_names}
    assert compile_kernel(fn, types, constants, arch).spills == 0
