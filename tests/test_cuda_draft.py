"""What drafters ask of the CUDA backend, its kernels interpreted, beside the reference."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ds4.backends.reference.ops import Reference
from torch import Tensor

from ds4.backend import CacheMode
from ds4.config import Config
from ds4.step import Chunk, Step, plan
from tests.fixtures import small_config

pytest.importorskip("triton")

from ds4.backends.cuda.activation import Activation
from ds4.backends.cuda.fast_drafting import FastDrafting
from ds4.backends.cuda.kernels import draft, norm
from ds4.backends.cuda.kernels.remember import write
from ds4.backends.cuda.pending import Head, Mixed
from ds4.backends.cuda.rows import alloc

CFG = Config.from_dict(small_config(hidden_size=64, num_attention_heads=2))
D, H = CFG.hidden_size, CFG.hc_mult


def rows_of(x: Activation) -> Tensor:
    data = x.data.transpose(0, 1).flatten(1)[: len(x)] if x.small else x.data
    return data.float()


class Kernels(FastDrafting):
    """Fast without a GPU: matrices are plain ones."""

    device = "cpu"

    def _remembered(self) -> None: ...

    def rms_norm(self, w: Tensor, x: Tensor, eps: float) -> Activation:
        out = Activation.empty(len(x), x.shape[1], self.device)
        norm.rms_norm(x, w, out.data, out.strides, eps)
        return out

    def linear(self, w: Tensor, x: Activation) -> Tensor:
        return rows_of(x) @ w.T


def arrays(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(s, np.float32) * s[-1] ** -0.5 for name, s in shapes.items()}


def both(shapes: dict[str, tuple[int, ...]]) -> tuple[Any, Any]:
    """The same random weights for the kernels and for the reference."""
    made = arrays(shapes)
    tensors = {name: torch.from_numpy(x) for name, x in made.items()}
    return SimpleNamespace(**tensors), SimpleNamespace(**made)


def close(got: Tensor, want: np.ndarray[Any, Any], tolerance: float = 2e-3) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


def on_torch(step: Step) -> Step:
    return step.on(SimpleNamespace(upload=torch.from_numpy))


def mixed(tokens: int, parts: int) -> Mixed:
    x = arrays({"h": (tokens, H, D), "y": (tokens, parts, D), "y2": (tokens, D)}, tokens)
    h, y, y2 = (torch.from_numpy(part) for part in x.values())
    mix = torch.rand(tokens, H) + 0.5, torch.rand(tokens, H * H)
    return Mixed(h, y if parts > 1 else y[:, 0], mix, y2)


def streams(h: Mixed) -> np.ndarray[Any, Any]:
    assert h.y2 is not None
    post, comb = (x.numpy() for x in h.mix)
    y = ((h.y.sum(1) if h.y.ndim == 3 else h.y) + h.y2).numpy()
    return Reference().hc_post(y, h.streams.numpy(), (post, comb.reshape(-1, H, H)))


@pytest.mark.interpret
@pytest.mark.parametrize("parts", [1, 3])
def test_streams_and_taps_are_those_after_the_sublayer(parts: int) -> None:
    h, be = mixed(5, parts), Kernels()
    want = streams(h)
    rows = torch.tensor([4, 1], dtype=torch.int32)
    for some, chosen in ((h, want), (replace(h, rows=rows), want[[4, 1]])):
        close(be.tap(some), chosen.mean(1), 1e-5)
        close(some.mixed(), chosen, 1e-5)
        ring = alloc("float", 2, 8, H * D, 0, "native", "cpu")
        step = on_torch(plan([Chunk(1, 6, [0] * (len(chosen) - 1))], [], pad_to=len(chosen)))
        draft.store_streams(be.streams(some), ring, step.slot, step.pos)
        assert ring.data is not None
        for token, row in enumerate(chosen[:-1]):
            close(ring.data[1, (6 + token) % 8], row.flatten(), 1e-5)
        close(ring.data[0, 8], chosen[-1].flatten(), 1e-5)  # padding's
    w, plain = both({"fn": (H, H * D), "scale": (1,), "base": (H,)})
    close(Head(w, some, CFG).state(), Reference().hc_head(plain, chosen, CFG), 1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_join_and_fuse(tokens: int) -> None:
    be, reference = Kernels(), Reference()
    shapes = {"e_proj": (D, D), "h_proj": (D, D), "enorm": (D,), "hnorm": (D,)}
    w, plain = both(shapes | {"embed": (30, D), "proj": (D, 3 * D)})
    step = plan([Chunk(0, 3, list(range(tokens)))], [])
    x = arrays({"x": (tokens, H * D), "a": (tokens, D), "b": (tokens, D), "c": (tokens, D)}, 1)
    ring, there = alloc("float", 1, 16, H * D, 0, "native", "cpu"), on_torch(step)
    write(ring, torch.from_numpy(x["x"]), there.slot, there.pos)
    joined = be.join(w, w.embed, there, be.recall(ring, there), CFG)
    close(joined.mixed(), reference.join(plain, plain.embed, step, x["x"], CFG))
    parts = [x["a"], x["b"], x["c"]]
    fused = be.fuse(w.proj, w.enorm, [torch.from_numpy(part) for part in parts], 1e-6)
    close(rows_of(fused), reference.fuse(plain.proj, plain.enorm, parts, 1e-6))


@pytest.mark.interpret
@pytest.mark.parametrize("cache", ["native", "exact"])
def test_blocks_see_each_other_and_the_rows_before(cache: CacheMode) -> None:
    be, reference, size = Kernels(), Reference(cache=cache), 5
    C, R, heads = CFG.head_dim, CFG.qk_rope_head_dim, CFG.num_attention_heads
    w, plain = both({"kv_norm": (C,), "attn_sink": (heads,)})
    plain.freqs = CFG.rope_freqs(0)
    w.freqs = torch.from_numpy(plain.freqs)
    ring = alloc("kv", 2, 24, C, R, cache, "cpu")
    own = reference.alloc("kv", 2, 24, C, R)
    x = arrays({"past": (41, C), "q": (2 * size, heads, C), "kv": (2 * size, C)}, 2)
    for slot, count in ((0, 3), (1, 41)):
        for at in range(0, count, 20):
            part = x["past"][at : min(at + 20, count)]
            step = plan([Chunk(slot, at, [0] * len(part))], [])
            reference.write(own, part, step)
            there = on_torch(step)
            write(ring, torch.from_numpy(part), there.slot, there.pos)
    step = plan([Chunk(1, 41, [0] * size), Chunk(0, 3, [0] * size)], [])
    want = reference.attend_block(plain, own, step, x["q"], x["kv"], size, CFG)
    q, kv = torch.from_numpy(x["q"]), torch.from_numpy(x["kv"])
    got = be.attend_block(w, ring, on_torch(step), q, kv, size, CFG)
    close(rows_of(got), want.reshape(2 * size, -1))


@pytest.mark.interpret
def test_markov() -> None:
    be, reference = Kernels(), Reference()
    w, plain = both({"w1": (30, 16), "w2": (30, 16), "confidence": (1, D + 16)})
    x = arrays({"base": (3, 30), "hidden": (3, D)}, 3)
    tokens = np.array([4, 0, 29])
    base, hidden = (torch.from_numpy(part) for part in x.values())
    got = be.markov(w, base, hidden, torch.from_numpy(tokens.astype(np.int32)))
    for one, other in zip(got, reference.markov(plain, *x.values(), tokens), strict=True):
        close(one, other)


F = "*fp32"
MIXED = dict.fromkeys(["h", "y", "y2", "post", "comb"], F) | {"rows": "*i32"}
SIZES = {"y_row": "i32:16", "y2_row": "i32:16", "D": "i32:16"}
RING = {"ring": F, "size": "i32", "slot": "*i32", "pos": "*i32"}
FLAGS = {"GATHER": False, "SECOND": True, "PARTS": 6, "BLOCK": 4096, "EARLY": True}
MARKOV = {"table": "*bf16", "tokens": "*i32", "hidden": F, "w": F, "y": "*fp16", "panel": "i32"}
MARKOV |= {"token": "i32", "out": F, "D": "i32:16"}
JOINED = RING | {"table": "*bf16", "ids": "*i32", "hnorm": F, "enorm": F, "x": "*fp16"}
JOINED |= {"x_panel": "i32", "x_token": "i32", "e": "*fp16", "e_panel": "i32", "e_token": "i32"}
JOINED |= {"eps": "fp32", "D": "i32:16"}


@pytest.mark.parametrize("arch", [90, 120])
def test_compiled(arch: int) -> None:
    """At the real model's width: no spills."""
    from tests.triton_compile import compile_kernel

    for kernel, signature, flags in (
        (draft._store_streams, MIXED | RING | SIZES, FLAGS),
        (draft._mean_of_streams, MIXED | {"out": F} | SIZES, FLAGS),
        (draft._join_inputs, JOINED, {"BLOCK": 4096, "EARLY": True}),
        (draft._markov_inputs, MARKOV, {"RANK": 256, "BR": 256, "BLOCK": 4096, "EARLY": True}),
    ):
        assert compile_kernel(kernel, signature, flags, arch, 8).spills == 0
