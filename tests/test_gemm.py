"""gemm.cu: compiled for several chips without one; its products, where there is a GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ds4.backends.cuda import nvrtc, qmatrix
from ds4.backends.cuda.kernels import dense, gemm, moe_gemm

from tests.sass import overwritten_operands

CHIPS = {
    "sm_80": gemm.Chip(False, 108, 164 << 10),
    "sm_89": gemm.Chip(False, 128, 100 << 10),
    "sm_90a": gemm.Chip(True, 132, 228 << 10),
    "sm_120": gemm.Chip(False, 170, 100 << 10),
}
FORMATS = [
    *[("mxfp4", 4, 32), ("mxfp8", 8, 32), ("f16", 16, 0), ("affine", 2, 64), ("affine", 2, 128)],
    *[("affine", bits, 64) for bits in (3, 4, 5, 6, 8)],
]
has_compiler = pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is for Linux")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def inspect(code: bytes, tool: str, option: str, tmp_path: Path) -> str:
    folder = pytest.importorskip("triton.backends.nvidia").__path__[0]
    (tmp_path / "code.cubin").write_bytes(code)
    command = [f"{folder}/bin/{tool}", option, tmp_path / "code.cubin"]
    return subprocess.run(command, capture_output=True, text=True).stdout


@has_compiler
@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("kind", [FORMATS[0], FORMATS[4]], ids=lambda k: k[0])
def test_no_spills_wide_loads_and_the_chips_own_products(
    arch: str, kind: tuple[str, int, int], tmp_path: Path
) -> None:
    sizes = [gemm.Build(*kind, tokens, 2, gated=True) for tokens in gemm.TILES]
    build = [b for b in sizes if gemm.has_room(b, CHIPS[arch])][-1]
    options = [f"--gpu-architecture={arch}", *build.options(CHIPS[arch])]
    code = nvrtc.compile(gemm.source(), options)
    usage = inspect(code, "cuobjdump", "-res-usage", tmp_path)
    assert re.search(r"Function gemm:\n.*STACK:0 .*LOCAL:0 ", usage), usage
    sass = inspect(code, "cuobjdump", "-sass", tmp_path)
    assert ("HGMMA.64x128x16" in sass) == (arch == "sm_90a")
    assert "LDGSTS.E.BYPASS" in sass
    assert "HGMMA" in sass or "HMMA.16816" in sass


def overwritten(source: str, build: gemm.Build, tmp_path: Path) -> list[str]:
    options = ["--gpu-architecture=sm_90a", *build.options(CHIPS["sm_90a"])]
    code = nvrtc.compile(source, options)
    return overwritten_operands(inspect(code, "nvdisasm", "-c", tmp_path), "gemm")


@has_compiler
@pytest.mark.parametrize("kind", [FORMATS[i] for i in (0, 1, 2, 5)], ids=str)
def test_operands_stay_until_their_product_is_done(
    kind: tuple[str, int, int], tmp_path: Path
) -> None:
    parts = 1 if kind[0] == "f16" else 2
    build = gemm.Build(*kind, 128, parts, gated=parts == 2)
    assert not overwritten(gemm.source(), build, tmp_path)


@has_compiler
def test_an_operand_straight_from_a_load_would_not_stay(tmp_path: Path) -> None:
    source = gemm.source().replace("return mul2(w[M], scale);", "return w[M];")
    assert overwritten(source, gemm.Build("f16", 16, 0, 128, 1), tmp_path)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_format_has_a_tile_on_every_chip(chip: gemm.Chip) -> None:
    for kind in FORMATS:
        for parts, gated in ((1, False), (2, kind[0] != "f16")):
            build = gemm.Build(*kind, 16, parts, gated)
            if parts == 1 or gated:
                assert gemm.has_room(build, chip)
                stages, blocks = build.shape(chip)
                assert blocks * stages * build.stage_bytes() < chip.shared


def matrix(kind: tuple[str, int, int], stack: int, rows: int, cols: int) -> qmatrix.QMatrix:
    fmt, bits, group = kind

    def u8(*shape: int, below: int = 256) -> torch.Tensor:
        return torch.randint(0, below, shape, dtype=torch.uint8, device="cuda")

    if fmt == "f16":
        return qmatrix.from_values(torch.randn(stack, rows, cols, device="cuda").bfloat16())
    codes = u8(stack, rows, cols * bits // 8)
    if fmt != "affine":
        codes &= 0xBF if bits == 8 else 0xFF  # no NaN
        scales = 120 + u8(stack, rows, cols // 32, below=8)
        return qmatrix.assemble(fmt, bits, 32, (rows, cols), codes, scales)
    s = torch.randn(stack, rows, cols // group, device="cuda")
    parts = [x.bfloat16().view(torch.uint8) for x in (s, -s * 2 ** (bits - 1))]
    return qmatrix.assemble(fmt, bits, group, (rows, cols), codes, *parts)


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@on_gpu
@pytest.mark.parametrize("kind", FORMATS, ids=str)
@pytest.mark.parametrize("way", ["unpacked", "packed"])
def test_dense(kind: tuple[str, int, int], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "unpacks", lambda *_: way == "unpacked")
    m = matrix(kind, 1, 320, 384)
    x = (torch.randn(77, 512, device="cuda") / 16).half()[:, :384]
    out = torch.full((77, 400), float("nan"), device="cuda")[:, 40:360]
    dense.linears([m], x, [out])
    assert difference(out, x.double() @ qmatrix.dequantize(m)[0].double().T) < 1e-3


@on_gpu
@pytest.mark.parametrize("way", ["unpacked", "packed"])
def test_groups(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "unpacks", lambda *_: way == "unpacked")
    m = matrix(FORMATS[1], 1, 256, 128)
    x = (torch.randn(50, 256, device="cuda") / 16).half()
    out = torch.full((50, 256), float("nan"), device="cuda").half()
    dense.grouped(m, x, out, groups=2)
    w = qmatrix.dequantize(m)[0].double().view(2, 128, 128)
    want = torch.einsum("tgi,goi->tgo", x.double().view(50, 2, 128), w)
    assert difference(out, want.flatten(1)) < 1e-3


@on_gpu
@pytest.mark.parametrize("kind", [k for k in FORMATS if k[0] != "f16"], ids=str)
@pytest.mark.parametrize("spread", ["every expert", "two experts", "one expert"])
def test_experts(kind: tuple[str, int, int], spread: str) -> None:
    tokens, choices, experts, limit = 150, 3, 7, 1.5
    up, down = (128, 256), (256, 128)
    routed = [matrix(kind, experts, *shape) for shape in (up, up, down)]
    shared = [matrix(FORMATS[1], 1, *shape) for shape in (up, up, down)]
    ids = torch.rand(tokens, experts, device="cuda").topk(choices, -1)[1]
    if spread != "every expert":
        ids = ids % 2 * 3 if spread == "two experts" else torch.full_like(ids, 6)
    x = (torch.randn(tokens, 256, device="cuda") / 64).half()
    share = torch.rand(tokens, choices, device="cuda")
    order = ids.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=experts)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    plan = gemm.Routed(order.int(), offsets, share.flatten(), choices)
    out = torch.full((tokens, 256), float("nan"), device="cuda")
    moe_gemm.experts(routed, shared, x, plan, limit, out)

    def expert(ws: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        gate, up = x.double() @ ws[0].T, x.double() @ ws[1].T
        gate = torch.nn.functional.silu(gate.clamp(max=limit))
        return (gate * up.clamp(-limit, limit) * weight) @ ws[2].T

    plain = [qmatrix.dequantize(m).double() for m in routed]
    want = expert([qmatrix.dequantize(m)[0].double() for m in shared], torch.ones(1).cuda())
    for e in range(experts):
        weight = (share * (ids == e)).sum(1, keepdim=True)
        want += expert([w[e] for w in plain], weight)
    assert difference(out, want) < 1e-3
