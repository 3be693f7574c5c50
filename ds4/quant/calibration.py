"""What a model's weights see while it reads a text: how much each expert and each input matters.

The model runs on any backend behind a proxy that looks at what goes into its matrices. What an
expert computes inside is seen by asking the backend again: one expert a token without its weight
gives the expert's output, and with an identity for w2 gives what w2 multiplies.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import Array, Backend, StepFunction, Weight, Weights
from ..config import Config
from ..errors import CheckpointError
from ..llm import LLM
from ..runner import Runner
from ..weights.tensor import HostTensor
from .formats import FP4_GROUP, encode_mxfp4

Host = NDArray[Any]
Progress = Callable[[int, int], None]
Watch = Callable[[int, Host, Host, Host], None]  # layer, FFN inputs (T, D), ids and weights (T, K)

RARE = 64  # tokens; an expert with n of its own counts them n / (n + RARE)
WINDOW = 2048  # tokens read from an empty state
f32, f64 = np.float32, np.float64


@dataclass
class Calibration:
    """What was seen.

    tokens      how many were read
    counts      layer -> (E,) int64, tokens routed to each expert
    saliency    layer -> (E,) float64, the sum over an expert's tokens of route weight times the L2
                norm of its output before weighting (REAP)
    importance  official name of a matrix -> (in,) float32, the mean square of each input. w1 and w3
                share theirs; w2's input is the clamped SwiGLU times the route weight. An expert
                that saw n tokens has n / (n + RARE) of its own mean, the rest is its layer's.
    """

    tokens: int
    counts: dict[int, Host]
    saliency: dict[int, Host]
    importance: dict[str, Host]

    @property
    def rare(self) -> int:
        """Experts, of all layers, that saw fewer than RARE tokens."""
        return sum(int((count < RARE).sum()) for count in self.counts.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file, whole or not at all. Raises OSError."""
        arrays: dict[str, Host] = {"tokens": np.int64(self.tokens)}  # type: ignore[dict-item]
        arrays |= {f"counts.{layer}": x for layer, x in self.counts.items()}
        arrays |= {f"saliency.{layer}": x for layer, x in self.saliency.items()}
        arrays |= {
            f"importance.{name}": x for name, x in self.importance.items() if _as_w1(name) == name
        }
        target = Path(path)
        temporary = target.with_name(target.name + ".part")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Read what `save` wrote. Raises CheckpointError for anything else."""
        found: dict[str, dict[str, Host]] = {"counts": {}, "saliency": {}, "importance": {}}
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                tokens = int(file["tokens"])
                for key in file.files:
                    kind, _, name = key.partition(".")
                    if name:
                        found[kind][name] = file[key]
        except Exception as error:  # zip and NumPy raise many kinds for a damaged file
            raise CheckpointError(
                f"{path}: is no calibration file: {error}; run the calibration again"
            ) from None
        importance = found["importance"]
        importance |= {_as_w3(name): x for name, x in importance.items() if _as_w3(name) != name}
        return cls(
            tokens,
            {int(layer): x for layer, x in found["counts"].items()},
            {int(layer): x for layer, x in found["saliency"].items()},
            importance,
        )


def _as_w1(name: str) -> str:
    return name.replace(".w3.weight", ".w1.weight")


def _as_w3(name: str) -> str:
    return name.replace(".w1.weight", ".w3.weight")


def calibrate(
    llm: LLM, ids: Sequence[int], progress: Progress | None = None, watch: Watch | None = None
) -> Calibration:
    """Read token ids with a loaded model, in windows of at most WINDOW from an empty state.

    `llm` keeps its cache; `progress` is called with tokens done and in all; `watch` with what each
    layer's experts are given. Raises PromptError for an unknown token.
    """
    observer: Any = _Observer(llm.runner.be, llm.config, llm.runner.weights, watch)
    window = min(WINDOW, llm.config.max_position_embeddings)
    runner = Runner(observer, llm.config, llm.runner.weights, window)
    for start in range(0, len(ids), runner.max_chunk):
        if start % window == 0:
            runner.rewind(0, 0)
        chunk = list(ids[start : min(start + runner.max_chunk, start - start % window + window)])
        llm.runner.be.download(runner.run({0: chunk}))
        if progress is not None:
            progress(start + len(chunk), len(ids))
    return observer.result(len(ids))


class _Mean:
    """A running mean of squares (..., in), each row with its own count."""

    def __init__(self) -> None:
        self.total: Any = 0.0
        self.count: Any = 0

    def add(self, x: Host) -> None:
        """(..., in) of one matrix."""
        rows = x.reshape(-1, x.shape[-1])
        self.total += np.square(rows).sum(0, dtype=f64)
        self.count += len(rows)

    def add_each(self, x: Host, member: Host) -> None:
        """(T, in), and (E, T) of 0 and 1: which of E matrices each row goes to."""
        self.total += (member @ np.square(x)).astype(f64)
        self.count += member.sum(-1).astype(np.int64)[:, None]

    def mean(self) -> Host:
        return (self.total / np.maximum(self.count, 1)).astype(f32)

    def blended(self) -> Host:
        """(E, in): means drawn to that of all, the more the fewer rows they have."""
        common = self.total.sum(0) / max(self.count.sum(), 1)
        return ((self.total + RARE * common) / (self.count + RARE)).astype(f32)


class _Observer:
    """A backend that looks at the inputs of matrices."""

    def __init__(self, be: Backend, cfg: Config, weights: Weights, watch: Watch | None) -> None:
        self.be, self.cfg, self.watch = be, cfg, watch
        self.names = dict(_names(weights))
        self.seen: defaultdict[str, _Mean] = defaultdict(_Mean)
        self.counts = {
            layer: np.zeros(cfg.n_routed_experts, np.int64)
            for layer in range(cfg.num_hidden_layers)
        }
        self.saliency = {layer: count.astype(f64) for layer, count in self.counts.items()}
        self.identities = _identities(be, cfg)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.be, name)

    def capture(self, fn: StepFunction) -> StepFunction:
        """Not recorded: every operation is to be seen."""
        return lambda step: fn(step.on(self))

    def linear(self, w: Weight, x: Array) -> Array:
        self._see(w, x)
        return self.be.linear(w, x)

    def linears(self, ws: Sequence[Weight], x: Array) -> list[Array]:
        return [self.linear(w, x) for w in ws]

    def grouped_linear(self, w: Weight, x: Array) -> Array:
        self._see(w, x)
        return self.be.grouped_linear(w, x)

    def experts(self, w: Weights, x: Array, ids: Array, weights: Array, limit: float) -> Array:
        layer = self.names[id(w)]
        self._see(w.shared_experts.w1, x)
        host_ids, host_weights = self.be.download(ids), self.be.download(weights)
        rows = self.be.download(x)
        if self.watch is not None:
            self.watch(int(layer), rows, host_ids, host_weights)
        name = f"layers.{layer}.ffn.experts"
        for k in range(host_ids.shape[1]):
            pick = host_ids[:, k]
            one, share = self.be.upload(host_ids[:, k : k + 1]), host_weights[:, k : k + 1]
            member = (pick == np.arange(self.cfg.n_routed_experts)[:, None]).astype(f32)
            self.seen[f"{name}.w1"].add_each(rows, member)
            inner = self._inner(w, x, one, self.be.upload(np.ascontiguousarray(share)), limit)
            self.seen[f"{name}.w2"].add_each(inner, member)
            plain = self._routed(w, x, one, self.be.upload(np.ones_like(share)), limit)
            norms = np.linalg.norm(plain, axis=-1).astype(f64)
            self.counts[int(layer)] += member.sum(-1).astype(np.int64)
            self.saliency[int(layer)] += member @ (norms * share[:, 0])
        return self.be.experts(w, x, ids, weights, limit)

    def _inner(self, w: Weights, x: Array, ids: Array, weights: Array, limit: float) -> Host:
        """(T, I): what w2 multiplies."""
        parts = []
        for identity in self.identities:
            inner = SimpleNamespace(w1=w.experts.w1, w3=w.experts.w3, w2=identity)
            shown = SimpleNamespace(experts=inner, shared_experts=w.shared_experts)
            parts.append(self._routed(shown, x, ids, weights, limit))
        return np.concatenate(parts, -1)[:, : self.cfg.moe_intermediate_size]

    def _routed(self, w: Weights, x: Array, ids: Array, weights: Array, limit: float) -> Host:
        """(T, D): the routed experts' part of the result, which weights of 0 leave out."""
        without = self.be.experts(w, x, ids, weights * 0, limit)
        return np.asarray(self.be.download(self.be.experts(w, x, ids, weights, limit) - without))

    def _see(self, w: Weight, x: Array) -> None:
        name = self.names.get(id(w))
        if name is not None:
            self.seen[name].add(self.be.download(x))

    def result(self, tokens: int) -> Calibration:
        return Calibration(tokens, self.counts, self.saliency, dict(self._importance()))

    def _importance(self) -> Iterator[tuple[str, Host]]:
        for name, seen in self.seen.items():
            module, _, matrix = f".{name}".rpartition(".")
            module = module[1:] + "." if module else ""
            if ".experts." in name:
                for expert, mean in enumerate(seen.blended()):
                    for each in _PARTS.get(matrix, (matrix,)):
                        yield f"{module}{expert}.{each}.weight", mean
            else:
                for each in _PARTS.get(matrix, (matrix,)):
                    yield f"{module}{each}.weight", seen.mean()


_PARTS = {"wkv_gate": ("wkv", "wgate"), "w1": ("w1", "w3")}  # matrices of one input


def _names(weights: Weights) -> Iterator[tuple[int, str]]:
    """What operations are given -> a matrix's path, or the layer of experts."""
    yield id(weights.head), "head"
    for number, layer in enumerate(weights.layers):
        attn, path = layer.attn, f"layers.{number}.attn"
        yield id(layer.ffn), str(number)
        yield id(layer.ffn.shared_experts.w1), f"layers.{number}.ffn.shared_experts.w1"
        for matrix in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"):
            yield id(getattr(attn, matrix)), f"{path}.{matrix}"
        if attn.compressor is not None:
            yield id(attn.compressor.wkv_gate), f"{path}.compressor.wkv_gate"
        if attn.indexer is not None:
            path += ".indexer"
            yield id(attn.indexer.compressor.wkv_gate), f"{path}.compressor.wkv_gate"
            yield id(attn.indexer.wq_b), f"{path}.wq_b"
            yield id(attn.indexer.weights_proj), f"{path}.weights_proj"


def _identities(be: Backend, cfg: Config) -> list[Weight]:
    """Matrices in w2's place that show each expert's inner values, as many at a time as D."""
    rows, columns, experts = cfg.hidden_size, cfg.moe_intermediate_size, cfg.n_routed_experts
    found = []
    for start in range(0, columns, rows):
        eye = np.eye(rows, columns, start, dtype=f32)
        packed = columns % FP4_GROUP == 0
        tensor = HostTensor("mxfp4", *encode_mxfp4(eye)) if packed else HostTensor("f32", eye)
        stacked = tensor.map(lambda part: np.broadcast_to(part, (experts, *part.shape)))
        found.append(be.load("identity", stacked))
    return found
