"""Checkpoints: what they hold, and how it reaches a backend."""

from .checkpoint import Checkpoint
from .load import load_weights

__all__ = ["Checkpoint", "load_weights"]
