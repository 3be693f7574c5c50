"""Grammars by llguidance: compiled in a worker thread, asked for a mask of tokens each step."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PromptError
from ..tokenizer import Tokenizer
from .api import Grammar

LONGEST = 1 << 18  # characters of a grammar
KEPT = 64  # compiled grammars
EVERY = np.int32(-1)  # all 32 tokens of a word

Matcher = Any  # llguidance.LLMatcher


class Grammars:
    """Compiles what requests ask for. Control tokens count as such: no text matches them.

    A Lark grammar names one by its id, as in <[128821]>.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, end: int) -> None:
        self._tokenizer, self._vocab, self._end = tokenizer, vocab_size, end
        self._workers: ThreadPoolExecutor | None = None
        self._kept: OrderedDict[Grammar, Matcher] = OrderedDict()  # the longest unused first
        self._lock = Lock()

    def compile(self, grammar: Grammar) -> "Future[Matcher]":
        """A matcher at its start, in a while; the future raises PromptError if it cannot be had."""
        if self._workers is None:
            self._workers = ThreadPoolExecutor(2, "grammar")
        return self._workers.submit(self._matcher, grammar)

    def close(self) -> None:
        if self._workers is not None:
            self._workers.shutdown(cancel_futures=True)

    def _matcher(self, grammar: Grammar) -> Matcher:
        kept = self._kept.get(grammar) or self._compiled(grammar)
        with self._lock:
            self._kept[grammar] = kept
            self._kept.move_to_end(grammar)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return kept.deep_copy()

    def _compiled(self, grammar: Grammar) -> Matcher:
        if len(grammar.text) > LONGEST:
            raise PromptError(f"a grammar has at most {LONGEST} characters")
        matcher_type = _library().LLMatcher
        try:
            source = {
                "json_object": lambda: matcher_type.grammar_from_json_schema({"type": "object"}),
                "json_schema": lambda: matcher_type.grammar_from_json_schema(grammar.text),
                "regex": lambda: matcher_type.grammar_from_regex(grammar.text),
                "lark": lambda: matcher_type.grammar_from_lark(grammar.text),
            }[grammar.kind]()
        except ValueError as error:
            raise PromptError(f"{grammar.kind}: {_line(error)}") from error
        matcher = matcher_type(self._words, source, log_level=0)
        if matcher.is_error():
            raise PromptError(f"{grammar.kind}: {_line(matcher.get_error())}")
        return matcher

    @cached_property
    def _words(self) -> Any:
        """The vocabulary as llguidance wants it."""
        if self._tokenizer is None:
            raise PromptError("a grammar needs a tokenizer, and this model's folder has none")
        return _library().LLTokenizer(
            _library().TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab)),
            n_vocab=self._vocab,
            eos_token=self._end,
        )


class _Vocabulary:
    """What TokenizerWrapper asks for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = tokenizer.control_ids()

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode())


def masks(rows: Iterable[tuple[int, Matcher]], shape: tuple[int, int]) -> NDArray[np.int32]:
    """A bit for each token that may come next, of (R, V): all, in rows without a matcher."""
    bits = np.full((shape[0], -(-shape[1] // 32)), EVERY)
    for row, matcher in rows:
        words = bits[row]
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    return bits


def along(
    matcher: Matcher, guess: Sequence[int], vocab_size: int
) -> tuple[list[int], NDArray[np.int32]]:
    """Guessed tokens as far as the grammar allows them, n; what may come after each, (n + 1, W)."""
    bits, taken = np.full((len(guess) + 1, -(-vocab_size // 32)), EVERY), 0
    while not matcher.is_stopped():
        words = bits[taken]
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if taken == len(guess):
            break
        word, bit = divmod(guess[taken], 32)
        if not int(words[word]) >> bit & 1 or not matcher.consume_token(guess[taken]):
            break
        taken += 1
    matcher.rollback(taken)
    return list(guess[:taken]), bits[: taken + 1]


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise PromptError("a grammar needs llguidance: pip install 'ds4[server]'") from error
    return llguidance


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
