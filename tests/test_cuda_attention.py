"""Sparse attention of the CUDA backend: what it computes, interpreted; what it compiles to."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ds4.backends.reference.ops import Reference, Rows

from ds4.quant import formats

triton = pytest.importorskip("triton")

from ds4.backends.cuda.kernels.attention import Tiling, attention  # noqa: E402

f32 = np.float32
H, C, R, WINDOW, SIZE, ENTRIES = 3, 128, 64, 24, 40, 64
CASES = {  # ratio, whether entries are chosen, slots, positions
    "chosen": (4, True, [0, 1, 1, 0, 1], [199, 0, 6, -1, 130]),
    "all": (4, False, [1, 0, 0], [3, 253, 100]),
    "window": (0, False, [0, 1], [22, 999_990]),
}


def stored(size: int, written: np.ndarray, exact: bool, seed: int) -> tuple[Rows, list[Any]]:
    """Random rows where `written` (slots, size), else NaN: for the reference, and as planes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(written), size + 1, C)).astype(f32)
    x *= 2.0 ** rng.integers(-6, 3, (*x.shape[:2], 1))
    x[:, size] = np.nan
    x[:, :size][~written] = np.nan
    if exact:
        return Rows("float", x, R), [torch.from_numpy(x)]
    unknown, x = np.isnan(x[..., :1]), np.nan_to_num(x)
    groups = x[..., : C - R].reshape(*x.shape[:2], -1, 64)
    exponent = formats.power_of_two_above(np.abs(groups).max(-1).clip(1e-4) / 448)
    codes = formats.encode_e4m3(np.ldexp(groups, -exponent[..., None])).reshape(*x.shape[:2], -1)
    scales = np.full((*x.shape[:2], 8), 255, np.uint8)
    scales[..., : exponent.shape[-1]] = exponent + 127
    rows = np.where(unknown, np.nan, formats.round_kv(x, R))
    tail = torch.from_numpy(np.where(unknown, np.nan, x[..., C - R :])).bfloat16()
    planes = np.where(unknown, np.uint8(127), codes), np.where(unknown, np.uint8(255), scales)
    return Rows("kv", rows, R), [*map(torch.from_numpy, planes), tail]


def choose(pos: list[int], ratio: int, rng: np.random.Generator) -> np.ndarray:
    """Up to 30 different visible entries a token at any of 40 places, -1 elsewhere."""
    ids = np.full((len(pos), 40), -1, np.int32)
    for t, p in enumerate(pos):
        n = min(30, (p + 1) // ratio)
        ids[t, np.sort(rng.permutation(40)[:n])] = rng.permutation((p + 1) // ratio)[:n]
    return ids


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("exact", "splits"), [(True, 1), (True, 3), (False, 1), (False, 3)])
def test_attention(name: str, exact: bool, splits: int) -> None:
    """Several slots, padding, wrapped rings, NaN in all that was never written, a panel output."""
    ratio, chosen, slot, pos = CASES[name]
    rng = np.random.default_rng(1)
    written, known = np.zeros((2, SIZE), bool), np.zeros((2, ENTRIES), bool)
    for s, p in zip(slot, pos, strict=True):
        written[s, np.arange(max(0, p - WINDOW + 1), p + 1) % SIZE] = True
        known[s, : (p + 1) // ratio if ratio else 0] = True
    ring, ring_planes = stored(SIZE, written, exact, 2)
    pool, pool_planes = stored(ENTRIES, known, exact, 3) if ratio else (None, None)
    ids = choose(pos, ratio, rng) if chosen else None
    q = rng.standard_normal((len(pos), H * C + 4)).astype(f32)  # a slice of a wider product
    heads = q[:, : H * C].reshape(-1, H, C)
    freqs = (10000.0 ** -np.linspace(0, 1, R // 2, endpoint=False)).astype(f32)
    sink = rng.standard_normal(H).astype(f32)
    slots, positions = np.array(slot, np.int32), np.array(pos, np.int32)
    want = Reference().attention(
        SimpleNamespace(ratio=ratio, freqs=freqs, attn_sink=sink),
        SimpleNamespace(window=ring, pool=pool),
        SimpleNamespace(slot=slots, pos=positions),  # type: ignore[arg-type]
        heads,
        ids,
        SimpleNamespace(sliding_window=WINDOW, rms_norm_eps=1e-6),  # type: ignore[arg-type]
    )

    T, N = len(pos), len(pos) + 1
    out = torch.full((H * C // 8, N, 8), torch.nan, dtype=torch.float32 if exact else torch.float16)
    given = [torch.from_numpy(x) for x in (freqs, sink, slots, positions)]
    attention(
        torch.from_numpy(q)[:, : H * C].unflatten(1, (H, C)),
        *given,
        None if ids is None else torch.from_numpy(ids),
        ring_planes,
        pool_planes,
        ratio,
        WINDOW,
        1e-6,
        out,
        8 * N,
        8,
        Tiling(16, 16, splits, 4),
    )
    got = out[:, :T].permute(1, 0, 2).reshape(T, H, C).numpy()
    live = positions >= 0
    np.testing.assert_array_equal(got[~live], 0)
    error = np.linalg.norm(got[live] - want[live]) / np.linalg.norm(want[live])
    assert error < (1e-6 if exact else 1e-3)
    assert torch.isnan(out[:, T:]).all()
