"""How the next token is chosen: parameters, penalties, and randomness that a seed fixes.

The choice itself is `Backend.sample`. The host prepares small arrays for it: one random number a
token, drawn from (seed, position) alone, so that the same seed means the same text on every backend
and in any batch.
"""

import copy
import functools
import math
import secrets
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .backend import Array, Backend
from .errors import PromptError

f32 = np.float32
COLDEST, NARROWEST = 1e-5, 1e-9  # what lies below would be lost, or too much, in float32
_BLOCK = 32  # positions whose random numbers are made together
_KEPT = 64  # combinations of rows whose parameters stay on a backend's device


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
    stop_ids: Sequence[int] = ()  # tokens that end the text, besides the model's own end token

    def __post_init__(self) -> None:
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._check("temperature", 0 <= self.temperature <= 1000, "from 0 to 1000")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("top_k", 0 <= self.top_k < 2**31, "from 0 to 2147483647")
        self._check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._check(
            "repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"
        )
        self._check("presence_penalty", abs(self.presence_penalty) <= 100, "from -100 to 100")
        self._check("frequency_penalty", abs(self.frequency_penalty) <= 100, "from -100 to 100")
        biases = all(abs(bias) <= 1e6 or bias == -math.inf for bias in self.logit_bias.values())
        self._check("logit_bias", biases, "of numbers from -1e6 to 1e6, or -inf")
        self._check("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check("stop", all(self.stop), "strings that are not empty")
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)
        object.__setattr__(self, "top_p", max(self.top_p, NARROWEST))

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
        self._prompt = frozenset(prompt) if params.repetition_penalty != 1 else frozenset()
        self._counts: Counter[int] = Counter()
        touched = sorted(self._prompt | params.logit_bias.keys())
        self._places = {token: i for i, token in enumerate(touched)}
        room = max(16, len(touched))
        self._ids = np.zeros(room, np.int32)
        self._factors, self._offsets = np.zeros(room, f32), np.zeros(room, f32)
        for token in touched:
            self._adjust(token)

    def __call__(self, be: Backend, logits: Array, position: int) -> int:
        """The token at `position`, from logits (1, V) on the backend's device."""
        return self.took(be, self.pick(be, logits, position))

    def pick(self, be: Backend, logits: Array, position: int) -> Array:
        """The same, (1,) and still on the device; `took` must follow before the next."""
        return pick(be, logits, [(self, position)])

    def took(self, be: Backend, picked: Array) -> int:
        """The token that `pick` picked, counted: here the host waits."""
        token = int(be.download(picked)[0])
        self.count(token)
        return token

    def count(self, token: int) -> None:
        """The text so far has one more token."""
        p = self.params
        self._counts[token] += 1
        if p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1:
            self._adjust(token)

    def after(self, tokens: Sequence[int]) -> "Sampler":
        """This sampler as it will be when it has counted some tokens."""
        p = self.params
        if not tokens or not (
            p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1
        ):
            return self
        later = copy.copy(self)
        later._counts, later._places = self._counts.copy(), self._places.copy()
        later._ids = self._ids.copy()
        later._factors, later._offsets = self._factors.copy(), self._offsets.copy()
        for token in tokens:
            later.count(token)
        return later

    @property
    def adjusts(self) -> bool:
        """Whether penalties or biases change a logit."""
        return bool(self._places)

    def adjustments(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Token ids with the factor and the offset that penalties and biases give them, (P,)."""
        count = len(self._places)
        return self._ids[:count], self._factors[:count], self._offsets[:count]

    def _adjust(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._factors = np.concatenate([self._factors, np.zeros_like(self._factors)])
            self._offsets = np.concatenate([self._offsets, np.zeros_like(self._offsets)])
        p, count = self.params, self._counts[token]
        penalty = p.presence_penalty * (count > 0) + p.frequency_penalty * count
        self._ids[place] = token
        self._factors[place] = p.repetition_penalty if count or token in self._prompt else 1.0
        self._offsets[place] = p.logit_bias.get(token, 0.0) - penalty


Row = tuple[Sampler, int]  # and the position of the token to be chosen


def pick(
    be: Backend,
    logits: Array,
    rows: Sequence[Row | None],
    allowed: NDArray[Any] | None = None,
    draws: Sequence[float] | None = None,
) -> Array:
    """A token for each row of logits (R, V), (R,) and still on the device.

    None is a row that nobody reads. `allowed` int32 (R, ceil(V / 32)) has a bit for each token
    that a grammar allows. `draws` are random numbers in place of those of seeds and positions.
    Each chosen token must be counted by its sampler before the next call.
    """
    if draws is None:
        draws = [
            uniform(row[0].seed, row[1]) if row is not None and row[0].params.temperature else 0.0
            for row in rows
        ]
    u = be.upload(np.array(draws, f32)) if any(draws) else _uploaded(be).no_draws(len(draws))
    return be.sample(*weighed(be, logits, rows, allowed), u)


def weighed(
    be: Backend, logits: Array, rows: Sequence[Row | None], allowed: NDArray[Any] | None = None
) -> tuple[Array, Array, Array, Array, Array]:
    """Logits with penalties, biases and masks; temperature, top_k, top_p and min_p of each row."""
    none = (np.zeros(0, np.int32), np.zeros(0, f32), np.zeros(0, f32))
    adjustments = [none if row is None else row[0].adjustments() for row in rows]
    most = max(len(ids) for ids, _, _ in adjustments)
    if most:
        shape = len(rows), 1 << (most - 1).bit_length()  # few different shapes
        ids, factor, offset = (
            np.full(shape, -1, np.int32),
            np.ones(shape, f32),
            np.zeros(shape, f32),
        )
        for r, parts in enumerate(adjustments):
            for whole, part in zip((ids, factor, offset), parts, strict=True):
                whole[r, : len(part)] = part
        logits = be.adjust(logits, be.upload(ids), be.upload(factor), be.upload(offset))
    if allowed is not None:
        logits = be.mask(logits, be.upload(allowed))
    rules = tuple(_COLD if row is None else rule_of(row[0].params) for row in rows)
    temperature, top_k, top_p, min_p = _uploaded(be).rules(rules)
    return logits, temperature, top_k, top_p, min_p


Rule = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
_COLD: Rule = 0.0, 0, 1.0, 0.0


def rule_of(p: SamplingParams) -> Rule:
    """At temperature 0 the rest says nothing: rows that mean the same are the same."""
    return (p.temperature, p.top_k, p.top_p, p.min_p) if p.temperature else _COLD


class _Uploaded:
    """What rows of one step after another have in common, on the device: nobody writes there."""

    def __init__(self, be: Backend) -> None:
        whose = weakref.ref(be)

        def put(host: NDArray[Any]) -> Array:
            held = whose()
            assert held is not None  # who asks has it
            on_device = held.upload(host)
            if isinstance(on_device, np.ndarray):
                on_device.flags.writeable = False
            return on_device

        @functools.lru_cache(_KEPT)
        def rules(rows: tuple[Rule, ...]) -> tuple[Array, ...]:
            columns = zip(*rows, strict=True)
            kinds = (f32, np.int32, f32, f32)
            return tuple(put(np.array(x, kind)) for x, kind in zip(columns, kinds, strict=True))

        @functools.lru_cache(_KEPT)
        def no_draws(count: int) -> Array:
            return put(np.zeros(count, f32))

        self.rules, self.no_draws = rules, no_draws


_of_backends: weakref.WeakKeyDictionary[Backend, _Uploaded] = weakref.WeakKeyDictionary()


def _uploaded(be: Backend) -> _Uploaded:
    found = _of_backends.get(be)
    if found is None:
        found = _of_backends[be] = _Uploaded(be)
    return found


Purpose = Literal["choose", "guess", "accept"]
_PURPOSES: tuple[Purpose, ...] = ("choose", "guess", "accept")


def uniform(seed: int, position: int, purpose: Purpose = "choose") -> float:
    """A number in [0, 1) of 24 bits that depends on nothing else: Philox, counted by position."""
    block, at = divmod(position, _BLOCK)
    return _uniforms(seed, block, purpose)[at]


@functools.lru_cache(1024)  # texts go on: the next position's number is made with this one's
def _uniforms(seed: int, block: int, purpose: Purpose) -> tuple[float, ...]:
    """Those of _BLOCK positions: each has the first of four words."""
    counter = block * _BLOCK + (_PURPOSES.index(purpose) << 64)
    bits = np.random.Philox(key=seed % 2**64, counter=counter).random_raw(4 * _BLOCK)[::4]
    return tuple(int(word) * 2.0**-24 for word in bits >> 40)


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
