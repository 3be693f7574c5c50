"""A text cut into windows that a model reads one by one; each of its tokens is predicted once."""

from dataclasses import dataclass

from ..errors import PromptError
from ..llm import LLM
from ..tokenizer import Tokenizer

WINDOW = 1024  # tokens that a model sees at most before the one that it predicts


@dataclass(frozen=True)
class Windows:
    """Token ids by window, each behind a begin token; the first of a window is not predicted."""

    ids: tuple[tuple[int, ...], ...]
    nbytes: int  # of the text that is predicted

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return sum(len(window) - 1 for window in self.ids)


def cut(tokenizer: Tokenizer, text: str, size: int, tokens: int | None = None) -> Windows:
    """Windows of `size` tokens and a begin token over the first `tokens` of a text (None: all).

    Raises PromptError for a text without tokens.
    """
    ids = tokenizer.encode(text)[:tokens]
    if not ids:
        raise PromptError("the text to read is empty")
    return Windows(
        tuple((tokenizer.bos_id, *ids[at : at + size]) for at in range(0, len(ids), size)),
        sum(len(tokenizer.token_bytes(token)) for token in ids),
    )


def cut_for(llm: LLM, text: str, size: int, tokens: int | None = None) -> Windows:
    """Windows that fit a model. Raises PromptError if it has no tokenizer."""
    if llm.tokenizer is None:
        raise PromptError("this model's folder has no tokenizer.json, which reading a text needs")
    return cut(llm.tokenizer, text, min(size, llm.config.max_position_embeddings - 1), tokens)
