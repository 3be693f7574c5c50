"""The memory that a loaded model takes on a GPU, as the cuda backend lays it out."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..config import Config
from ..config_fields import CSA_RATIO
from ..quant.recipes import Recipe
from ..weights.synthetic import SyntheticCheckpoint
from .sizes import row_bytes, weight_sizes

_UNPACKED_FROM = 512  # tokens: MANY in backends/cuda/kernels/dense.py
_INDEX_SCORES = 256 << 20  # of one tile of tokens, at most (backends/cuda/kernels/index.py)
SLACK = 2048  # rows of open blocks that the cuda backend keeps of a longer chunk
_ALIGN = 4  # 583 bytes of a key-value row take 584


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    cache: int  # windows and pools, in the native row formats
    state: int  # float32 rows of open blocks
    working: int  # what the largest step needs for itself

    @property
    def held(self) -> int:
        """What stays between steps."""
        return self.weights + self.cache + self.state

    @property
    def total(self) -> int:
        return self.held + self.working


def predict(
    cfg: Config,
    recipe: Recipe,
    context: int,
    slots: int = 1,
    max_chunk: int = 256,
    unique_layers: int | None = None,
) -> Memory:
    """What loading takes, what stays, and what a step of `max_chunk` tokens needs beside.

    context        positions that each of `slots` sequences may have
    max_chunk      tokens of a sequence that a step may have; rings hold so many beyond a window,
                   but no more than SLACK of open blocks
    unique_layers  of a synthetic model: layers that have weights of their own
    """
    cache, state = (slots * sum(part) for part in zip(*_rows(cfg, context, max_chunk), strict=True))
    weights = _weights(cfg, recipe, unique_layers)
    return Memory(weights, cache, state, working(cfg, context, max_chunk))


def held_beside(cfg: Config, context: int, max_chunk: int) -> int:
    """What one sequence holds beside the weights: windows, pools and open blocks."""
    return sum(map(sum, _rows(cfg, context, max_chunk)))


def _weights(cfg: Config, recipe: Recipe, unique: int | None) -> int:
    if unique is None:
        return weight_sizes(cfg, recipe).total
    source = SyntheticCheckpoint(cfg, recipe=recipe, unique_layers=unique)
    return sum(map(source.nbytes, source.kept()))


def _rows(cfg: Config, context: int, chunk: int) -> Iterable[tuple[int, int]]:
    """Bytes of a layer's cache and of its open blocks, one sequence; a spare row in each."""
    kv, index = (-(-nbytes // _ALIGN) * _ALIGN for nbytes in row_bytes(cfg))
    for ratio in cfg.compress_ratios:
        cache, state = (cfg.sliding_window + chunk + 1) * kv, 0
        if ratio:
            ring, entries = 2 * ratio + min(chunk, SLACK) + 1, max(1, context // ratio) + 1
            halves, width = (2, cfg.head_dim) if ratio == CSA_RATIO else (1, cfg.head_dim)
            cache += entries * kv
            state += ring * 2 * halves * width * 4
            if ratio == CSA_RATIO:
                cache += entries * index
                state += ring * 4 * cfg.index_head_dim * 4
        yield cache, state


def working(cfg: Config, context: int, tokens: int) -> int:
    """Arrays that live when attention has ended in a layer with an indexer, where most do."""
    hidden, streams = cfg.hidden_size, cfg.hc_mult * cfg.hidden_size
    queries = cfg.num_attention_heads * cfg.head_dim
    index_queries = cfg.index_n_heads * cfg.index_head_dim
    low, groups = cfg.q_lora_rank, cfg.o_groups * cfg.o_lora_rank
    first = low + 5 * cfg.head_dim + 4 * cfg.index_head_dim + cfg.index_n_heads
    floats = 2 * streams + 2 * hidden + first + queries + index_queries
    halves = hidden + low + queries + groups
    # wo_a's input in another order, or the matrix unpacked, as kernels/dense.py chooses
    beside = queries * (tokens if tokens < _UNPACKED_FROM else cfg.o_lora_rank)
    scores = min(_INDEX_SCORES, 4 * tokens * context // CSA_RATIO)
    return tokens * (4 * floats + 2 * halves) + 2 * beside + scores + 4 * cfg.vocab_size
