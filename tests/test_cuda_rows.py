"""Packed cache rows of the CUDA backend: bytes, what the kernels store, scores of the indexer."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ds4.backend import CacheMode, RowKind, RowRange, open_backend
from ds4.cache import LayerCache
from ds4.plan.flash import flash
from ds4.plan.sizes import row_bytes
from ds4.quant import formats
from ds4.step import Chunk, Step, plan

triton = pytest.importorskip("triton")

from ds4.backends.cuda import rows as packed  # noqa: E402
from ds4.backends.cuda import staging  # noqa: E402
from ds4.backends.cuda.fast_saving import FastSaving  # noqa: E402
from ds4.backends.cuda.kernels import remember  # noqa: E402
from ds4.backends.cuda.rows import PackedRows  # noqa: E402
from ds4.backends.cuda.saving import Saving  # noqa: E402

from tests.test_operations import hard_rows  # noqa: E402

f32 = np.float32
T = torch.from_numpy
C, IC, R = 128, 64, 64
REAL = {
    "C": 512,
    "R": 64,
    "BC": 512,
    "SCALES": 8,
    "IC": 128,
    "IA": 8,
    "BI": 128,
    "NATIVE": True,
    "PDL": True,
    "EARLY": True,
    "LONG": False,
}


def alloc(kind: RowKind, slots: int, rows: int, width: int, mode: CacheMode) -> PackedRows:
    """Rows full of 0xff, which is NaN in every plane but codes of FP4."""
    made = packed.alloc(kind, slots, rows, width, R if kind == "kv" else 0, mode, "cpu")
    for plane in made.planes:
        plane.view(torch.uint8).fill_(255)
    return made


def test_rows_take_the_bytes_that_the_plan_says() -> None:
    kv, index_row = row_bytes(flash())
    for kind, width, rotary, size, pad in (("kv", 512, 64, kv, 1), ("index", 128, 0, index_row, 0)):
        rows = packed.alloc(kind, 2, 1 << 18, width, rotary, "native", "meta")  # a million tokens
        assert rows.row_bytes == size + pad
        assert rows.nbytes == 2 * ((1 << 18) + 1) * (size + pad)
    assert packed.alloc("kv", 1, 9, 512, 64, "exact", "meta").row_bytes == 2048


def test_rows_move_between_slots_as_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    for kind, width in (("kv", 192), ("index", 64), ("float", 5)):
        rows = alloc(kind, 3, 8, width, "native")
        for plane in rows.planes:
            values = torch.randint(60, 70, plane.view(torch.uint8).shape, generator=generator)
            plane.view(torch.uint8).copy_(values)
        before = rows.float32(0, 1, 4)
        moved = rows.export(0, 1, 4)
        assert moved.shape == (3, rows.row_bytes)
        rows.restore(2, 5, moved)
        assert torch.equal(rows.float32(2, 5), before)
        assert not torch.equal(rows.float32(2, 4, 7), before)


@pytest.mark.interpret
def test_rows_are_rounded_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    x = hard_rows(192, rng)
    pos, slot = torch.arange(64, dtype=torch.int32), torch.ones(64, dtype=torch.int32)
    rows = alloc("kv", 2, 64, 192, "native")
    remember.write(rows, T(x), slot, pos)
    want = formats.round_kv(x, R).view(np.int32)
    np.testing.assert_array_equal(rows.float32(1).numpy().view(np.int32), want)
    # rows that Hadamard maps exactly to values of few bits
    target = (np.round(hard_rows(64, rng) * 64) / 64).clip(-8, 8)
    rows = alloc("index", 2, 64, 64, "native")
    remember.write(rows, T((target @ formats.hadamard(64)).astype(f32)), slot, pos)
    np.testing.assert_array_equal(rows.float32(1), formats.round_q4(target))


class Layer:
    """The caches of one layer twice, packed and in the reference backend, and its weights."""

    def __init__(self, mode: CacheMode, ratio: int, slack: int = 10) -> None:
        self.ratio, self.mode, self.rng = ratio, mode, np.random.default_rng(ratio)
        self.reference = open_backend("reference", cache=mode)
        halves = 2 if ratio == 4 else 1
        kinds: list[tuple[RowKind, int, int]] = [("kv", 18, C)]
        if ratio:
            kinds += [("float", 2 * ratio + 10, 2 * halves * C), ("kv", 40, C)]
        if ratio == 4:
            kinds += [("float", 2 * ratio + 10, 4 * IC), ("index", 40, IC)]
        self.packed = [
            alloc(kind, 2, 2 * ratio + slack if kind == "float" else rows, width, mode)
            for kind, rows, width in kinds
        ]
        self.plain = [self.reference.alloc(k, 2, rows, width, R) for k, rows, width in kinds]
        for rows in self.plain:
            rows.data[:] = np.nan
        self.freqs = (1 / 10000 ** (np.arange(0, R, 2) / R)).astype(f32)
        self.kv_norm = self.random(C)
        widths = [C, IC][: len(kinds) // 2]
        self.compressors = [
            SimpleNamespace(ape=self.random(ratio, halves * d), norm=self.random(d)) for d in widths
        ]
        self.widths = [C, *(2 * halves * d for d in widths)]

    def random(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(f32)

    def step(self, step: Step) -> None:
        wide = self.random(len(step.pos), sum(self.widths) + 3)
        kv, *rows = np.split(wide, np.cumsum(self.widths), 1)[:-1]
        caches = LayerCache(*self.plain)
        main, indexer = [*self.compressors, None, None][:2]
        w = SimpleNamespace(kv_norm=self.kv_norm, freqs=self.freqs, ratio=self.ratio)
        w.compressor = main
        w.indexer = SimpleNamespace(compressor=indexer) if indexer else None
        cfg: Any = SimpleNamespace(rms_norm_eps=1e-6)
        self.reference.remember(w, caches, step, kv, rows, cfg)
        kv, *rows = T(wide).split([*self.widths, 3], 1)[:-1]
        compressors = [
            remember.Compressor(x, T(m.ape), T(m.norm), *self.packed[2 * i + 1 : 2 * i + 3])
            for i, (x, m) in enumerate(zip(rows, self.compressors, strict=True))
        ]
        emit = T(step.emit[self.ratio]) if self.ratio else None
        x, gain = self.random(len(step.pos), 24), self.random(24)
        out = torch.full((len(step.pos), 24), torch.nan, dtype=torch.float16)
        few = len(step.pos) <= remember.ONE_LAUNCH
        beside = remember.Norm(T(x), T(gain), out, (8, 24)) if few else None
        slot, pos = T(step.slot), T(step.pos)
        norm, freqs = T(self.kv_norm), T(self.freqs)
        rest = compressors, slot, pos, emit, self.ratio, 1e-6
        remember.remember(kv, norm, freqs, self.packed[0], *rest, beside)
        if few:
            want = self.reference.rms_norm(gain, x, 1e-6)
            np.testing.assert_allclose(out.float(), want, rtol=6e-4, atol=1e-4)

    def check(self) -> None:
        """Equal but for float32's last bits, and few values that these round the other way."""
        for packed_rows, rows in zip(self.packed, self.plain, strict=True):
            for slot in range(2):
                want, got = rows.data[slot, :-1], packed_rows.float32(slot).numpy()
                wrote = ~np.isnan(want).any(1)
                assert wrote.any()
                if len(got) < len(want):  # a ring with less slack: what is open is there
                    continue
                if packed_rows.data is not None:
                    assert np.isnan(got[~wrote]).all()
                far = np.abs(got - want)[wrote] / np.abs(want[wrote]).max(1, keepdims=True)
                assert (far > 1e-5).mean() < (2e-3 if self.mode == "native" else 1e-9)


@pytest.mark.interpret
@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("mode", ["native", "exact"])
@pytest.mark.parametrize("ratio", [0, 4, 6])
def test_a_step_leaves_what_the_reference_does(
    ratio: int, mode: CacheMode, one_launch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slots, padding, rings that wrap around, blocks begun in earlier steps or in this one."""
    monkeypatch.setattr(remember, "ONE_LAUNCH", 32 if one_launch else 0)
    layer, lengths = Layer(mode, ratio), [0, 0]
    for each in ([7, 0], [1, 5], [10, 0], [1, 1], [3, 2], [0, 9]):
        chunks = [Chunk(s, lengths[s], [0] * n) for s, n in enumerate(each) if n]
        lengths = [sum(both) for both in zip(lengths, each, strict=True)]
        layer.step(plan(chunks, [ratio] if ratio else [], pad_to=11))
    layer.check()


@pytest.mark.interpret
@pytest.mark.parametrize("ratio", [4, 6])
def test_rings_may_be_shorter_than_a_step(ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same entries as with long ones, and the newest rows."""
    monkeypatch.setattr(remember, "ONE_LAUNCH", 4)
    long, short, lengths = Layer("exact", ratio), Layer("exact", ratio, slack=2), [0, 0]
    for each in ([7, 0], [10, 5], [1, 1], [3, 2], [0, 9], [10, 10], [2, 3]):
        chunks = [Chunk(s, lengths[s], [0] * n) for s, n in enumerate(each) if n]
        lengths = [sum(both) for both in zip(lengths, each, strict=True)]
        step = plan(chunks, [ratio], pad_to=11)
        long.step(step)
        short.step(step)
        for slot, end in enumerate(lengths):
            for a, b in zip(long.packed, short.packed, strict=True):
                both = a.float32(slot), b.float32(slot)
                if a.size != b.size:  # the open block and the one before
                    rows = range(max(0, end // ratio * ratio - ratio), end)
                    both = both[0][[p % a.size for p in rows]], both[1][[p % b.size for p in rows]]
                assert torch.equal(*(x.view(torch.int32) for x in both))
    short.check()


@pytest.mark.parametrize(("ratio", "arch"), [(4, 90), (4, 120), (128, 90)])
def test_remember_compiles_without_spills(ratio: int, arch: int) -> None:
    from tests.triton_compile import compile_kernel

    compressors, halves = (2, 2) if ratio == 4 else (1, 1)
    constants = REAL | {"COMPRESSORS": compressors, "RATIO": ratio, "HALVES": halves, "STEP": 8}
    constants["AT_ONCE"] = 8 if ratio == 4 else remember.POOL_ROWS

    fn = remember.remember_kernel
    kinds = {"codes": "*u8", "scales": "*u8", "tail": "*i16", "stride": "i32:16", "size": "i32"}
    kinds |= {"slots": "*i32", "positions": "*i32", "emit": "*i32", "eps": "fp32"}
    kinds |= {"tokens": "i32", "stores": "i32", "norms": "i32", "panel": "i32"}
    kinds |= {"query_out": "*fp16", "place_": "i32"}
    constants["QN"] = 1024
    signature = {
        arg: next((kind for word, kind in kinds.items() if word in arg), "*fp32")
        for arg in fn.arg_names
        if arg not in constants
    }
    report = compile_kernel(fn, signature, constants, arch, remember.POOL_WARPS)
    assert report.spills == 0
    assert report.loads[16] >= compressors  # rows copied; how many are pooled so is up to Triton


@pytest.mark.interpret
@pytest.mark.parametrize("width", [128, 192])  # of index rows: 4 bytes of scales, or 6
@pytest.mark.parametrize("mode", ["native", "exact"])
def test_moving_many_ranges_at_once(width: int, mode: CacheMode) -> None:
    """The same bytes as range after range, there and back."""
    plain, fast = Saving(), FastSaving()
    plain.device = fast.device = "cpu"
    fast._staging = SimpleNamespace(
        upload=lambda data: T(data.copy()), download=lambda buffer: buffer.numpy()
    )
    planes = alloc("kv", 2, 40, 192, mode), alloc("index", 2, 30, width, mode)
    sizes = sum(plane[0].numel() * plane.element_size() for r in planes for plane in r.planes)
    noise = iter(np.random.default_rng(0).integers(0, 256, 2 * sizes, np.uint8))
    for plane in (plane for rows in planes for plane in rows.planes):
        flat = plane.view(torch.uint8).view(-1)
        flat.copy_(T(np.array([next(noise) for _ in range(len(flat))], np.uint8)))
    ranges = [RowRange(planes[0], 3, 40), RowRange(planes[1], 0, 29), RowRange(planes[0], 0, 1)]
    saved = plain.save(0, ranges)
    np.testing.assert_array_equal(fast.save(0, ranges), saved)
    before = plain.save(1, [RowRange(planes[0], 1, 3)])
    fast.restore(1, ranges, saved)
    np.testing.assert_array_equal(plain.save(1, ranges), saved)
    np.testing.assert_array_equal(plain.save(1, [RowRange(planes[0], 1, 3)]), before)
    np.testing.assert_array_equal(plain.save(0, ranges), saved)
    assert not len(fast.save(0, []))


def test_bytes_go_through_pinned_memory_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(staging, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(staging, "PIECE", 100)
    through = staging.Staging("cpu")
    for size in (0, 1, 99, 100, 101, 800, 801, 2345):
        data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        np.testing.assert_array_equal(through.upload(data).numpy(), data)
        np.testing.assert_array_equal(through.download(T(data)), data)
