"""What a sequence leaves behind: rings of recent rows and pools of compressed ones.

Row j of a ring holds position j modulo its size, so rewinding is moving a cursor: nothing is
undone. A ring takes a whole chunk before anything reads it, so it has room for a chunk beyond its
window; the same room is the slack by which a sequence can be rewound. A backend that pools a long
chunk's blocks from the chunk itself says with `slack` how much is enough in rings of open blocks.
"""

from dataclasses import dataclass

from .backend import Backend, Rows
from .config import Config
from .errors import BackendError, ConfigError


@dataclass(frozen=True)
class LayerCache:
    """The state of one layer for every slot (spec 4.1)."""

    window: Rows  # rotated key-value rows of recent positions, head_dim wide
    rows: Rows = None  # projected [K | gate] rows of open blocks
    pool: Rows = None  # one compressed row a block, head_dim wide
    index_rows: Rows = None  # the same two for the indexer
    index_pool: Rows = None
    streams: Rows = None  # of an MTP drafter: recent streams of the model, hc_mult * hidden_size


def slack_of(be: Backend, max_chunk: int) -> int:
    """Rows that rings of open blocks have beyond what is open."""
    return min(max_chunk, getattr(be, "slack", max_chunk))


def make_cache(
    be: Backend, cfg: Config, slots: int, context: int, max_chunk: int
) -> list[LayerCache]:
    """Caches for `slots` sequences of up to `context` positions, in chunks of up to `max_chunk`.

    Raises ConfigError for widths that the native row formats cannot hold, BackendError where
    memory does not suffice.
    """
    if be.cache == "native":
        _check_native(cfg)
    try:
        return [
            _layer_cache(be, cfg, ratio, slots, context, max_chunk) for ratio in cfg.compress_ratios
        ]
    except (MemoryError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        if not _too_large(error):
            raise
        raise BackendError(
            f"{slots:,} slots of {context:,} tokens do not fit in memory: fewer --slots or a "
            "shorter --context"
        ) from error


# What NumPy, PyTorch and MLX say, besides MemoryError, of an array that no memory holds
_NO_ROOM = "out of memory", "allocate", "too big", "maximum allowed dimension", "overflow"


def _too_large(error: Exception) -> bool:
    words = str(error).lower()
    return isinstance(error, MemoryError | OverflowError) or any(x in words for x in _NO_ROOM)


def window_cache(be: Backend, cfg: Config, slots: int, max_chunk: int) -> LayerCache:
    """The state of one more layer that has only a window, as drafters' layers have."""
    return _layer_cache(be, cfg, 0, slots, 0, max_chunk)


def stream_rows(cfg: Config) -> int:
    """Rows of a ring of streams: what a step leaves there, and some by which it is rewound."""
    return cfg.sliding_window + 32


def _check_native(cfg: Config) -> None:
    plain = cfg.head_dim - cfg.qk_rope_head_dim
    if plain % 64:
        raise ConfigError(
            "cache=native rounds rows in groups of 64, and head_dim - qk_rope_head_dim is "
            f"{plain}: use cache=exact"
        )
    width = cfg.index_head_dim
    if 4 in cfg.compress_ratios and (width % 32 or width & (width - 1)):
        raise ConfigError(
            f"cache=native needs index_head_dim to be a power of two from 32, not {width}: "
            "use cache=exact"
        )


def _layer_cache(
    be: Backend, cfg: Config, ratio: int, slots: int, context: int, max_chunk: int
) -> LayerCache:
    width, rotary = cfg.head_dim, cfg.qk_rope_head_dim
    window = be.alloc("kv", slots, cfg.sliding_window + max_chunk, width, rotary)
    if not ratio:
        return LayerCache(window)
    halves = 2 if ratio == 4 else 1
    ring, entries = 2 * ratio + slack_of(be, max_chunk), max(1, context // ratio)
    rows = be.alloc("float", slots, ring, 2 * halves * width)
    pool = be.alloc("kv", slots, entries, width, rotary)
    if ratio != 4:
        return LayerCache(window, rows, pool)
    return LayerCache(
        window,
        rows,
        pool,
        be.alloc("float", slots, ring, 4 * cfg.index_head_dim),
        be.alloc("index", slots, entries, cfg.index_head_dim),
    )
