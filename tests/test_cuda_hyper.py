"""Hyper-connection and norm kernels of the CUDA backend, interpreted and compiled."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ds4.backends.reference.ops import Reference

from ds4.errors import BackendError

pytest.importorskip("triton")

from ds4.backends.cuda.kernels import embed, hyper, norm
from ds4.backends.cuda.kernels.hyper_finish import finish_kernel
from ds4.backends.cuda.kernels.hyper_mix import mix_many, mix_one
from ds4.backends.cuda.weights import Packed, dense

EPS, ROUNDS, D = 1e-6, 20, 64
CFG = SimpleNamespace(hc_mult=4, hc_eps=EPS, rms_norm_eps=EPS, hc_sinkhorn_iters=ROUNDS)
REFERENCE = Reference()


def random(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape)).float()


def weights(rows: int) -> SimpleNamespace:
    scale = torch.tensor([1, 0.5, 2.0] if rows == 24 else [0.7])
    return SimpleNamespace(fn=random(rows, 4 * D) / 8, scale=scale, base=random(rows))


def state(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, hyper.Mix]:
    """Streams, the two parts of an output, one a slice of wider rows, and a mix."""
    mix = random(tokens, 4).exp(), random(tokens, 16).exp() / 4
    return random(tokens, 4, D), random(tokens, D + 16)[:, :D], random(tokens, D + 1)[:, :D], mix


def on_host(w: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(**{name: x.numpy() for name, x in vars(w).items()})


def activation(tokens: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """A panel, with columns to spare, or rows."""
    if tokens <= hyper.SMALL:
        return torch.zeros(D // 8, tokens + 2, 8).half(), (8 * (tokens + 2), 8)
    return torch.zeros(tokens, D).half(), (8, D)


def rows_of(x: torch.Tensor, tokens: int) -> np.ndarray:
    rows = x if x.ndim == 2 else x.permute(1, 0, 2).flatten(1)[:tokens]
    return rows.float().numpy()


def new_streams(h: torch.Tensor, y: torch.Tensor, mix: hyper.Mix) -> np.ndarray:
    post, comb = mix[0].numpy(), mix[1].view(-1, 4, 4).numpy()
    return REFERENCE.hc_post(y.numpy(), h.numpy(), (post, comb))


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_sublayer(tokens: int) -> None:
    """One program a token, tensor cores, and many tokens."""
    w, gain = weights(24), random(D)
    h, y, y2, mix = state(tokens)
    want = new_streams(h, y + y2, mix)
    thirds = torch.stack([y / 4, y / 2, y / 4], 1)
    room = torch.full((tokens, hyper.pieces(tokens, D), 64), 3e38)  # memory as it may be
    streams, sums = hyper.post_mix(h, thirds, mix, w.fn, y2=y2, partial=room)
    whole, _ = hyper.post_mix(h, y, mix, w.fn, y2=y2)
    np.testing.assert_allclose(streams, whole, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(streams, want, rtol=1e-5, atol=2e-6)
    x, strides = activation(tokens)
    found = hyper.finish(
        streams, sums, w.scale, w.base, gain, x, strides, eps=EPS, hc_eps=EPS, rounds=ROUNDS
    )
    want_x, (post, comb) = REFERENCE.hc_pre(on_host(w), gain.numpy(), want, CFG)
    np.testing.assert_allclose(rows_of(x, tokens), want_x, rtol=6e-4, atol=1e-4)
    np.testing.assert_allclose(found[0], post, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], comb.reshape(tokens, 16), rtol=1e-5, atol=1e-6)
    apart = hyper.next_mix(sums, w.scale, w.base, D, eps=EPS, hc_eps=EPS, rounds=ROUNDS)
    assert all(map(torch.equal, apart, found))


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", [2, 40])
def test_first_sublayer_reads_the_embedding(tokens: int) -> None:
    w, table = weights(24), random(9, D).bfloat16()
    ids = torch.arange(tokens, dtype=torch.int32) * 5 % 9
    streams, sums = hyper.embed_mix(table, ids, w.fn)
    want = table.float()[ids.long()][:, None].repeat(1, 4, 1)
    assert torch.equal(streams, want)
    projected = want.flatten(1) @ w.fn.T
    np.testing.assert_allclose(sums.sum(1)[:, :24], projected, atol=1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", [3, 40])
def test_head_makes_the_wanted_rows(tokens: int) -> None:
    w, gain = weights(4), random(D)
    h, y, _, mix = state(tokens)
    rows = torch.arange(tokens - 1, -1, -2, dtype=torch.int32)
    x, strides = activation(len(rows))
    hyper.head(h, y, mix, w.fn, w.scale, w.base, gain, rows, x, strides, eps=EPS, hc_eps=EPS)
    streams = new_streams(h, y, mix)[rows.numpy()]
    want = REFERENCE.rms_norm(gain.numpy(), REFERENCE.hc_head(on_host(w), streams, CFG), EPS)
    np.testing.assert_allclose(rows_of(x, len(rows)), want, rtol=6e-4, atol=1e-4)


@pytest.mark.interpret
def test_norm_saturates() -> None:
    tokens = 3
    x, gain = random(tokens, D + 8)[:, :D], random(D)
    gain[5], x[1, 5] = 1e6, 2
    y, strides = activation(tokens)
    norm.rms_norm(x, gain, y, strides, EPS)
    want = REFERENCE.rms_norm(gain.numpy(), x.numpy(), EPS).clip(-65504, 65504)
    np.testing.assert_allclose(rows_of(y, tokens), want, rtol=6e-4, atol=1e-4)


def test_shapes_that_cannot_be_served_are_refused() -> None:
    h, mix = torch.zeros(1, 4, 40), (torch.zeros(1, 4), torch.zeros(1, 16))
    with pytest.raises(BackendError, match="hidden_size 40"):
        hyper.post_mix(h, h[:, 0], mix, torch.zeros(24, 160))
    with pytest.raises(BackendError, match="hc_mult"):
        hyper.post_mix(h[:, :2], h[:, 0], mix, torch.zeros(24, 80))


F = "*fp32"
MIX = dict.fromkeys(["h", "y", "y2", "post", "comb", "fn", "out", "partial"], F) | {"rows": "*i32"}
MIX |= dict.fromkeys(["y_row", "y2_row", "D"], "i32:16")
FLAGS = {"FN": 24, "EMBED": False, "GATHER": False, "SECOND": True, "PARTS": 6}
FINISH = dict.fromkeys(["h", "partial", "scale", "base", "norm", "post", "comb"], F)
FINISH |= {"x": "*fp16", "D": "i32:16", "T": "i32", "panel": "i32", "token": "i32"}
FINISH |= {"eps": "fp32", "hc_eps": "fp32"}


@pytest.mark.parametrize("arch", [90, 120])
def test_compiled(arch: int) -> None:
    """At the real model's shapes: no spills, and rows are read 16 bytes at a time."""
    from tests.triton_compile import compile_kernel

    one = compile_kernel(mix_one, MIX, FLAGS | {"BD": 64, "EARLY": True}, arch, 8)
    assert one.spills == 0
    assert one.loads[16] >= 16
    many = MIX | {"T": "i32"}
    for tiles in (
        {"BT": 16, "BD": 32, "STEPS": 1, "PRODUCE": True, "EARLY": True},
        {"BT": 32, "BD": 16, "STEPS": 32, "PRODUCE": False, "EARLY": False},
    ):
        warps = tiles["BT"] // 4 if tiles["PRODUCE"] else 2
        report = compile_kernel(mix_many, many, FLAGS | tiles, arch, warps, num_stages=2)
        assert report.spills == 0
        assert set(report.loads) == {16}
        assert report.count("mma") > 0
    small = {"S": 128, "SLICES": 8, "BD": 512, "BS": 128, "BT": 1, "MS": 128, "PRODUCE": True}
    small |= {"EARLY": True, "ROUNDS": ROUNDS}
    report = compile_kernel(finish_kernel, FINISH, small, arch)
    assert report.spills == 0


@pytest.mark.interpret
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_rows_of_an_embedding_of_few_bits(bits: int) -> None:
    """To the bit as PyTorch's operations make them; the last row's last code has no byte after."""
    rng = np.random.default_rng(bits)
    codes = torch.from_numpy(rng.integers(0, 256, (5, 640 * bits // 8), np.uint8))
    scales, biases = (
        torch.from_numpy(rng.standard_normal((5, 10), np.float32)).bfloat16() for _ in range(2)
    )
    table = Packed("affine", codes, scales, biases, bits)
    tokens = torch.tensor([4, 0, 4], dtype=torch.int32)
    assert embed.serves(table)
    assert torch.equal(embed.rows(table, tokens), dense(table[tokens.long()]))
