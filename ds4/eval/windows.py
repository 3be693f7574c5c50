"""A text cut into windows that a model reads one by one, and every token of it is predicted once."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PromptError
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


def cut(
    tokenizer: Tokenizer, text: str, size: int = WINDOW, tokens: int | None = None
) -> Windows:
    """Windows of `size` tokens and a begin token over the first `tokens` of a text (None: all).

    Raises PromptError for a text without tokens.
    """
    ids = tokenizer.encode(text)[:tokens]
    if not ids:
        raise PromptError("the text to evaluate on is empty")
    return Windows(
        tuple((tokenizer.bos_id, *ids[at : at + size]) for at in range(0, len(ids), size)),
        nbytes_of(tokenizer, ids),
    )


def nbytes_of(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """The bytes of text that tokens stand for."""
    return sum(len(tokenizer.token_bytes(token)) for token in ids)
