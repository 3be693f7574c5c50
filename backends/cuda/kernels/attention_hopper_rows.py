"""Rows of a cache as attention_hopper.py reads them: found, loaded, decoded into a tile."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

KEYS = gl.constexpr(64)
C = gl.constexpr(512)
R = gl.constexpr(64)
PLAIN = gl.constexpr(448)
GROUPS = gl.constexpr(7)  # of 64 channels with one scale

# 256 threads: a thread has 16 channels of each group of one key, as words of 4 codes or 2 halves.
CODES = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0]))
HALVES = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [8, 1], [1, 0]))
WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))
KEY = gl.constexpr(gl.SliceLayout(1, CODES))

_Descriptor = gl.shared_memory_descriptor
if not hasattr(_Descriptor, "_reinterpret"):  # Triton 3.9 made it public
    _Descriptor._reinterpret = _Descriptor.reinterpret


@gluon.jit
def find(b, span, slot, pos, ids, ids_at, ring_size, pool_size, HAS_IDS: gl.constexpr):
    """Rows of the keys of tile `b` in their planes, and which of these keys there are."""
    windows, n_window, n_entries = span
    windowed = b < windows
    j = gl.where(windowed, b, b - windows) * KEYS + gl.arange(0, KEYS, KEY)
    seen = j < gl.where(windowed, n_window, n_entries)
    entry = j
    if HAS_IDS:
        entry = gl.load(ids + (ids_at + j), mask=seen & (b >= windows), other=-1)
        seen = seen & (windowed | (entry >= 0))
    row = gl.where(windowed, (pos - j) % ring_size, entry)
    return row + slot * (gl.where(windowed, ring_size, pool_size) + 1), seen


@gluon.jit
def fetch(windowed, ring0, ring1, ring2, pool0, pool1, pool2, row, seen):
    """Start loading rows: 7 tiles of code words, the scales' two words, the tail's words."""
    codes = gl.where(windowed, ring0, pool0)
    scales = gl.where(windowed, ring1, pool1)
    tails = gl.where(windowed, ring2, pool2)
    there = gl.expand_dims(seen, 1)
    row = row.to(gl.int64)
    word = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, CODES)), 0)
    at = codes.to(gl.pointer_type(gl.int32)) + gl.expand_dims(row * (PLAIN // 4), 1) + word
    k0 = gl.load(at, mask=there, other=0)
    k1 = gl.load(at + 16, mask=there, other=0)
    k2 = gl.load(at + 32, mask=there, other=0)
    k3 = gl.load(at + 48, mask=there, other=0)
    k4 = gl.load(at + 64, mask=there, other=0)
    k5 = gl.load(at + 80, mask=there, other=0)
    k6 = gl.load(at + 96, mask=there, other=0)
    at = scales.to(gl.pointer_type(gl.int32)) + row * 2
    low = gl.load(at, mask=seen, other=0)
    high = gl.load(at + 1, mask=seen, other=0)
    row = gl.convert_layout(row, gl.SliceLayout(1, HALVES), assert_trivial=True)
    seen = gl.convert_layout(seen, gl.SliceLayout(1, HALVES), assert_trivial=True)
    word = gl.expand_dims(gl.arange(0, R // 2, gl.SliceLayout(0, HALVES)), 0)
    at = tails.to(gl.pointer_type(gl.int32)) + gl.expand_dims(row * (R // 2), 1) + word
    tail = gl.load(at, mask=gl.expand_dims(seen, 1), other=0)
    return k0, k1, k2, k3, k4, k5, k6, low, high, tail


@gluon.jit
def decode(tile, raw, seen, bias):
    """Loaded rows as fp16 into a tile; a bias of -inf for those that are not there."""
    parts = ()
    for g in gl.static_range(GROUPS):
        scale = (raw[7 + g // 4] >> (8 * (g % 4))) & 255
        scale = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r", [scale << 23], gl.int32, True, 1
        )
        low, high = gl.inline_asm_elementwise(
            """{ .reg .b16 a, b;
            mov.b32 {a, b}, $2;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            mul.rn.f16x2 $0, $0, $3;
            mul.rn.f16x2 $1, $1, $3; }""",
            "=&r,=&r,r,r",
            [raw[g], gl.expand_dims(scale, 1)],
            (gl.int32, gl.int32),
            True,
            1,
        )
        pairs = gl.reshape(gl.join(low, high), [KEYS, R // 2])
        parts = parts + (gl.convert_layout(pairs, HALVES, assert_trivial=True),)  # noqa: RUF005
    tail = gl.inline_asm_elementwise(
        """{ .reg .b32 a, b;
        shl.b32 a, $1, 16;
        and.b32 b, $1, 0xffff0000;
        cvt.rn.f16x2.f32 $0, b, a; }""",
        "=r,r",
        [raw[9]],
        gl.int32,
        True,
        1,
    )
    x = gl.join(gl.join(parts[0], parts[4]), gl.join(parts[2], parts[6]))
    y = gl.join(gl.join(parts[1], parts[5]), gl.join(parts[3], tail))
    x = gl.permute(gl.join(x, y), [0, 2, 3, 4, 1])  # groups by their bits, highest first
    tile._reinterpret(gl.int32, [KEYS, C // 2], WORDS).store(gl.reshape(x, [KEYS, C // 2]))
    bias.store(gl.where(seen, 0.0, float("-inf")))
