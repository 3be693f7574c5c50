"""Where watts and joules come from, and windows over them.

Sources (source.py) are read by one sampler (sampler.py) on one monotonic clock; window.py turns
what it kept into the energy between two moments, or says why it cannot.
"""

from .sampler import Sampler
from .source import PowerSource, Reading, Scope
from .window import Energy, Total, Trace, energy, total

__all__ = [
    "Energy",
    "PowerSource",
    "Reading",
    "Sampler",
    "Scope",
    "Total",
    "Trace",
    "energy",
    "total",
]
