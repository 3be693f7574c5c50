"""Prompts of a wanted length from packaged English prose, the same for the same seed.

Random tokens would flatter or spoil caches, drafters and routing; so do prompts that begin alike.
"""

import random
from collections.abc import Callable

from ..loader import find_model
from ..tokenizer import Tokenizer
from .load import Prompt

_FILES = "calibration.txt", "heldout.txt"


def prose() -> str:
    """The packaged model's texts: public-domain books."""
    folder = find_model("demo")
    return "\n\n".join((folder / name).read_text("utf-8") for name in _FILES)


class TokenTexts:
    """Prompts as token ids: exact lengths."""

    def __init__(self, ids: list[int], bos: int | None, seed: int) -> None:
        self._ids, self._bos, self._rng = ids, bos, random.Random(seed)

    def new(self, tokens: int) -> Prompt:
        start = self._rng.randrange(len(self._ids))
        ids = self._ids[start : start + tokens]
        while len(ids) < tokens:
            ids += self._ids[: tokens - len(ids)]
        return ids if self._bos is None else [self._bos, *ids[: tokens - 1]]

    def join(self, prompt: Prompt, answer: Prompt, more: Prompt | None) -> Prompt:
        assert not isinstance(prompt, str)
        assert not isinstance(answer, str)
        assert not isinstance(more, str)
        return [*prompt, *answer, *(more or [])]


class PlainTexts:
    """Prompts as text, for a server: about as many tokens as are wanted."""

    def __init__(self, text: str, characters_per_token: float, seed: int) -> None:
        self._text, self._per_token = text, characters_per_token
        self._rng = random.Random(seed)

    def new(self, tokens: int) -> Prompt:
        length = max(1, round(tokens * self._per_token))
        start = self._text.find(" ", self._rng.randrange(len(self._text))) + 1
        text = self._text[start : start + length]
        while len(text) < length:
            text += self._text[: length - len(text)]
        return text

    def join(self, prompt: Prompt, answer: Prompt, more: Prompt | None) -> Prompt:
        assert isinstance(prompt, str)
        assert isinstance(answer, str)
        assert more is None or isinstance(more, str)
        return prompt + answer + (more or "")


def token_texts(tokenizer: Tokenizer | None, vocab_size: int) -> Callable[[int], TokenTexts]:
    """For a model: its tokenizer's reading of the prose; without one, random ids."""
    if tokenizer is not None:
        ids, bos = tokenizer.encode(prose()), tokenizer.bos_id
        return lambda seed: TokenTexts(ids, bos, seed)
    rng = random.Random(0)
    ids = [rng.randrange(vocab_size) for _ in range(1 << 14)]
    return lambda seed: TokenTexts(ids, None, seed)
