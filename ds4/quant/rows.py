"""Cache rows as bytes: what a backend's `save` returns for each row.

A key-value row of C channels, R of them rotary, is C - R e4m3 codes, one E8M0 scale for each 64 of
them (padded with zeros to a multiple of 8 bytes) and R bf16 values: 584 bytes at the real widths.
An index row is C / 2 bytes of e2m1 codes, the low nibble first, and one E8M0 scale for each 32: 68
bytes. Values that lie on that grid, as stored rows do, come back exactly. Other rows are float32.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import formats

Array = NDArray[Any]

KV_GROUP = 64
SCALES_ALIGN = 8


@dataclass(frozen=True)
class RowFormat:
    kind: Literal["float", "kv", "index"]  # "float" for every row in cache mode "exact"
    width: int
    rotary: int = 0

    @property
    def plain(self) -> int:
        """Channels of a key-value row that are FP8."""
        return self.width - self.rotary

    @property
    def scales(self) -> int:
        """Bytes of a key-value row's scales."""
        return -(-self.plain // (KV_GROUP * SCALES_ALIGN)) * SCALES_ALIGN

    @property
    def row_bytes(self) -> int:
        if self.kind == "float":
            return 4 * self.width
        if self.kind == "kv":
            return self.plain + self.scales + 2 * self.rotary
        return self.width // 2 + self.width // formats.FP4_GROUP

    def encode(self, x: Array) -> Array:
        """float32 (n, width) -> uint8 (n, row_bytes)."""
        if self.kind == "float":
            return np.ascontiguousarray(x, np.float32).view(np.uint8)
        if self.kind == "index":
            return np.concatenate(formats.encode_mxfp4(x), 1)
        groups = x[:, : self.plain].reshape(len(x), -1, KV_GROUP)
        largest = np.maximum(np.abs(groups).max(2, initial=0), np.float32(1e-4))
        exponent = formats.power_of_two_above(largest / np.float32(448))
        codes = formats.encode_e4m3(np.ldexp(groups, -exponent[:, :, None]))
        scales = np.zeros((len(x), self.scales), np.uint8)
        scales[:, : exponent.shape[1]] = exponent + 127
        tail = np.ascontiguousarray(formats.encode_bf16(x[:, self.plain :])).view(np.uint8)
        return np.concatenate([codes.reshape(len(x), -1), scales, tail], 1)

    def decode(self, rows: Array) -> Array:
        """uint8 (n, row_bytes) -> float32 (n, width)."""
        if self.kind == "float":
            return np.ascontiguousarray(rows).view(np.float32)
        if self.kind == "index":
            return formats.decode_mxfp4(*np.split(rows, [self.width // 2], 1))
        codes, scales, tail = np.split(rows, [self.plain, self.plain + self.scales], 1)
        scale = formats.E8M0[scales[:, : self.plain // KV_GROUP]].repeat(KV_GROUP, 1)
        rotary = formats.decode_bf16(np.ascontiguousarray(tail).view(np.uint16))
        return np.concatenate([formats.E4M3[codes] * scale, rotary], 1)
