"""How the next token is chosen: parameters, penalties, and randomness that a seed fixes.

The choice itself is `Backend.sample`. The host prepares small arrays for it: one random number a
token, drawn from (seed, position) alone, so that the same seed means the same text on every backend
and in any batch.
"""

import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backend import Array, Backend
from .errors import PromptError

f32 = np.float32


@dataclass(frozen=True)
class SamplingParams:
    """Options of one request. Raises PromptError for values out of range."""

    max_tokens: int | None = None  # None: until the context is full
    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # for tokens of the prompt and of the text so far
    presence_penalty: float = 0.0  # once for a token of the text so far
    frequency_penalty: float = 0.0  # for each time it occurs there
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # how many alternatives to report for each token
    seed: int | None = None  # None: a new one each time
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._check("temperature", 0 <= self.temperature < math.inf, "at least 0")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("top_k", self.top_k >= 0, "at least 0")
        self._check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0")
        self._check("presence_penalty", math.isfinite(self.presence_penalty), "finite")
        self._check("frequency_penalty", math.isfinite(self.frequency_penalty), "finite")
        self._check("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check("stop", all(self.stop), "strings that are not empty")

    def _check(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            raise PromptError(f"{name} must be {rule}, not {getattr(self, name)}")


class Sampler:
    """Chooses the tokens of one sequence."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        for token in params.logit_bias:
            if not 0 <= token < vocab_size:
                raise PromptError(f"logit_bias names token {token} of {vocab_size}")
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._prompt = frozenset(prompt)
        self._counts: Counter[int] = Counter()

    def __call__(self, be: Backend, logits: Array, position: int) -> int:
        """The token at `position`, from logits (1, V) on the backend's device."""
        return self.took(be, self.pick(be, logits, position))

    def pick(self, be: Backend, logits: Array, position: int) -> Array:
        """The same, (1,) and still on the device; `took` must follow before the next."""
        p = self.params
        ids, factor, offset = self.adjustments()
        if ids:
            logits = be.adjust(
                logits,
                be.upload(np.array([ids], np.int32)),
                be.upload(np.array([factor], f32)),
                be.upload(np.array([offset], f32)),
            )
        draw = uniform(self.seed, position)
        numbers = [p.temperature, p.top_p, p.min_p, draw]
        temperature, top_p, min_p, u = (be.upload(np.array([x], f32)) for x in numbers)
        top_k = be.upload(np.array([p.top_k], np.int32))
        return be.sample(logits, temperature, top_k, top_p, min_p, u)

    def took(self, be: Backend, picked: Array) -> int:
        """The token that `pick` picked, counted: here the host waits."""
        token = int(be.download(picked)[0])
        self._counts[token] += 1
        return token

    def adjustments(self) -> tuple[list[int], list[float], list[float]]:
        """Token ids with the factor and the offset that penalties and biases give them."""
        p = self.params
        touched: set[int] = set(p.logit_bias)
        if p.presence_penalty or p.frequency_penalty:
            touched |= self._counts.keys()
        if p.repetition_penalty != 1:
            touched |= self._counts.keys() | self._prompt
        ids = sorted(touched)
        return ids, [self._factor(t) for t in ids], [self._offset(t) for t in ids]

    def _factor(self, token: int) -> float:
        seen = token in self._counts or token in self._prompt
        return self.params.repetition_penalty if seen else 1.0

    def _offset(self, token: int) -> float:
        p, count = self.params, self._counts[token]
        penalty = p.presence_penalty * (count > 0) + p.frequency_penalty * count
        return p.logit_bias.get(token, 0.0) - penalty


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of 24 bits that depends on nothing else: Philox, counted by position."""
    bits = np.random.Philox(key=seed % 2**64, counter=position).random_raw()
    return float(int(bits) >> 40) * 2.0**-24


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of probabilities before penalties and temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprob(logits: NDArray[Any], token: int, top: int) -> TokenLogprob:
    """From one row of logits (V,)."""
    shifted = logits.astype(np.float64) - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-logprobs, kind="stable")[:top]
    return TokenLogprob(
        token, float(logprobs[token]), tuple((int(t), float(logprobs[t])) for t in best)
    )
