"""The NumPy backend: slow, obvious, the truth."""

from .ops import Reference

__all__ = ["Reference"]
