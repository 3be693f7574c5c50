"""A checkpoint folder, read one tensor at a time under official names.

Tensors are read into arrays made for them, not mapped, so that memory holds what was asked for and
nothing else. Every header is checked when the folder is opened, every value when it is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from ..config import Config
from ..errors import CheckpointError
from ..json_fields import AGAIN
from .layout import Layout, check_range, check_values, find_layout
from .names import (
    PACKED_LEAVES,
    Drafter,
    Shape,
    expected,
    expected_drafter,
    recognised,
    stacked_experts,
    to_official,
)
from .quantization import read_quantization
from .shards import Stored, open_folder
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
    drafter  which one, by its tensors' names: both releases say num_nextn_predict_layers 1

    Raises CheckpointError, whose message names the file, the tensor and the remedy.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._quantization = read_quantization(self.folder)
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
        own = [name for name in self.names if name.startswith("mtp.")]
        dspark = any(".main_proj." in name or ".markov_head." in name for name in own)
        self.drafter: Drafter | None = ("dspark" if dspark else "mtp") if own else None
        self.extras = tuple(self._extras())

    def check(self, cfg: Config) -> int:
        """Check that every tensor of cfg's model is here and fits; return their bytes in all."""
        wanted = expected(cfg)
        return self._check(wanted, [name for name in self._tensors if recognised(name)])

    def check_drafter(self, cfg: Config) -> tuple[Drafter, int]:
        """Which drafter is here, all of it, and its bytes. Raises CheckpointError for none."""
        if self.drafter is None:
            raise CheckpointError(
                f"{self.folder}: has no drafter (tensors mtp.*): choose another way to speculate"
            )
        present = [name for name in self.names if name.startswith("mtp.")]
        return self.drafter, self._check(expected_drafter(cfg, self.drafter), present)

    def check_all(self, cfg: Config) -> int:
        """Both; bytes in all. No drafter is no error."""
        return self.check(cfg) + (self.check_drafter(cfg)[1] if self.drafter else 0)

    def _check(self, wanted: dict[str, Shape], present: list[str]) -> int:
        """Nothing of `wanted` may be missing, and nothing of `present` be without a place in it."""
        missing = [name for name in wanted if name not in self._tensors]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self.folder}: tensor {missing[0]} {list(wanted[missing[0]])} is missing{more}; "
                "download the checkpoint again"
            )
        for name in set(present) - wanted.keys():
            module, dot, leaf = name.rpartition(".")
            beside = dot + leaf in (".scale", *PACKED_LEAVES)
            if not (beside and f"{module}.weight" in wanted):
                raise CheckpointError(
                    f"{self._tensors[name]}: has no place in the model that config.json describes; "
                    "download both again"
                )
        return sum(self.layout(name, shape).nbytes for name, shape in wanted.items())

    def read(self, name: str, shape: Shape, below: int | None = None) -> HostTensor:
        """A weight of this logical shape, as stored; integers must lie in [0, below)."""
        layout = self.layout(name, shape)
        tensor = layout.empty()
        _fill(layout, tensor)
        if below is not None:
            check_range(layout, tensor.data, below)
        return tensor

    def read_stacked(self, names: list[str], shape: Shape) -> HostTensor:
        """Weights of one shape and one format, along a new first axis; no second copy is made."""
        layouts = [self.layout(name, shape) for name in names]
        first = layouts[0]
        stacked = first.empty(len(names))
        for i, layout in enumerate(layouts):
            if layout.kind != first.kind:
                raise CheckpointError(
                    f"{layout.data}: is {layout.data.dtype}, but {first.data.name} is "
                    f"{first.data.dtype}; the experts of a layer should have one dtype; {AGAIN}"
                )
            _fill(layout, stacked.map(itemgetter(i)))
        return stacked

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, by name."""
        return sorted({stored.path for stored in self._tensors.values()})

    def layout(self, name: str, shape: Shape) -> Layout:
        """Where a weight of this logical shape lies; CheckpointError if it does not fit."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder}: tensor {name} {list(shape)} is missing")
        stem = name.removesuffix(".weight")
        scale, scales, biases = (
            self._tensors.get(stem + leaf) for leaf in (".scale", *PACKED_LEAVES)
        )
        return find_layout(
            name, shape, self._tensors[name], scale, scales, biases, self._quantization
        )

    def _extras(self) -> Iterator[Extra]:
        drafter = tuple(name for name in self.names if name.startswith("mtp."))
        unknown = tuple(n for n in self.names if not n.startswith("mtp.") and not recognised(n))
        for kind, names in ((self.drafter or "mtp", drafter), ("unknown", unknown)):
            if names:
                yield Extra(kind, names, sum(self._tensors[name].nbytes for name in names))


def _fill(layout: Layout, tensor: HostTensor) -> None:
    for stored, array in layout.parts(tensor):
        stored.read_into(array)
    check_values(layout, tensor)


def _official_parts(stored: Stored) -> Iterator[tuple[str, Stored]]:
    """A stored tensor under its official name; stacked experts one by one."""
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
        name = f"{layer}.ffn.experts.{expert}.{matrices[matrix]}.{leaf}"
        yield name, stored.part(i, experts * len(matrices), shape)
