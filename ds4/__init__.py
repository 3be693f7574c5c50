"""ds4: DeepSeek-V4-Flash on the machine at home.

    import ds4
    llm = ds4.load("demo")
    print(llm.generate("Once upon a time", max_tokens=64).text)
"""

from .errors import Ds4Error
from .llm import LLM, Generation, Piece
from .load import load
from .sampler import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Ds4Error", "Generation", "Piece", "SamplingParams", "load"]
