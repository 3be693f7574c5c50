"""The compile harness tells wide loads from narrow ones and sees spills; the interpreter runs."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.load(x + at, mask=inside, other=0) + tl.load(y + at, mask=inside, other=0)
    tl.store(out + at, total, mask=inside)


SIGNATURE = {"x": "*fp16", "y": "*fp16", "out": "*fp16", "n": "i32:16"}


@pytest.mark.parametrize("arch", [90, 120])
def test_report(arch: int) -> None:
    from tests.triton_compile import compile_kernel

    wide = compile_kernel(add, SIGNATURE, {"BLOCK": 1024}, arch)
    assert wide.loads == {16: 2}
    assert 0 < wide.registers < 64
    assert wide.spills == wide.stack == wide.shared == 0
    assert wide.count(r"st\.global\.v4") == 1
    narrow = compile_kernel(add, SIGNATURE | {"n": "i32"}, {"BLOCK": 1024}, arch)
    assert set(narrow.loads) == {2}
    crowded = compile_kernel(add, SIGNATURE, {"BLOCK": 1 << 15}, arch, num_warps=1)
    assert crowded.spills > 0


@pytest.mark.interpret
def test_interpreter() -> None:
    x, y = torch.randn(2, 100, dtype=torch.float32)
    out = torch.full((100,), torch.nan)
    add[(4,)](x, y, out, 100, BLOCK=32)
    assert torch.equal(out, x + y)
