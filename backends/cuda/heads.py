"""Attention split over ranks by heads: each has some of the query, and their part of the output.

Keys, values, compressors and the indexer are computed by every rank: they are small, and their
caches are needed whole. Of wq_b and the sinks a rank keeps its heads, of wo_a its groups of heads,
of wo_b the inputs that come from them; what wo_b gives is then summed over the ranks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ds4.config import Config
from ds4.quant import formats
from ds4.ranks import Ranks
from ds4.weights.synthetic_tensor import SyntheticTensor
from ds4.weights.tensor import HostTensor

AXES = {".attn.attn_sink": 0, ".attn.wq_b": 0, ".attn.wo_a": 0, ".attn.wo_b": -1}
SUMMED = ".attn.wo_b"


@dataclass(frozen=True)
class Summed:
    """A matrix of which each rank has some inputs: its products are to be added up."""

    weight: Any


def can_split(cfg: Config, ranks: Ranks) -> bool:
    """Whether every rank gets as many whole groups of heads."""
    counts = cfg.o_groups, cfg.num_attention_heads
    return ranks.size > 1 and not any(count % ranks.size for count in counts)


def part(name: str, tensor: HostTensor, ranks: Ranks) -> HostTensor:
    """What this rank keeps of a weight of this name: most are kept whole."""
    axis = next((axis for end, axis in AXES.items() if name.endswith(end)), None)
    if axis is None:
        return tensor
    if isinstance(tensor, SyntheticTensor) and axis == 0 and _whole_blocks(tensor, ranks):
        parts = (ranks.size, tensor.shape[0] // ranks.size, *tensor.shape[1:])
        return tensor.of_shape(*parts).only([ranks.rank]).of_shape(*parts[1:])
    # the arrays of a synthetic tensor are made when they are read: once is enough
    host = HostTensor(
        tensor.format, tensor.data, tensor.scales, tensor.biases, tensor.bits, tensor.group
    )
    if not all(_divides(x, axis, ranks.size) for x in (host.data, host.scales, host.biases)):
        host = HostTensor("f32", host.decode())
    elif host.format == "fp8" and host.shape[axis] // ranks.size % formats.FP8_BLOCK:
        host = HostTensor("bf16", formats.encode_bf16(host.decode()))  # exact
    return host.map(lambda x: _cut(x, axis, ranks))


def _whole_blocks(tensor: HostTensor, ranks: Ranks) -> bool:
    """Whether a rank's rows are a run of bytes, in scales as in data."""
    if len(tensor.shape) < 2:
        return False
    rows = tensor.shape[-2] // (ranks.size if len(tensor.shape) == 2 else 1)
    return tensor.format != "fp8" or rows % formats.FP8_BLOCK == 0


def _divides(x: np.ndarray | None, axis: int, parts: int) -> bool:
    return x is None or x.shape[axis] % parts == 0


def _cut(x: np.ndarray, axis: int, ranks: Ranks) -> np.ndarray:
    return np.ascontiguousarray(np.split(x, ranks.size, axis)[ranks.rank])
