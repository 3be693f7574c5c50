"""A loaded model as people use it: text or messages in, text out."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from .backend import Array
from .chat import ChatEncoding
from .draft.speculate import Speculator, Turn
from .errors import PromptError
from .runner import Runner
from .sampler import Sampler, SamplingParams, TokenLogprob, token_logprob
from .tokenizer import TextStream, Tokenizer
from .weights.checkpoint import Extra

FinishReason = Literal["stop", "length"]
Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
_Chosen = tuple[int, NDArray[np.float32] | None]


@dataclass(frozen=True)
class Generation:
    """The outcome of one request. Token ids are those of the text, without the end token."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    usage: dict[str, int]  # prompt_tokens, cached_tokens, completion_tokens, total_tokens
    timings: dict[str, float]  # prefill_s, ttft_s, decode_s, prefill_tok_s, decode_tok_s
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Piece:
    """Text as it comes. The last piece carries the whole Generation."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason | None = None
    generation: Generation | None = None


@dataclass
class _Clock:
    start: float = field(default_factory=time.perf_counter)
    prefilled: float = 0.0
    first: float = 0.0

    def timings(self, prompt_tokens: int, completion_tokens: int) -> dict[str, float]:
        prefill = self.prefilled - self.start
        decode = time.perf_counter() - self.first
        return {
            "prefill_s": prefill,
            "ttft_s": self.first - self.start,
            "decode_s": decode,
            "prefill_tok_s": prompt_tokens / max(prefill, 1e-9),
            "decode_tok_s": max(completion_tokens - 1, 0) / max(decode, 1e-9),
        }


class LLM:
    """One sequence at a time on slot 0, whose cache stays for the next prompt that begins alike."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        chat: ChatEncoding | None = None,
        defaults: Mapping[str, Any] | None = None,
        unused: Sequence[Extra] = (),
        speculator: Speculator | None = None,
        wordless: str = "give token ids",
    ) -> None:
        self.runner, self.tokenizer, self.chat = runner, tokenizer, chat
        self.wordless = wordless  # why there is no tokenizer, if so, and the remedy
        self.speculator = speculator  # guesses tokens, if it is to
        self.defaults = dict(defaults or {})  # sampling options that the model asks for
        self.unused = tuple(unused)  # tensors of the checkpoint that were left out
        self.config, self.context = runner.cfg, runner.context
        self.backend_name, self.device = runner.be.name, runner.be.device
        self._held: list[int] = []  # the tokens whose rows slot 0 holds
        self._turn = object()  # of the stream that may go on

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (T, vocab) of every position of `ids`, computed from an empty state."""
        if not len(ids):
            return np.zeros((0, self.config.vocab_size), np.float32)
        self._turn = object()
        self._forget()
        return np.concatenate(
            [self.runner.be.download(rows) for rows in self._absorb(ids, every_row=True)]
        )

    def generate(self, prompt: Prompt, *, thinking: str = "off", **options: Any) -> Generation:
        """Run a prompt to its end; the arguments of `stream`."""
        for piece in self.stream(prompt, thinking=thinking, **options):
            if piece.generation is not None:
                return piece.generation
        raise AssertionError("a stream ends with a generation")

    def stream(self, prompt: Prompt, *, thinking: str = "off", **options: Any) -> Iterator[Piece]:
        """Yield text as it is generated; closing the iterator cancels.

        A piece may be empty: one comes after each chunk of a long prompt, and text that may turn
        out to be a stop string is held back.

        prompt    text, which follows a begin token; token ids, as they are; or chat messages,
                  dicts with role and content, encoded with `thinking` off, high or max
        options   the fields of SamplingParams; else what generation_config.json says

        Raises PromptError for a prompt that cannot be run.
        """
        params = SamplingParams(**(self.defaults | options))
        ids = self.encode(prompt, thinking)
        if len(ids) >= self.context:
            most = self.config.max_position_embeddings
            longer = f" or ask for a longer context (this model allows {most})"
            raise PromptError(
                f"the prompt has {len(ids)} tokens, and the context of {self.context} must hold "
                f"it and an answer: shorten it{longer if self.context < most else ''}"
            )
        sampler = Sampler(params, ids, self.config.vocab_size)
        return self._alone(self._run(ids, params, sampler))

    def encode(self, prompt: Prompt, thinking: str = "off") -> list[int]:
        """The token ids of a prompt. Raises PromptError if it is empty or cannot be encoded."""
        if isinstance(prompt, str):
            tokenizer = self._need_tokenizer()
            return [tokenizer.bos_id, *tokenizer.encode(prompt)]
        if not len(prompt):
            raise PromptError("the prompt is empty")
        if isinstance(prompt[0], Mapping):
            self._need_tokenizer()
            assert self.chat is not None
            return self.chat.encode(cast(Sequence[Message], prompt), thinking)
        return [int(token) for token in cast(Sequence[int], prompt)]

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise PromptError(f"this model has no words: {self.wordless}")
        return self.tokenizer

    def _alone(self, pieces: Generator[Piece, None, None]) -> Iterator[Piece]:
        """Pieces as long as nothing else is run: there is one cache."""
        self._turn = turn = object()
        with closing(pieces):
            for piece in pieces:
                yield piece
                if self._turn is not turn and piece.generation is None:
                    raise PromptError(
                        "another prompt was begun before this stream's end: read or close a stream "
                        "first; ds4.engine runs several at once"
                    )

    def _run(
        self, ids: list[int], params: SamplingParams, sampler: Sampler
    ) -> Generator[Piece, None, None]:
        clock = _Clock()
        text = TextStream(self.tokenizer, params.stop)
        logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        cached = self._reuse(ids)
        for logits in self._absorb(ids[cached:]):
            self.runner.be.download(logits)  # wait: the work is done, and the clock is right
            if len(self._held) < len(ids):
                yield Piece("", [])  # a long prefill can be watched and cancelled
        clock.prefilled = time.perf_counter()
        budget = min(params.max_tokens or self.context, self.context - len(ids))
        finish: FinishReason = "length"
        if self.speculator is None:
            chosen = self._plainly(logits, len(ids), sampler, budget)
        else:
            chosen = self._speculating(logits, ids, sampler, budget)
        for token, row in chosen:
            clock.first = clock.first or time.perf_counter()
            if token == self.config.eos_token_id or token in params.stop_ids:
                finish = "stop"
                break
            if logprobs is not None and row is not None:
                logprobs.append(token_logprob(row, token, params.logprobs or 0))
            yield Piece(text.push(token), [token])
            if text.stopped:
                break
        tail = text.flush()
        finish = "stop" if text.stopped else finish
        usage = _usage(len(ids), cached, len(text.tokens))
        timings = clock.timings(len(ids) - cached, len(text.tokens))
        generation = Generation(text.text, text.tokens, finish, usage, timings, logprobs)
        yield Piece(tail, [], finish, generation)

    def _plainly(
        self,
        logits: Array,
        length: int,
        sampler: Sampler,
        budget: int,
        goes_on: Callable[[], bool] = lambda: True,
    ) -> Iterator[_Chosen]:
        """One token a step, each with the logits that it was chosen from, if they are wanted.

        `length` tokens are there. `goes_on` is asked before each further step.
        """
        be, looks_ahead = self.runner.be, getattr(self.runner.be, "looks_ahead", False)
        for number in range(budget):
            picked = sampler.pick(be, logits, length + number)
            row = None if sampler.params.logprobs is None else be.download(logits)[0]
            more = number + 1 < budget and goes_on()
            if more and looks_ahead:  # the next step begins before the host knows its token
                logits = self.runner.run_ahead([0], picked)
            token = sampler.took(be, picked)
            if more and looks_ahead:
                self._held.append(token)
            yield token, row
            if not more:
                return
            if not looks_ahead:
                logits = next(self._absorb([token]))

    def _speculating(
        self, logits: Array, ids: list[int], sampler: Sampler, budget: int
    ) -> Iterator[_Chosen]:
        """The same tokens, several a step where guesses were right."""
        assert self.speculator is not None
        wanted = sampler.params.logprobs is not None
        ahead = getattr(self.runner.be, "looks_ahead", False)
        text, record = list(ids), self.speculator.policy.record()
        for token, row in self._plainly(logits, len(ids), sampler, 1):
            text.append(token)
            yield token, row
        while left := len(ids) + budget - len(text):
            turn = Turn(0, text, sampler, left, record, wanted)
            asked = self.speculator.lengths([turn])
            if ahead and not any(asked):  # a step is faster where it begins ahead of the host
                for token, row in self._pausing(turn):
                    text.append(token)
                    yield token, row
                continue
            (came,) = self.speculator.round([turn], asked)
            self._held += [text[-1], *came.tokens[:-1]]
            for number, token in enumerate(came.tokens):
                sampler.count(token)
                text.append(token)
                yield token, None if came.logits is None else came.logits[number]

    def _pausing(self, turn: Turn) -> Iterator[_Chosen]:
        """Plain steps for as long as guessing does not pay."""
        speculator, last = self.speculator, 0.0
        assert speculator is not None

        def goes_on() -> bool:
            nonlocal last
            now = time.perf_counter()
            if last:
                speculator.stepped([turn], now - last)
            last = now
            return not any(speculator.lengths([turn]))

        logits = next(self._absorb(turn.text[-1:]))
        yield from self._plainly(logits, len(turn.text), turn.sampler, turn.most, goes_on)

    def _reuse(self, ids: list[int]) -> int:
        """Rewind slot 0 to the longest prefix that it shares with `ids`; its length."""
        alike = 0
        for held, wanted in zip(self._held, ids[:-1], strict=False):  # one is left to be run
            if held != wanted:
                break
            alike += 1
        if not self.runner.can_rewind(0, alike):
            alike = 0
        self.runner.rewind(0, alike)
        del self._held[alike:]
        return alike

    def _forget(self) -> None:
        self.runner.rewind(0, 0)
        self._held = []

    def _absorb(self, ids: Sequence[int], every_row: bool = False) -> Iterator[Array]:
        """Append `ids` to slot 0 in chunks; yield the logits of each."""
        for start in range(0, len(ids), self.runner.max_chunk):
            chunk = list(ids[start : start + self.runner.max_chunk])
            logits = self.runner.run({0: chunk}, every_row=every_row)
            self._held += chunk
            yield logits


def _usage(prompt: int, cached: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
