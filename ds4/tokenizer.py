"""Text to token ids and back, one piece at a time.

A tokenizer.json of DeepSeek's kind: byte-level BPE plus added tokens such as <｜User｜>. Most of
those lack the "special" flag, so the library's own switches would still turn the same text, typed
by a user, into the control token. `Tokenizer.encode` matches no added token at all.
"""

import codecs
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel

from .errors import CheckpointError, PromptError
from .json_fields import AGAIN, need_regular

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"


class Tokenizer:
    """A tokenizer.json: `size` counts its tokens, `bos_id` and `eos_id` begin and end a text."""

    def __init__(self, full: tokenizers.Tokenizer) -> None:
        """For `from_file`. Raises ValueError if `full` is not byte-level or lacks BOS or EOS."""
        if not isinstance(full.decoder, ByteLevel):
            raise ValueError("its decoder is not ByteLevel")
        full.no_truncation()
        full.no_padding()
        self._full = full
        self._plain = _without_added_tokens(full)
        self._pieces: dict[int, bytes] = {}
        self.size: int = full.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._need(BOS)
        self.eos_id = self._need(EOS)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a tokenizer.json. Raises CheckpointError, which names the file."""
        path = Path(path)
        need_regular(path, CheckpointError, AGAIN)
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"{path}: not a usable tokenizer.json: {error}; download it again"
            ) from error

    def encode(self, text: str) -> list[int]:
        """The ids of `text` as plain text, whatever it spells. No BOS. Raises PromptError."""
        return _encode(self._plain, text)

    def encode_with_specials(self, text: str) -> list[int]:
        """The ids of trusted `text`, in which spelled-out control tokens count as such. No BOS."""
        return _encode(self._full, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens spelled out; ids outside the vocabulary are skipped."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_id(self, text: str) -> int | None:
        """The id of one token by its exact spelling in the vocabulary."""
        found: int | None = self._full.token_to_id(text)
        return found

    def control_ids(self) -> list[int]:
        """The ids of tokens that are no text, such as <｜User｜>."""
        return sorted(self._full.get_added_tokens_decoder())

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to the text: perhaps a part of a character."""
        if token not in self._pieces:
            self._pieces[token] = _unmap(self._full.id_to_token(token) or "") if token >= 0 else b""
        return self._pieces[token]

    def _need(self, text: str) -> int:
        found = self.token_id(text)
        if found is None:
            raise ValueError(f"it has no token {text}")
        return found


class Detokenizer:
    """Text from a stream of ids. A character split between tokens waits until it is whole.

    What `push` and `flush` return, joined, is `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these ids."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character never became whole, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first.

    Text that may be the beginning of a stop string is held back. How the stream was divided makes
    no difference; of two stop strings complete at the same character the longer one counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise PromptError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None  # the stop string that ended the text
        self.rest = ""  # what came after it

    def push(self, text: str) -> str:
        """The text that is now certain to come before any stop string."""
        if self.found is not None:
            self.rest += text
            return ""
        text = self._held + text
        hits = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            end, start = min(hits)
            self.found, self.rest, self._held = text[start:end], text[end:], ""
            return text[:start]
        keep = len(text) - self._open(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, if no stop string came."""
        held, self._held = self._held, ""
        return held

    def _open(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stops):
                return n
        return 0


class TextStream:
    """Tokens turned into text, held back where a stop string may be beginning."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._stop.found

    def push(self, token: int) -> str:
        self.tokens.append(token)
        return self._add(self._detokenizer.push([token]) if self._detokenizer else "")

    def flush(self) -> str:
        rest = self._detokenizer.flush() if self._detokenizer else ""
        return self._add(rest) + self._add(self._stop.flush(), certain=True)

    def _add(self, text: str, certain: bool = False) -> str:
        text = text if certain else self._stop.push(text)
        self.text += text
        return text


def _without_added_tokens(full: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same model, shared, not copied, behind a tokenizer that knows no added tokens."""
    plain = tokenizers.Tokenizer(full.model)
    if full.normalizer is not None:
        plain.normalizer = full.normalizer
    if full.pre_tokenizer is not None:
        plain.pre_tokenizer = full.pre_tokenizer
    return plain


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the prompt is not valid text: character {error.start} is a lone surrogate"
        raise PromptError(message) from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _unmap(token: str) -> bytes:
    """The bytes that a vocabulary entry stands for; added tokens are spelled in plain UTF-8."""
    try:
        return bytes(_BYTES[letter] for letter in token)
    except KeyError:
        return token.encode()
