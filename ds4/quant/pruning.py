"""A checkpoint with fewer experts a layer, seen through the one that has them all.

The most salient experts of each layer stay (REAP: router weight times the norm of the output, the
mean over an expert's tokens). They are numbered anew in their old order and their bytes do not
change; the router loses the rows of the others. A routing table, which names experts for each
token, names those that are left of its row more than once instead: an expert of a hash layer has
only learnt its own tokens, and measured on the demo any other one in its place does more harm.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..errors import QuantizeError
from ..weights.checkpoint import Checkpoint
from ..weights.layout import Layout
from ..weights.names import Shape, expected
from ..weights.tensor import HostTensor
from .calibration import RARE, Calibration

Array = NDArray[Any]

_EXPERT = re.compile(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w[123]\.weight)")
_GATE = re.compile(r"layers\.(\d+)\.ffn\.gate\.(weight|bias|tid2eid)")


def reap(calibration: Calibration) -> dict[int, Array]:
    """Layer -> (E,) how much each expert adds to its tokens, the less sure the fewer they were."""
    return {
        layer: total / (calibration.counts[layer] + RARE)
        for layer, total in calibration.saliency.items()
    }


class PrunedCheckpoint:
    """Reads like the Checkpoint of a model that has only the `experts` most salient of each layer.

    saliency  layer -> (E,), as `reap` makes it
    cfg       the pruned model's Config
    kept      layer -> (experts,) their old numbers, ascending

    Raises QuantizeError for a number of experts, or saliency, that does not fit the model.
    """

    def __init__(
        self, source: Checkpoint, cfg: Config, saliency: Mapping[int, Array], experts: int
    ) -> None:
        least, most = cfg.num_experts_per_tok, cfg.n_routed_experts
        if not least <= experts <= most:
            raise QuantizeError(
                f"experts must be from {least} (what a token uses) to {most} (what the model has), "
                f"not {experts}"
            )
        for layer in range(cfg.num_hidden_layers):
            if layer not in saliency or saliency[layer].shape != (most,):
                raise QuantizeError(
                    f"the calibration has no {most} experts for layer {layer}: it is of another "
                    "model; calibrate this one"
                )
        self.source, self.folder, self.files = source, source.folder, source.files
        self.extras = source.extras
        self.cfg = replace(cfg, n_routed_experts=experts)
        self.kept = {
            layer: np.sort(np.argsort(-saliency[layer], kind="stable")[:experts])
            for layer in range(cfg.num_hidden_layers)
        }
        self._saliency = saliency
        self._before = expected(cfg)
        self._old = most

    @property
    def note(self) -> dict[str, Any]:
        """What config.json says of it beside the number of experts: the old numbers of the kept."""
        kept = {str(layer): " ".join(map(str, numbers)) for layer, numbers in self.kept.items()}
        return {"original_n_routed_experts": self._old, "kept": kept}

    def source_name(self, name: str) -> str:
        """The name in the whole checkpoint of one of the pruned checkpoint's tensors."""
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            return name
        layer, number = int(expert[1]), int(expert[2])
        return f"layers.{layer}.ffn.experts.{self.kept[layer][number]}.{expert[3]}"

    def check(self, cfg: Config) -> int:
        """Check that every tensor of cfg's model is here and fits; return their bytes in all."""
        return sum(self.layout(name, shape).nbytes for name, shape in expected(cfg).items())

    def layout(self, name: str, shape: Shape) -> Layout:
        """Where a weight of this logical shape lies, or lies among others; see Checkpoint."""
        gate = _GATE.fullmatch(name)
        if gate is None:
            return self.source.layout(self.source_name(name), shape)
        return self.source.layout(name, self._before[name])

    def read(self, name: str, shape: Shape, below: int | None = None) -> HostTensor:
        """A weight of this logical shape; a routing table always names experts that are here."""
        gate = _GATE.fullmatch(name)
        if gate is None:
            return self.source.read(self.source_name(name), shape, below)
        layer, before = int(gate[1]), self._before[name]
        if gate[2] == "tid2eid":
            table = self.source.read(name, before, self._old)
            return table.map(lambda rows: self._remap(layer, rows))
        tensor = self.source.read(name, before)
        if tensor.format not in ("f32", "f16", "bf16"):
            tensor = HostTensor("f32", tensor.decode())
        return tensor.map(lambda rows: np.ascontiguousarray(rows[self.kept[layer]]))

    def read_stacked(self, names: list[str], shape: Shape) -> HostTensor:
        """Weights of one shape and one format, along a new first axis."""
        return self.source.read_stacked([self.source_name(name) for name in names], shape)

    def renumber(self, importance: Mapping[str, Array]) -> dict[str, Array]:
        """What belongs to tensors of the whole model, under the pruned one's names."""
        before = {name: self.source_name(name) for name in expected(self.cfg)}
        return {name: importance[old] for name, old in before.items() if old in importance}

    def _remap(self, layer: int, table: Array) -> Array:
        """(V, K) old numbers -> new ones; places of dropped experts go to the row's own others.

        These are named again in turn, the most salient first; a row of which nothing is left gets
        the most salient of the layer.
        """
        kept, saliency = self.kept[layer], self._saliency[layer]
        number = np.full(self._old, -1, table.dtype)
        number[kept] = np.arange(len(kept))
        rows, width = number[table], table.shape[1]
        order = np.argsort(np.where(rows < 0, np.inf, -saliency[table]), 1, kind="stable")
        ordered = np.take_along_axis(rows, order, 1)
        left = (rows >= 0).sum(1, keepdims=True)
        place = np.arange(width)
        again = np.where(place < left, place, (place - left) % np.maximum(left, 1))
        filled = np.take_along_axis(ordered, again, 1)
        best = np.argsort(-saliency[kept], kind="stable")[:width]
        np.put_along_axis(rows, order, np.where(left > 0, filled, best), 1)
        return rows
