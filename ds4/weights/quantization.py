"""config.json's "quantization": how the U32 tensors of a checkpoint are packed.

MLX's convention: {"group_size", "bits", "mode"} for every module, and under a module's path another
such object, or false for one that is not quantized.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..json_fields import AGAIN, need_regular, read_json
from ..quant.affine import GROUPS
from ..quant.packing import BITS

_FIXED = {"mxfp4": (4, 32), "mxfp8": (8, 32)}


@dataclass(frozen=True)
class Packing:
    """How one module is packed: "mxfp4", "mxfp8" or "affine"."""

    mode: str
    bits: int
    group: int

    def __str__(self) -> str:
        return f"{self.mode} of {self.bits} bits in groups of {self.group}"

    def to_dict(self) -> dict[str, Any]:
        """As config.json says it."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}


class Quantization:
    """What one config.json says; each entry is checked when it is asked for."""

    def __init__(self, table: Mapping[str, Any] | None, path: Path) -> None:
        if table is not None and not isinstance(table, Mapping):
            raise CheckpointError(f"{path}: quantization should be an object; download it again")
        self._table: Mapping[str, Any] = table or {}
        self.path = path

    def says(self, module: str) -> bool:
        """Whether the module has an entry of its own that makes it quantized."""
        return bool(self._table.get(module))

    def of(self, module: str) -> Packing | None:
        """The packing of a module, from its own entry or the general one; None for neither."""
        entry = self._table.get(module, self._table if "bits" in self._table else None)
        if entry is None or entry is False:
            return None
        if isinstance(entry, Mapping):
            mode = entry.get("mode", "affine")
            found = Packing(mode, entry.get("bits", 0), entry.get("group_size", 0))
            if _known(found):
                return found
        raise CheckpointError(
            f"{self.path}: quantization of {module} should be mxfp4 (4 bits) or mxfp8 (8) in "
            "groups of 32, or affine of 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128; "
            "this runtime reads no other: quantize the model with ds4 quantize"
        )


def _known(packing: Packing) -> bool:
    size = packing.bits, packing.group
    if any(type(n) is not int for n in size) or not isinstance(packing.mode, str):
        return False
    if packing.mode == "affine":
        return packing.bits in BITS and packing.group in GROUPS
    return _FIXED.get(packing.mode) == size


def read_quantization(folder: Path) -> Quantization:
    """The Quantization of a checkpoint folder; an empty one where config.json has none."""
    path = folder / "config.json"
    need_regular(path, CheckpointError, AGAIN)
    fields = read_json(path, CheckpointError, AGAIN) if path.exists() else {}
    table = fields.get("quantization") if isinstance(fields, dict) else None
    return Quantization(table, path)
