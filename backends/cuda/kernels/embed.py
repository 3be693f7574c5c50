"""Rows of an embedding of few bits, for the tokens of a step."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights import Packed, Weight

BLOCK = 512


def serves(table: Weight) -> bool:
    """Whether `rows` can read it."""
    return isinstance(table, Packed) and table.format == "affine"


def rows(table: Packed, tokens: Tensor) -> Tensor:
    """float32 (T, D): an affine table (V, D) at tokens (T,) int32, as `dense` to the bit."""
    assert table.biases is not None
    width = table.codes.shape[1] * 8 // table.bits
    out = torch.empty(len(tokens), width, device=tokens.device)
    affine_rows[len(tokens), triton.cdiv(width, BLOCK)](
        table.codes, table.scales, table.biases, tokens, out, width,
        BITS=table.bits, GROUP=width // table.scales.shape[1], BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def affine_rows(
    codes, scales, biases, tokens, out, D,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """8 codes lie in BITS bytes: none touches more than two."""
    r, k = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok, t = k < D, tl.load(tokens + r).to(tl.int64)
    byte, size = k * BITS // 8, D // 8 * BITS
    at = codes + t * size + byte
    low, high = tl.load(at, ok, 0), tl.load(at + 1, ok & (byte + 1 < size), 0)
    code = (low.to(tl.int32) | high.to(tl.int32) << 8) >> k * BITS % 8 & (1 << BITS) - 1
    group = t * (D // GROUP) + k // GROUP
    scale, bias = tl.load(scales + group, ok, 0.0), tl.load(biases + group, ok, 0.0)
    tl.store(out + r * D + k, code.to(tl.float32) * scale.to(tl.float32) + bias.to(tl.float32), ok)
