"""ds4: DeepSeek-V4-Flash on the machine at home.

import ds4
llm = ds4.load("demo")
print(llm.generate("Once upon a time", max_tokens=64).text)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import Ds4Error
    from .llm import LLM, Generation, Piece
    from .loader import load
    from .sampler import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Ds4Error", "Generation", "Piece", "SamplingParams", "load"]

_HOME = {
    "LLM": "llm",
    "Ds4Error": "errors",
    "Generation": "llm",
    "Piece": "llm",
    "SamplingParams": "sampler",
    "load": "loader",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `ds4 --help` should not wait for NumPy."""
    if name not in _HOME:
        raise AttributeError(f"module 'ds4' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
