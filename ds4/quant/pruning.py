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
from pathlib import Path
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
from .inputs import Inputs, LayerInputs

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
    """Reads like the Checkpoint of a model that has only `experts` experts a layer.

    `cfg` is that model's Config. Which experts stay is settled by `keep`, before anything is read.
    A drafter is left out: a text says nothing of its experts. Raises QuantizeError for a number of
    experts that the model cannot run with.
    """

    drafter = None

    def __init__(self, source: Checkpoint, cfg: Config, experts: int) -> None:
        least, most = cfg.num_experts_per_tok, cfg.n_routed_experts
        if not least <= experts <= most:
            raise QuantizeError(
                f"experts must be from {least} (what a token uses) to {most} (what the model has), "
                f"not {experts}"
            )
        self.source, self.folder, self.files = source, source.folder, source.files
        self.extras = source.extras
        self.cfg = replace(cfg, n_routed_experts=experts)
        self._whole, self._before, self._all = cfg, expected(cfg), most
        self._saliency: Mapping[int, Array] = {}
        self.kept: dict[int, Array] = {}  # layer -> (experts,) their old numbers, ascending

    def keep(
        self,
        saliency: Mapping[int, Array],
        importance: Mapping[str, Array] | None = None,
        inputs: Inputs | None = None,
    ) -> tuple[dict[str, Array], Inputs | None]:
        """Keep the experts of largest `saliency`, layer -> (E,).

        Returns what inputs count and what experts are given under the new numbers. Raises
        QuantizeError if the saliency is of another model.
        """
        for layer in range(self.cfg.num_hidden_layers):
            if layer not in saliency or saliency[layer].shape != (self._all,):
                raise QuantizeError(
                    f"the calibration has no {self._all} experts for layer {layer}: it is of "
                    "another model; calibrate this one"
                )
            order = np.argsort(-saliency[layer], kind="stable")
            self.kept[layer] = np.sort(order[: self.cfg.n_routed_experts])
        self._saliency = saliency
        numbers = {layer: self._numbers(layer) for layer in self.kept}
        return self._importance(importance or {}), inputs and PrunedInputs(inputs, numbers)

    @property
    def fields(self) -> dict[str, Any]:
        """What config.json says otherwise than the source's."""
        note = {"original_n_routed_experts": self._all}
        return {"n_routed_experts": self.cfg.n_routed_experts, "reap_pruning": note}

    def source_name(self, name: str) -> str:
        """The name in the whole checkpoint of one of the pruned checkpoint's tensors."""
        expert = _EXPERT.fullmatch(name)
        if expert is None or not self.kept:
            return name  # until something is kept: where the first experts lie, the others do
        layer, number = int(expert[1]), int(expert[2])
        return f"layers.{layer}.ffn.experts.{self.kept[layer][number]}.{expert[3]}"

    def check(self, cfg: Config) -> int:
        """Check that the whole model is here and fits; return the bytes of cfg's part of it."""
        self.source.check(self._whole)
        return sum(self.layout(name, shape).nbytes for name, shape in expected(cfg).items())

    check_all = check

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
            table = self.source.read(name, before, self._all)
            return table.map(lambda rows: self._remap(layer, rows))
        tensor = self.source.read(name, before)
        if tensor.format not in ("f32", "f16", "bf16"):
            tensor = HostTensor("f32", tensor.decode())
        return tensor.map(lambda rows: np.ascontiguousarray(rows[self.kept[layer]]))

    def read_stacked(self, names: list[str], shape: Shape) -> HostTensor:
        """Weights of one shape and one format, along a new first axis."""
        return self.source.read_stacked([self.source_name(name) for name in names], shape)

    def _importance(self, whole: Mapping[str, Array]) -> dict[str, Array]:
        """What is known of the whole model's matrices, under the pruned one's names."""
        before = {name: self.source_name(name) for name in expected(self.cfg)}
        return {name: whole[old] for name, old in before.items() if old in whole}

    def _numbers(self, layer: int) -> Array:
        """(E,) the new number of each expert, -1 for none."""
        number = np.full(self._all, -1, np.int64)
        number[self.kept[layer]] = np.arange(len(self.kept[layer]))
        return number

    def _remap(self, layer: int, table: Array) -> Array:
        """(V, K) old numbers -> new ones; places of dropped experts go to the row's own others.

        These are named again in turn, the most salient first; a row of which nothing is left gets
        the most salient of the layer.
        """
        kept, saliency = self.kept[layer], self._saliency[layer]
        rows, width = self._numbers(layer)[table].astype(table.dtype), table.shape[1]
        order = np.argsort(np.where(rows < 0, np.inf, -saliency[table]), 1, kind="stable")
        ordered = np.take_along_axis(rows, order, 1)
        left = (rows >= 0).sum(1, keepdims=True)
        place = np.arange(width)
        again = np.where(place < left, place, (place - left) % np.maximum(left, 1))
        filled = np.take_along_axis(ordered, again, 1)
        best = np.argsort(-saliency[kept], kind="stable")[:width]
        np.put_along_axis(rows, order, np.where(left > 0, filled, best), 1)
        return rows


class PrunedInputs(Inputs):
    """What the experts of the whole model were given, under the numbers of those that are left."""

    def __init__(self, whole: Inputs, numbers: dict[int, Array]) -> None:
        self.whole, self.numbers = whole, numbers

    def layer(self, layer: int) -> LayerInputs:
        found = self.whole.layer(layer)
        return found._replace(ids=self.numbers[layer][found.ids])


def open_source(folder: Path, experts: int | None) -> tuple[Checkpoint | PrunedCheckpoint, Config]:
    """A checkpoint and its Config: whole, or with so many experts a layer."""
    checkpoint, cfg = Checkpoint(folder), Config.from_file(folder / "config.json")
    if experts is None:
        return checkpoint, cfg
    pruned = PrunedCheckpoint(checkpoint, cfg, experts)
    return pruned, pruned.cfg
