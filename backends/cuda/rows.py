"""Cache rows on a GPU, stored as the bytes they are rounded to.

A native key-value row of C channels, R of them rotary, is C - R e4m3 codes, one E8M0 scale per 64
of these and R bf16 values; an index row is C / 2 bytes of FP4 codes and one E8M0 scale per 32
channels. Each part is a plane of its own, so that every load is aligned: a row's parts lie at the
same (slot, row) of every plane. Float rows, and every row in exact mode, are one float32 plane.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ds4.backend import CacheMode, RowKind
from ds4.errors import BackendError
from ds4.quant import formats

KV_GROUP = 64
INDEX_GROUP = formats.FP4_GROUP
_SCALES_ALIGN = 8  # a kv row's 7 scales take 8 bytes


@dataclass(frozen=True)
class PackedRows:
    """`size` rows of `width` channels for each slot; row `size` takes what padding writes."""

    kind: RowKind
    size: int
    width: int
    rotary: int
    codes: Tensor | None = None  # uint8 (slots, size + 1, width - rotary), or width / 2 for FP4
    scales: Tensor | None = None  # uint8 (slots, size + 1, scales a row)
    tail: Tensor | None = None  # bfloat16 (slots, size + 1, rotary)
    data: Tensor | None = None  # float32 (slots, size + 1, width), instead of the others

    @property
    def planes(self) -> list[Tensor]:
        """The parts that rows of this kind have."""
        return [p for p in (self.codes, self.scales, self.tail, self.data) if p is not None]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all planes: 584 and 68 at the real widths, 4 a channel in float32."""
        return sum(p.shape[-1] * p.element_size() for p in self.planes)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, scratch rows included."""
        return sum(p.nbytes for p in self.planes)

    def float32(self, slot: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of a slot, (n, width): the values that their bytes stand for."""
        at = slot, slice(start, self.size if stop is None else stop)
        if self.data is not None:
            return self.data[at]
        assert self.codes is not None
        assert self.scales is not None
        scales = _powers(self.scales[at])
        if self.tail is None:
            return _scaled(_fp4(self.codes[at]), scales, INDEX_GROUP)
        plain = self.codes[at].view(torch.float8_e4m3fn).float()
        scales = scales[:, : plain.shape[-1] // KV_GROUP]
        return torch.cat([_scaled(plain, scales, KV_GROUP), self.tail[at].float()], -1)

    def export(self, slot: int, start: int, stop: int) -> Tensor:
        """The bytes of rows start..stop of a slot: uint8 (n, row_bytes), on the same device."""
        return torch.cat([part.clone() for part in self._bytes(slot, start, stop)], -1)

    def restore(self, slot: int, start: int, rows: Tensor) -> None:
        """Put back what `export` returned, at rows start.. of a slot, this one or another."""
        at = 0
        for part in self._bytes(slot, start, start + len(rows)):
            part.copy_(rows[:, at : at + part.shape[-1]])
            at += part.shape[-1]

    def _bytes(self, slot: int, start: int, stop: int) -> Iterator[Tensor]:
        for plane in self.planes:
            yield plane[slot, start:stop].view(torch.uint8)


def alloc(
    kind: RowKind,
    slots: int,
    rows: int,
    width: int,
    rotary: int,
    cache_mode: CacheMode,
    device: str | torch.device,
) -> PackedRows:
    """Rows of zeros. Raises BackendError if the device has not the memory."""

    def plane(channels: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(slots, rows + 1, channels, dtype=dtype, device=device)

    try:
        if cache_mode == "exact" or kind == "float":
            return PackedRows(kind, rows, width, rotary, data=plane(width, torch.float32))
        if kind == "kv":
            groups = -(-(width - rotary) // KV_GROUP)
            return PackedRows(
                kind,
                rows,
                width,
                rotary,
                plane(width - rotary, torch.uint8),
                plane(-(-groups // _SCALES_ALIGN) * _SCALES_ALIGN, torch.uint8),
                plane(rotary, torch.bfloat16),
            )
        codes, scales = plane(width // 2, torch.uint8), plane(width // INDEX_GROUP, torch.uint8)
        return PackedRows(kind, rows, width, rotary, codes, scales)
    except torch.OutOfMemoryError as error:
        raise BackendError(
            f"the cache ({slots} x {rows} {kind} rows) does not fit in the memory of {device}: "
            "use a shorter context or fewer slots"
        ) from error


def planes(rows: PackedRows) -> list[Tensor]:
    """Three planes as a kernel takes them: codes, scales and tail, or the float32 one thrice."""
    if rows.data is not None:
        return [rows.data] * 3
    assert rows.codes is not None
    assert rows.scales is not None
    tail = rows.codes if rows.tail is None else rows.tail.view(torch.int16)
    return [rows.codes, rows.scales, tail]


def scales_stride(rows: PackedRows) -> int:
    """Bytes from a row's scales to the next row's."""
    return 0 if rows.scales is None else rows.scales.shape[-1]


def _powers(scales: Tensor) -> Tensor:
    """E8M0 bytes -> float32; a byte is the exponent field, but for 0, which means 2^-127."""
    return (scales.int() << 23).clamp_min(1 << 22).view(torch.float32)


def _scaled(values: Tensor, scales: Tensor, group: int) -> Tensor:
    return (values.unflatten(-1, (-1, group)) * scales[..., None]).flatten(-2)


def _fp4(codes: Tensor) -> Tensor:
    """uint8 (..., n) -> float32 (..., 2 n), the low nibble first."""
    table = torch.from_numpy(formats.E2M1).to(codes.device)
    return table[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()]
