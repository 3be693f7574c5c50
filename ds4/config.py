"""Config: what config.json says about a model, every field checked (specification 1).

Field names are config.json's own; config_fields.py reads and checks them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config_fields import read_fields
from .errors import ConfigError
from .json_fields import AGAIN, need_regular, read_json

Array = NDArray[Any]


@dataclass(frozen=True)
class Yarn:
    """How compressed layers stretch their rotary frequencies."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class Dspark:
    """The block drafter of the 0731 release; its fields' names without "dspark_"."""

    block_size: int
    markov_rank: int
    noise_token: int
    target_layers: tuple[int, ...]  # whose streams it reads


@dataclass(frozen=True)
class Config:
    """The hyper-parameters of one model; immutable, checked by from_dict."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    sliding_window: int
    compress_ratios: tuple[int, ...]  # one a main layer: 0 window only, 4 CSA, any other HCA
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: Yarn | None
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int
    num_nextn_predict_layers: int
    expert_dtype: str
    dspark: Dspark  # what a DSpark drafter would be, if the checkpoint has one

    @classmethod
    def from_file(cls, path: str | Path) -> "Config":
        """The Config in a config.json; ConfigError if it cannot be read or is not valid."""
        need_regular(Path(path), ConfigError, AGAIN)
        return cls.from_dict(read_json(Path(path), ConfigError, AGAIN), str(path))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], source: str = "config.json") -> "Config":
        """The Config in a parsed config.json; `source` is the file that errors name."""
        fields = read_fields(d, source)
        yarn, dspark = fields.pop("rope_scaling"), Dspark(**fields.pop("dspark"))
        return cls(**fields, rope_scaling=None if yarn is None else Yarn(**yarn), dspark=dspark)

    @property
    def group_width(self) -> int:
        """Inputs of one group of wo_a."""
        return self.num_attention_heads * self.head_dim // self.o_groups

    def rope_freqs(self, ratio: int) -> Array:
        """float32 (qk_rope_head_dim / 2,): radians a position, for a layer of this compress ratio.

        Layers with a compressor have their own base and YaRN, without its attention factor
        (specification 3.5). In float32 step by step, as the reference and transformers do.
        """
        rd = self.qk_rope_head_dim
        theta = self.compress_rope_theta if ratio else self.rope_theta
        wavelength = np.asarray(theta ** (np.arange(0, rd, 2) / rd), np.float32)
        plain = np.float32(1) / wavelength
        if not ratio or self.rope_scaling is None:
            return plain
        keep = np.float32(1) - _yarn_ramp(self.rope_scaling, theta, rd)
        stretched = np.float32(1) / (np.float32(self.rope_scaling.factor) * wavelength)
        return stretched * (np.float32(1) - keep) + plain * keep


def _yarn_ramp(yarn: Yarn, theta: float, rd: int) -> Array:
    """float32 (rd / 2,): 0 where a frequency is kept, 1 where it is divided by the factor."""

    def channel(turns: float) -> float:
        length = yarn.original_max_position_embeddings
        return rd * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(yarn.beta_fast)), 0)
    high = min(math.ceil(channel(yarn.beta_slow)), rd - 1)
    width = high - low or 0.001
    ramp = (np.arange(rd // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
    return np.clip(ramp, 0, 1)
