"""How much memory MLX may keep: what it holds wired on a Mac, and what it hoards for reuse."""

import logging

import mlx.core as mx

log = logging.getLogger("ds4")

HOARD = 1 << 30  # bytes of freed buffers kept for reuse; MLX by itself would keep all


def usable() -> int:
    """Bytes that macOS lets the GPU have."""
    return int(mx.device_info()["max_recommended_working_set_size"])


def set_limits() -> None:
    """On a Mac: bound the hoard, and keep the weights from being paged out.

    The wired limit may not exceed what macOS recommends, which `sysctl iogpu.wired_limit_mb`
    raises; before macOS 15 there is none, and the weights then stay only as long as they are used.
    """
    mx.set_cache_limit(HOARD)
    try:
        mx.set_wired_limit(usable())
    except (KeyError, ValueError, RuntimeError) as error:
        log.warning("macOS keeps no memory wired for the model: %s", error)
