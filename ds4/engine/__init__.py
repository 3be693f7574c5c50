"""Many requests at once on one model: scheduler, prefix cache, and the loop."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    """Import the engine when it is first used: its interface, api.py, needs little."""
    if name != "Engine":
        raise AttributeError(f"module 'ds4.engine' has no attribute {name!r}")
    from .engine import Engine

    return Engine
