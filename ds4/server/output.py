"""Sampled tokens to the events of a dialect, through deepseek-recipe's stream parser."""

from collections.abc import Sequence
from typing import Any

import deepseek_recipe as recipe

from ..sampler import TokenLogprob
from ..tokenizer import Detokenizer, Tokenizer
from .dsml import DsmlRepair
from .grammar import DSML
from .tools import Parameters


class OutputParser:
    """One answer. Until the first tag of a call tokens go through as they are; from there on text
    does, repaired. `finished` says that the answer is complete, whatever the model would add.
    """

    def __init__(
        self,
        generator: Any,
        options: Any,
        recipe_tokenizer: Any,
        tokenizer: Tokenizer,
        parallel_calls: bool = True,
        tools: Sequence[Any] = (),
    ) -> None:
        self.ids: list[int] = []  # all that was taken
        self._processor = recipe.StreamProcessor(generator, options, recipe_tokenizer)
        self._tokenizer = tokenizer
        self._repair: DsmlRepair | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._parallel, self._takes = parallel_calls, Parameters(tools)
        self._calls = options.parse_tool_calls
        self._dsml = tokenizer.token_id(DSML)

    @property
    def finished(self) -> bool:
        done: bool = self._processor.finished
        return done or (self._repair is not None and self._repair.ended)

    @property
    def called(self) -> bool:
        """Whether what was sampled ends with a whole block of tool calls."""
        return self._repair is not None and self._repair.ended and not self._repair.cut

    def start(self, prompt_tokens: int, cached_tokens: int, fingerprint: str) -> list[Any]:
        usage = recipe.PromptUsage(
            prompt_tokens=prompt_tokens, prompt_cache_hit_tokens=cached_tokens
        )
        return self._push(
            recipe.InferenceChunk.ready(prompt_usage=usage, system_fingerprint=fingerprint)
        )

    def push(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> list[Any]:
        """The events that these tokens bring."""
        events: list[Any] = []
        plain = self._plain(ids) if self._repair is None else 0
        if plain:
            events += self._tokens(ids[:plain], logprobs[:plain] if logprobs else None)
        for token in ids[plain:]:
            if self.finished:
                break
            events += self._text(token)
        return events

    def finish(self, length: bool) -> list[Any]:
        """The last events. `length`: the model was cut off."""
        events: list[Any] = []
        if self._repair is not None and (rest := self._repair.close()):
            events += self._push(recipe.InferenceChunk.text(rest))
        if not self._processor.finished:
            reasons = recipe.InferenceFinishReason
            reason = reasons.Length if length and not self.finished else reasons.Stop
            events += self._push(recipe.InferenceChunk.finish(reason))
        return events

    def _plain(self, ids: Sequence[int]) -> int:
        """How many of `ids` come before the first tag of a call."""
        for n, token in enumerate(ids):
            if self._calls and token == self._dsml and self._after_bracket(ids[:n]):
                self._repair = DsmlRepair(self._parallel, self._takes)
                return n
        return len(ids)

    def _after_bracket(self, before: Sequence[int]) -> bool:
        last = [*self.ids[-1:], *before][-1:]
        return any(self._tokenizer.token_bytes(token).endswith(b"<") for token in last)

    def _tokens(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> list[Any]:
        self.ids += ids
        values = [(each.logprob, list(each.top)) for each in logprobs] if logprobs else None
        return self._push(recipe.InferenceChunk.tokens(list(ids), values))

    def _text(self, token: int) -> list[Any]:
        assert self._repair is not None
        self.ids.append(token)
        text = self._repair.push(self._detokenizer.push([token]))
        return self._push(recipe.InferenceChunk.text(text, 1))

    def _push(self, chunk: Any) -> list[Any]:
        events: list[Any] = self._processor.push(chunk)
        return events
