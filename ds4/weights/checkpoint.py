"""A checkpoint folder, read one tensor at a time under official names.

Tensors are read into arrays made for them, not mapped, so that memory holds what was asked for and
nothing else. Every header is checked when the folder is opened, every value when it is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import Config
from ..errors import CheckpointError
from .layout import Layout, check_range, check_values, find_layout
from .names import Shape, expected, recognised, stacked_experts, to_official
from .shards import AGAIN, Stored, open_folder
from .tensor import HostTensor


@dataclass(frozen=True)
class Extra:
    """Tensors of a checkpoint that the main model does not use."""

    kind: str  # "mtp" or "dspark": a drafter, left for later; or "unknown"
    names: tuple[str, ...]
    nbytes: int

    @property
    def count(self) -> int:
        return len(self.names)


class Checkpoint:
    """The tensors of a folder of safetensors files: one file, several, or several with an index.

    names    official names, scales included, whatever names the files use
    extras   what the main model leaves: a drafter, unknown tensors

    Raises CheckpointError, whose message names the file, the tensor and the remedy.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._tensors: dict[str, Stored] = {}
        for stored in open_folder(self.folder).values():
            for name, part in _official_parts(stored):
                if name in self._tensors:
                    other = self._tensors[name]
                    raise CheckpointError(
                        f"{stored}: is {name}, as is {other.name} in {other.path.name}; "
                        "remove one of them"
                    )
                self._tensors[name] = part
        self.names = tuple(self._tensors)
        self.extras = tuple(self._extras())

    def check(self, cfg: Config) -> int:
        """Check that every tensor of cfg's model is here and fits; return their bytes in all."""
        wanted = expected(cfg)
        missing = [name for name in wanted if name not in self._tensors]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self.folder}: tensor {missing[0]} {list(wanted[missing[0]])} is missing{more}; "
                "download the checkpoint again"
            )
        for name in self._tensors.keys() - wanted.keys():
            owner = name.removesuffix(".scale") + ".weight"
            if recognised(name) and not (name.endswith(".scale") and owner in wanted):
                raise CheckpointError(
                    f"{self._tensors[name]}: has no place in the model that config.json describes; "
                    "download both again"
                )
        return sum(self._layout(name, shape).nbytes for name, shape in wanted.items())

    def read(self, name: str, shape: Shape, below: int | None = None) -> HostTensor:
        """A weight of this logical shape, as stored; integers must lie in [0, below)."""
        layout = self._layout(name, shape)
        data = np.empty(layout.shape, layout.dtype)
        scales = None if layout.scale_shape is None else np.empty(layout.scale_shape, np.uint8)
        _fill(layout, data, scales)
        if below is not None:
            check_range(layout, data, below)
        return HostTensor(layout.format, data, scales)

    def read_stacked(self, names: list[str], shape: Shape) -> HostTensor:
        """Weights of one shape and one format, along a new first axis; no second copy is made."""
        layouts = [self._layout(name, shape) for name in names]
        first = layouts[0]
        data = np.empty((len(names), *first.shape), first.dtype)
        scales = None
        if first.scale_shape is not None:
            scales = np.empty((len(names), *first.scale_shape), np.uint8)
        for i, layout in enumerate(layouts):
            if layout.format != first.format:
                raise CheckpointError(
                    f"{layout.data}: is {layout.data.dtype}, but {first.data.name} is "
                    f"{first.data.dtype}; the experts of a layer should have one dtype; {AGAIN}"
                )
            _fill(layout, data[i], None if scales is None else scales[i])
        return HostTensor(first.format, data, scales)

    def _layout(self, name: str, shape: Shape) -> Layout:
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder}: tensor {name} {list(shape)} is missing")
        scale = name.removesuffix(".weight") + ".scale"
        return find_layout(name, shape, self._tensors[name], self._tensors.get(scale))

    def _extras(self) -> Iterator[Extra]:
        drafter = tuple(name for name in self.names if name.startswith("mtp."))
        unknown = tuple(n for n in self.names if not n.startswith("mtp.") and not recognised(n))
        # both releases say num_nextn_predict_layers 1: only the names tell the drafters apart
        dspark = any(".main_proj." in name or ".markov_head." in name for name in drafter)
        for kind, names in (("dspark" if dspark else "mtp", drafter), ("unknown", unknown)):
            if names:
                yield Extra(kind, names, sum(self._tensors[name].nbytes for name in names))


def _fill(layout: Layout, data: np.ndarray, scales: np.ndarray | None) -> None:
    layout.data.read_into(data)
    if layout.scales is not None and scales is not None:
        layout.scales.read_into(scales)
    check_values(layout, data, scales)


def _official_parts(stored: Stored) -> Iterator[tuple[str, Stored]]:
    """A stored tensor under its official name; transformers' stacked experts one by one."""
    stack = stacked_experts(stored.name)
    if stack is None:
        yield to_official(stored.name), stored
        return
    layer, matrices, leaf = stack
    if len(stored.shape) != 3 or stored.shape[1] % len(matrices):
        raise CheckpointError(
            f"{stored}: has shape {list(stored.shape)}; it should be [experts, rows of "
            f"{' and '.join(matrices)}, inputs]; {AGAIN}"
        )
    experts, rows, columns = stored.shape
    shape = (rows // len(matrices), columns)
    for i in range(experts * len(matrices)):
        expert, matrix = divmod(i, len(matrices))
        name = f"layers.{layer}.ffn.experts.{expert}.{matrices[matrix]}.{leaf}"
        yield name, stored.part(i, experts * len(matrices), shape)
