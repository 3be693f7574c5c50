"""What a quantized checkpoint will hold: its files, their tensors, and config.json's words on them.

One file a layer, after one for what belongs to no layer and before one for the drafter, if there is
one. The experts of a layer are stacked.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..errors import QuantizeError
from ..weights.checkpoint import Checkpoint
from ..weights.names import Shape, expected, expected_drafter, is_matrix
from ..weights.shard_file import Part
from .convert import Storage, choose
from .pruning import PrunedCheckpoint
from .recipes import Recipe

_EXPERT = re.compile(r"((?:layers|mtp)\.\d+\.ffn\.experts)\.\d+(\.w[123]\.weight)")
_LAYER = re.compile(r"layers\.(\d+)\.")
_DRAFTER = "mtp."
_DTYPES = {"mxfp4": "fp4", "fp8": "fp8", "mxfp8": "fp8"}  # in config.json's expert_dtype


@dataclass(frozen=True)
class Target:
    """One weight of the new checkpoint: a tensor, or the same one of every expert of a layer."""

    name: str
    sources: tuple[str, ...]  # official names
    shape: Shape  # of one source, logical
    storage: Storage
    source_bytes: int

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def parts(self) -> list[Part]:
        """The tensors to write: its values, then scales and biases if it has them."""
        stack = (len(self.sources),) if ".experts." in self.name else ()
        parts = self.storage.parts((*stack, *self.shape))
        names = [self.name, *(f"{self.module}.{leaf}" for leaf, _, _ in parts[1:])]
        return [
            Part(name, dtype, shape) for name, (_, dtype, shape) in zip(names, parts, strict=True)
        ]


def plan(
    checkpoint: Checkpoint | PrunedCheckpoint, cfg: Config, recipe: Recipe
) -> dict[str, list[Target]]:
    """File name -> its targets. Raises CheckpointError or QuantizeError for an unfit source."""
    recipe = recipe.for_experts(_expert_dtype(checkpoint, cfg))
    shapes = expected(cfg)
    if checkpoint.drafter is not None:
        shapes |= expected_drafter(cfg, checkpoint.drafter)
    count = cfg.num_hidden_layers + 1 + (checkpoint.drafter is not None)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    shards: dict[str, list[Target]] = {name: [] for name in names}
    for target in _targets(checkpoint, shapes, recipe):
        layer = _LAYER.match(target.name)
        number = -1 if target.name.startswith(_DRAFTER) else int(layer[1]) + 1 if layer else 0
        shards[names[number]].append(target)
    return shards


def _targets(
    checkpoint: Checkpoint | PrunedCheckpoint, shapes: dict[str, Shape], recipe: Recipe
) -> Iterator[Target]:
    sources: dict[str, list[str]] = {}
    for name in shapes:
        sources.setdefault(_EXPERT.sub(r"\1\2", name), []).append(name)
    for name, each in sources.items():
        shape = shapes[each[0]]
        layouts = [checkpoint.layout(source, shape) for source in each]
        odd = next((layout for layout in layouts if layout.kind != layouts[0].kind), None)
        if odd is not None:
            raise QuantizeError(
                f"{odd.data}: is {odd.format}, but {layouts[0].data.name} is {layouts[0].format}; "
                "the experts of a layer should have one dtype: download the checkpoint again"
            )
        storage = choose(layouts[0], recipe.format_of(each[0], shape[-1]), shape[-1])
        nbytes = sum(layout.nbytes for layout in layouts)
        yield Target(name, tuple(each), shape, storage, nbytes)


def _expert_dtype(checkpoint: Checkpoint | PrunedCheckpoint, cfg: Config) -> str:
    """As the tensors have it: config.json only informs."""
    name = "layers.0.ffn.experts.0.w1.weight"
    return _DTYPES.get(checkpoint.layout(name, expected(cfg)[name]).format, "bf16")


def describe(targets: list[Target]) -> dict[str, Any] | None:
    """config.json's "quantization": the commonest packing, then each module's, or false."""
    table: dict[str, Any] = {}
    weights: Counter[Any] = Counter()
    for target in targets:
        packing = target.storage.packing
        if packing is not None:
            table[target.module] = packing.to_dict()
            weights[packing] += target.source_bytes
        elif is_matrix(target.name, target.shape) or target.module == "embed":
            table[target.module] = False
    if not weights:
        return None
    return weights.most_common(1)[0][0].to_dict() | table
