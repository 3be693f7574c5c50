"""The memory that a loaded model takes on a GPU, as the cuda backend lays it out.

Of other backends, what a sequence holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..backend import CacheMode
from ..config import Config
from ..config_fields import CSA_RATIO
from ..quant.recipes import Recipe
from ..step import span
from ..weights.synthetic import SyntheticCheckpoint
from .sizes import kept_by, row_bytes, weight_sizes

_UNPACKED_FROM = 512  # tokens: MANY in backends/cuda/kernels/dense.py
_INDEX_SCORES = 256 << 20  # of one tile of tokens, at most (backends/cuda/kernels/index.py)
_AT_ONCE, _PART = 16_384, 4096  # entries that are ranked together, or in parts (kernels/topk.py)
CHUNK = 4096  # tokens of a prompt that the cuda backend takes at once where everything is on the
# GPU: of 2,048 prompts are 16 % slower, of 8,192 5 % faster, and a step takes twice as long
SLACK = 512  # rows of open blocks that the cuda backend keeps of a longer chunk
DECODED = (1, 2, 4, 8, 16, 24, 32)  # rows that it pads decode steps to, to record them as graphs
RECORDED = (64, 128, 192, 256)  # tokens that it pads chunks of prompts to, likewise
VERIFIED = 128  # rows up to which it records steps that verify guesses, or draft them, as they are
SHAPES = 48  # graphs of a function that it keeps
_GRAPH = (
    6_000_000  # bytes that one of a long step has beside its arrays (1,378 launches, on an H100)
)
_FRAGMENTS = 0.75  # of what a graph has alive, more: see `recorded`
_ALIGN = 4  # 583 bytes of a key-value row take 584


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    cache: int  # windows and pools, in the native row formats
    state: int  # float32 rows of open blocks
    working: int  # what the largest step needs for itself
    recorded: int  # what CUDA graphs keep to themselves

    @property
    def held(self) -> int:
        """What there is before the first step."""
        return self.weights + self.cache + self.state

    @property
    def total(self) -> int:
        return self.held + self.working + self.recorded


def predict(
    cfg: Config,
    recipe: Recipe,
    context: int,
    slots: int = 1,
    max_chunk: int = CHUNK,
    unique_layers: int | None = None,
    drafter: int | None = None,
) -> Memory:
    """What loading takes, what stays, and what a step of `max_chunk` tokens needs beside.

    context        positions that each of `slots` sequences may have
    max_chunk      tokens of a sequence that a step may have; rings hold so many beyond a window,
                   but no more than SLACK of open blocks
    unique_layers  of a synthetic model: layers that have weights of their own
    drafter        weights of one, 0 of look-up; None: nothing is guessed
    """
    max_chunk = min(max_chunk, context)
    cache, state = (slots * sum(part) for part in zip(*_rows(cfg, context, max_chunk), strict=True))
    weights = _weights(cfg, recipe, unique_layers) + (drafter or 0)
    guessing = drafter is not None
    graphs = recorded(cfg, context, recorded_tokens(max_chunk), slots, guessing=guessing)
    return Memory(weights, cache, state, working(cfg, context, max_chunk), graphs)


def held_beside(
    cfg: Config, context: int, max_chunk: int, mode: CacheMode = "native", backend: str = "cuda"
) -> int:
    """What one sequence holds beside the weights: windows, pools and open blocks."""
    return sum(map(sum, _rows(cfg, context, max_chunk, mode, backend)))


def _weights(cfg: Config, recipe: Recipe, unique: int | None) -> int:
    if unique is None:
        return weight_sizes(cfg, recipe).total
    source = SyntheticCheckpoint(cfg, recipe=recipe, unique_layers=unique)
    return sum(map(source.nbytes, source.kept()))


def _rows(
    cfg: Config, context: int, chunk: int, mode: CacheMode = "native", backend: str = "cuda"
) -> Iterable[tuple[int, int]]:
    """Bytes of a layer's cache and of its open blocks, one sequence; a spare row in each."""
    sizes = row_bytes(cfg, kept_by(backend, mode))
    kv, index = (-(-nbytes // _ALIGN) * _ALIGN for nbytes in sizes)
    slack = min(chunk, SLACK) if backend == "cuda" else chunk
    for ratio in cfg.compress_ratios:
        cache, state = (cfg.sliding_window + chunk + 1) * kv, 0
        if ratio:
            ring, entries = 2 * ratio + slack + 1, max(1, context // ratio) + 1
            halves, width = (2, cfg.head_dim) if ratio == CSA_RATIO else (1, cfg.head_dim)
            cache += entries * kv
            state += ring * 2 * halves * width * 4
            if ratio == CSA_RATIO:
                cache += entries * index
                state += ring * 4 * cfg.index_head_dim * 4
        yield cache, state


def recorded_tokens(chunk: int) -> int:
    """Tokens of the longest step that is a graph, if chunks of prompts have up to `chunk`."""
    return next((size for size in RECORDED if size >= chunk), RECORDED[-1])


def recorded(
    cfg: Config, context: int, tokens: int, slots: int, parts: int = 1, guessing: bool = False
) -> int:
    """Memory that graphs of steps of up to `tokens` keep to themselves.

    That is a place for logits of few rows; if several sequences guess, or more step together than
    steps are padded for, one for those of many, and so many shapes that graphs' own memory counts;
    and where there are guesses the same places of the drafter, of drafts made at once and of those
    made place by place.

    Their other arrays share memory. As PyTorch divides it, those of every size of chunk, recorded
    in any order, take 31 to 78 % more than the longest has alive, and with every shape of guesses
    of 4 to 16 sequences no more. (Of one graph of 128 tokens that way of counting gives 84 MB; 82
    were measured, bench/results/chunk.jsonl.)
    """
    many = tokens > DECODED[-1] and slots > (1 if guessing else DECODED[-1])
    rows = (DECODED[-1] + VERIFIED * many) * (3 if guessing else 1)
    others = int((1 + _FRAGMENTS) * working(cfg, context, tokens, parts))
    return 4 * cfg.vocab_size * rows + SHAPES * _GRAPH * many + others


def working(cfg: Config, context: int, tokens: int, parts: int = 1) -> int:
    """Most bytes that a step of `tokens` has alive for itself; attention split into `parts`.

    As the backend's Python makes and drops arrays (tests/test_working_memory.py follows it): in a
    layer with an indexer while it scores or when attention ends, or in any while experts run.
    """
    moments = _choosing, _attending, _feeding
    return max(moment(cfg, context, tokens, parts) for moment in moments) + 4 * cfg.vocab_size


def _choosing(cfg: Config, context: int, tokens: int, parts: int) -> int:
    """The indexer scores a tile of tokens against every entry that they may see."""
    entries, width = context // CSA_RATIO, cfg.index_n_heads * cfg.index_head_dim
    if entries <= cfg.index_topk:  # every entry is chosen
        return 0
    row = 4 * -(-entries // 128) * 128
    tile = min(tokens, max(1, _INDEX_SCORES // row))
    kept = 0  # of long rows, the best of each part, with their names
    if entries > _AT_ONCE:
        kept = 8 * min(_AT_ONCE, cfg.index_topk * -(-entries // _PART))
    each = row + kept + 2 * width + 4 * cfg.index_n_heads
    return tokens * _before_attention(cfg, context, parts) + tile * each


def _attending(cfg: Config, context: int, tokens: int, parts: int) -> int:
    """The heads' output, in products that leave a row of the model's width."""
    heads, groups = _heads(cfg) // parts, cfg.o_groups * cfg.o_lora_rank // parts
    # wo_a's input in another order, or the matrix unpacked, as kernels/dense.py chooses
    beside = heads * (tokens if tokens < _UNPACKED_FROM else cfg.o_lora_rank)
    each = _before_attention(cfg, context, parts) + 2 * heads + 2 * groups
    return tokens * each + 2 * beside


def _before_attention(cfg: Config, context: int, parts: int) -> int:
    """Bytes a token: streams of the layer and of the sublayer, and what is computed from these."""
    hidden, low, head = cfg.hidden_size, cfg.q_lora_rank, cfg.head_dim
    streams = 2 * cfg.hc_mult * hidden + hidden
    first = low + 5 * head + 4 * cfg.index_head_dim + cfg.index_n_heads
    index = 0  # its queries and what it chooses, unless every entry is chosen
    if span(context) // CSA_RATIO > cfg.index_topk:
        index = cfg.index_n_heads * cfg.index_head_dim + cfg.index_topk
    return 4 * (streams + first + _heads(cfg) // parts + index) + 2 * (hidden + low)


def _feeding(cfg: Config, context: int, tokens: int, parts: int) -> int:
    """What each chosen expert makes of a token, before it is summed up: on every rank."""
    del context, parts
    hidden, picks = cfg.hidden_size, cfg.num_experts_per_tok
    streams = 3 * cfg.hc_mult * hidden + 2 * hidden  # the layer's, and of both sublayers
    results = hidden + picks * hidden
    return tokens * (4 * (streams + results) + 2 * (2 * hidden + picks * cfg.moe_intermediate_size))


def _heads(cfg: Config) -> int:
    return cfg.num_attention_heads * cfg.head_dim
