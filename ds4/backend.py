"""The hardware interface: everything the model asks of a machine.

A backend is a class with these methods, found by name through the entry-point group `ds4.backends`.
Arrays and weights are opaque: the model passes them back in and never looks inside. No operation
names a dtype, a device, a stream, a mask or a batch dimension; none returns a Python number.

Shapes: T tokens in this step, H residual streams, D hidden, N heads, K experts a token, R rows
with logits, V vocabulary. Activations are float32 in and out. A token is a (slot, position): row
`pos % size` of a ring, entry `pos // ratio` of a pool, `(pos + 1) // ratio` entries visible.
Padding has position -1: what it writes goes to a scratch row that nothing reads. Nothing may
depend on memory that was never written, whatever it holds.

References "spec" are to docs/specification.md.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from .config import Config
from .errors import BackendError
from .step import Step
from .weights.tensor import HostTensor

Array = Any  # numpy.ndarray, torch.Tensor or mlx.core.array
Weight = Any  # whatever Backend.load returned
Rows = Any  # whatever Backend.alloc returned
Weights = SimpleNamespace  # weights under the checkpoint's names: see weights/load.py
Host = NDArray[Any]
StepFunction = Callable[[Step], Array]
CacheMode = Literal["native", "exact"]
RowKind = Literal["float", "kv", "index"]


@dataclass(frozen=True)
class RowRange:
    """Rows `start` to `stop`, at least one, of what `alloc` returned, in each slot."""

    rows: Rows
    start: int
    stop: int


class Backend(Protocol):
    """`Backend(device="auto", cache="native")`; raises BackendError if the machine can't.

    A step's tokens may be an array that is on the device already: `upload` lets it through. A
    backend may also have `max_chunk`, the tokens of a prompt that it takes best at once; `slack`,
    the rows that it needs of a longer chunk in rings of open blocks (cache.py);
    `looks_ahead`, true if it computes while the host goes on, so that a step should begin before
    the host has seen its tokens; `decode_sizes`, counts of tokens whose steps it records, so that
    decoding is padded to them; `free_memory()`, bytes of a device of its own, or None, from which
    slots are counted; and `verdicts`, what `ds4 doctor` shows of kernels that it tried here.

    It may have `begin(cfg)`, called before a model's weights are loaded. One of several processes
    has `ranks` (ranks.py), `holds(layer, experts)`, the experts that this one keeps or None for
    all, and `numbered(weight, ids, experts)`: a stack of which matrix i is expert ids[i] becomes
    one that is called by those numbers.
    """

    name: str
    device: str
    cache: CacheMode

    # memory

    def load(self, name: str, tensor: HostTensor) -> Weight:
        """Keep a weight in this machine's layout. `name` is the checkpoint's, for errors."""

    def alloc(self, kind: RowKind, slots: int, rows: int, width: int, rotary: int = 0) -> Rows:
        """State of `rows` rows for each of `slots` sequences, and a scratch row for padding.

        In cache mode "native" a row is rounded when stored, as the model was trained: "kv" to FP8
        in groups of 64, its last `rotary` channels to bf16 (spec 3.4); "index" by Hadamard, then
        FP4 in groups of 32 (spec 3.6); "float" never. In "exact" nothing is rounded.
        """

    def upload(self, host: Host) -> Array:
        """An integer or float32 array, on the device."""

    def download(self, x: Array) -> Host:
        """Back on the host: the only operation that waits."""

    def save(self, slot: int, ranges: Sequence[RowRange]) -> Host:
        """Some rows of a slot as bytes, uint8 (n,): what `restore` takes, on the host.

        Range after range and row after row. In cache mode "native" a row is in its packed form
        (quant/rows.py), 584 bytes for the real model's key-value rows; else float32.
        """

    def restore(self, slot: int, ranges: Sequence[RowRange], data: Host) -> None:
        """Put back what `save` returned for ranges of these sizes, in this slot or another."""

    def copy(self, source: int, target: int, ranges: Sequence[RowRange]) -> None:
        """The same rows from slot to slot, without a way over the host."""

    def capture(self, fn: StepFunction) -> StepFunction:
        """The same function of a host Step, on the device; recorded once a shape if that pays.

        `fn` takes the Step on the device. Its result is valid until the next call.
        """

    # dense

    def embed(self, w: Weight, tokens: Array, copies: int) -> Array:
        """(T,) -> (T, H, D): the row of each token, copied to every stream (spec 3.2)."""

    def linear(self, w: Weight, x: Array) -> Array:
        """(T, in) -> (T, out); the weight knows its format."""

    def linears(self, ws: Sequence[Weight], x: Array) -> list[Array]:
        """Several matrices on the same input: one read of it, one launch where that pays."""

    def grouped_linear(self, w: Weight, x: Array) -> Array:
        """(T, G, in) -> (T, G, out), each group with its own matrix (spec 3.9)."""

    def rms_norm(self, w: Weight | None, x: Array, eps: float) -> Array:
        """Over the last axis; without a weight, none is applied."""

    # hyper-connections (spec 3.3, 3.11)

    def hc_pre(self, w: Weights, norm: Weight, h: Array, cfg: Config) -> tuple[Array, Any]:
        """(T, H, D) -> the normed input of a sublayer (T, D), and the mix for hc_post."""

    def hc_post(self, x: Array, h: Array, mix: Any) -> Array:
        """Sublayer output (T, D) and streams (T, H, D) -> streams (T, H, D)."""

    def hc_head(self, w: Weights, h: Array, cfg: Config) -> Array:
        """(T, H, D) -> (T, D): the streams weighed into one."""

    # feed-forward (spec 3.10)

    def route(self, w: Weights, x: Array, step: Step, cfg: Config) -> tuple[Array, Array]:
        """(T, D) -> expert ids (T, K) and their weights (T, K).

        Ids come from a table by token, or are the K largest of score + bias; of equal ones the
        lower id wins. Weights are scores without bias, normalised to routed_scaling_factor.
        """

    def experts(self, w: Weights, x: Array, ids: Array, weights: Array, limit: float) -> Array:
        """(T, D) -> (T, D): the weighted sum of the chosen experts, plus the shared one.

        `w` has experts and shared_experts. SwiGLU is clamped at `limit`; an id twice counts twice.
        """

    # attention and its caches

    def write(self, ring: Rows, rows: Array, step: Step) -> None:
        """Store (T, width) rows at (slot, pos % size)."""

    def remember(
        self, w: Weights, c: Any, step: Step, kv: Array, projected: Sequence[Array], cfg: Config
    ) -> None:
        """What a step leaves in a layer's cache `c` (cache.LayerCache); `w` is its attention.

        `kv` (T, C) is normed with kv_norm, rotated and stored in the window (spec 3.4). Of each
        compressor, first the layer's and then the indexer's, `projected` has the rows [K | gate]:
        they are stored without ape, and each block that `step.emit` names, now finished, is pooled
        into one entry, block -1 being none (spec 3.6). At ratio 4 a block also sees the one before
        it, through the first half of the channels.
        """

    def index(
        self, q: Array, weights: Array, pool: Rows, step: Step, freqs: Weight, ratio: int, k: int
    ) -> Array:
        """(T, N, C), (T, N) -> (T, min(k, span // ratio)) entries, best first, -1 for none.

        The query is rotated, and in cache mode "native" rounded like the keys. Only visible entries
        are scored; of equal scores the earlier entry wins (spec 3.7). `weights` carry the scale.
        """

    def attention(
        self, w: Weights, c: Any, step: Step, q: Array, ids: Array | None, cfg: Config
    ) -> Array:
        """(T, N, C) -> (T, N, C): softmax over window, entries and sink (spec 3.4, 3.8).

        Each head of the query is normed, without a weight, and rotated; the result is rotated back.
        The entries are those of `ids` (-1 for none), or all visible ones if `ids` is None. A row
        is key and value at once; the sink only enlarges the denominator.
        """

    # output

    def take(self, x: Array, rows: Array) -> Array:
        """Rows of the first axis."""

    def gather(self, parts: Sequence[Array], rows: Array) -> Array:
        """Rows of several arrays, numbered on from each to the next: tokens of earlier steps."""

    def mask(self, logits: Array, allowed: Array) -> Array:
        """(R, V) and int32 (R, ceil(V / 32)) -> (R, V): -inf where a token's bit is 0.

        Token t has bit t % 32 of word t // 32.
        """

    def adjust(self, logits: Array, ids: Array, factor: Array, offset: Array) -> Array:
        """Penalties and biases for some tokens of each row, as (R, P) arrays; id -1 for none.

        A logit l becomes (l / factor if l > 0 else l * factor) + offset. Ids differ within a row.
        """

    def sample(
        self,
        logits: Array,
        temperature: Array,
        top_k: Array,
        top_p: Array,
        min_p: Array,
        u: Array,
    ) -> Array:
        """(R, V) and (R,) each -> (R,) token ids.

        Temperature 0 takes the largest logit. Else tokens are sorted by logit (of equal ones the
        lower id first), cut to top_k (0: all), to the fewest whose probability reaches top_p, and
        to those of at least min_p times the largest; the first whose running sum exceeds u of the
        total is taken. `u` in [0, 1) comes from the host: a seed means the same text everywhere.
        """


def backend_names() -> list[str]:
    """Every backend that is installed, by entry point."""
    return sorted(importlib.metadata.entry_points(group="ds4.backends").names)


def open_backend(name: str, device: str = "auto", cache: CacheMode = "native") -> Backend:
    """The named backend on a device. Raises BackendError with the remedy if it can't be had."""
    found = importlib.metadata.entry_points(group="ds4.backends", name=name)
    if not found:
        raise BackendError(f"no backend is called {name!r}: there are {', '.join(backend_names())}")
    if cache not in ("native", "exact"):
        raise BackendError(f"cache must be native or exact, not {cache!r}")
    try:
        make = next(iter(found)).load()
    except ImportError as error:
        raise BackendError(
            f"backend {name!r} needs {error.name}: pip install 'ds4[{name}]'"
        ) from error
    return make(device=device, cache=cache)
