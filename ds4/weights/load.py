"""Checkpoint -> the tree of weights that model.py reads, one tensor in memory at a time.

The tree, every leaf what be.load returned, under the checkpoint's names:

    w.embed  w.head  w.norm  w.hc_head(fn, base, scale)
    w.layers[l]   hc_attn(fn, base, scale)  hc_ffn(...)  attn_norm  ffn_norm  attn  ffn
    attn          ratio (an int)  freqs  wq_a  q_norm  wq_b  wkv  kv_norm  attn_sink  wo_a  wo_b
                  compressor(wkv_gate, ape, norm) or None
                  indexer(wq_b, weights_proj, compressor) or None
    ffn           gate(weight, bias or None, tid2eid or None, held)  experts(w1, w2, w3)
                  shared_experts(w1, w2, w3)

wkv_gate is wkv's rows, then wgate's. wo_a is (groups, o_lora_rank, in), experts are (E, out, in).
Where ranks share the experts, held is (E,) int32: whether an expert is here; else it is None.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from ..config import Config
from ..config_fields import CSA_RATIO
from ..quant.formats import FP8_BLOCK
from .names import DSPARK_STAGES, Drafter, Shape, expected, expected_drafter
from .synthetic_tensor import SyntheticTensor
from .tensor import HostTensor, concatenate

Progress = Callable[[int, int], None]


class _Backend(Protocol):
    def load(self, name: str, tensor: HostTensor) -> Any: ...


class Reader(Protocol):
    """What a Checkpoint offers; see there."""

    def read(self, name: str, shape: Shape, below: int | None = None) -> HostTensor: ...

    def read_stacked(self, names: list[str], shape: Shape) -> HostTensor: ...


class Source(Reader, Protocol):
    def check(self, cfg: Config) -> int: ...


class DrafterSource(Reader, Protocol):
    def check_drafter(self, cfg: Config) -> tuple[Drafter, int]: ...


def load_weights(
    be: _Backend, cfg: Config, checkpoint: Source, progress: Progress | None = None
) -> SimpleNamespace:
    """Stream a checkpoint into a backend; memory peaks at what `be` keeps plus less than one layer.

    Names given to be.load are the checkpoint's without ".weight": "layers.0.attn.wq_a",
    "layers.0.ffn.experts.w1". `progress` is called with bytes done and bytes in all.
    """
    begin = getattr(be, "begin", None)
    if begin is not None:
        begin(cfg)
    stream = _Stream(be, checkpoint, expected(cfg), checkpoint.check(cfg), progress)
    return SimpleNamespace(
        embed=stream.weight("embed"),
        layers=[
            _layer(stream, cfg, f"layers.{layer}", ratio, layer < cfg.num_hash_layers)
            for layer, ratio in enumerate(cfg.compress_ratios)
        ],
        hc_head=_hyper(stream, "hc_head"),
        norm=stream.weight("norm"),
        head=stream.weight("head"),
    )


def load_drafter(
    be: _Backend, cfg: Config, checkpoint: DrafterSource, progress: Progress | None = None
) -> SimpleNamespace:
    """The same for a checkpoint's drafter, whose `kind` is "mtp" or "dspark".

    Raises CheckpointError if there is none, or not all of it.
    """
    kind, total = checkpoint.check_drafter(cfg)
    stream = _Stream(be, checkpoint, expected_drafter(cfg, kind), total, progress)
    stages = range(1 if kind == "mtp" else DSPARK_STAGES)
    last = f"mtp.{stages[-1]}"
    own: dict[str, Any] = {}
    if kind == "mtp":
        own = {x: stream.weight(f"mtp.0.{x}") for x in ("e_proj", "h_proj", "enorm", "hnorm")}
    else:
        own = {
            "main_proj": stream.weight("mtp.0.main_proj"),
            "main_norm": stream.weight("mtp.0.main_norm"),
            "w1": stream.weight(f"{last}.markov_head.markov_w1"),
            "w2": stream.weight(f"{last}.markov_head.markov_w2"),
            "confidence": stream.weight(f"{last}.confidence_head.proj"),
        }
    return SimpleNamespace(
        kind=kind,
        layers=[_layer(stream, cfg, f"mtp.{stage}", 0, False) for stage in stages],
        hc_head=_hyper(stream, f"{last}.hc_head"),
        norm=stream.weight(f"{last}.norm"),
        **own,
    )


class _Stream:
    """Reads tensors of the expected shape, hands them to the backend and keeps none."""

    def __init__(
        self,
        be: _Backend,
        checkpoint: Reader,
        shapes: dict[str, Shape],
        total: int,
        progress: Progress | None,
    ) -> None:
        self.be, self.checkpoint, self.progress = be, checkpoint, progress
        self.shapes, self.done, self.total = shapes, 0, total
        self.made: dict[SyntheticTensor, Any] = {}

    def read(self, name: str, below: int | None = None) -> HostTensor:
        return self.checkpoint.read(name, self.shapes[name], below)

    def give(self, name: str, tensor: HostTensor, nbytes: int) -> Any:
        """Load a tensor that took `nbytes` of the checkpoint."""
        weight = self._weight(name, tensor)
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)
        return weight

    def _weight(self, name: str, tensor: HostTensor) -> Any:
        """What the backend makes of it; of equal synthetic ones, the same one."""
        if not isinstance(tensor, SyntheticTensor):
            return self.be.load(name, tensor)
        if tensor not in self.made:
            self.made[tensor] = self.be.load(name, tensor)
        return self.made[tensor]

    def plain(self, name: str) -> Any:
        tensor = self.read(name)
        return self.give(name, tensor, tensor.nbytes)

    def weight(self, module: str) -> Any:
        tensor = self.read(f"{module}.weight")
        return self.give(module, tensor, tensor.nbytes)

    def table(self, name: str, below: int) -> Any:
        tensor = self.read(name, below)
        return self.give(name, tensor, tensor.nbytes)

    def joined(self, name: str, modules: tuple[str, ...]) -> Any:
        """Matrices of equal width, one under the other, as one weight."""
        parts = [self.read(f"{module}.weight") for module in modules]
        return self.give(name, _join(parts), sum(part.nbytes for part in parts))

    def grouped(self, module: str, groups: int) -> Any:
        """A matrix [groups * out, in] as (groups, out, in)."""
        tensor = self.read(f"{module}.weight")
        return self.give(module, _split(tensor, groups), tensor.nbytes)

    def experts(self, module: str, matrix: str, count: int, held: Sequence[int] | None) -> Any:
        """The same matrix of every expert as one weight (E, out, in), or of those held here."""
        ids = range(count) if held is None else held
        each = [f"{module}.{expert}.{matrix}.weight" for expert in ids]
        tensor = self.checkpoint.read_stacked(each, self.shapes[each[0]])
        weight = self.give(f"{module}.{matrix}", tensor, tensor.nbytes // len(ids) * count)
        return (
            weight
            if held is None
            else self.be.numbered(  # type: ignore[attr-defined]
                weight, held, count
            )
        )

    def held(self, path: str, experts: int) -> Sequence[int] | None:
        """The experts of a layer that this process keeps; None for all."""
        holds = getattr(self.be, "holds", None)
        return None if holds is None else holds(int(path.split(".")[1]), experts)

    def mask(self, name: str, held: Sequence[int], experts: int) -> Any:
        mask = np.zeros(experts, np.int32)
        mask[list(held)] = 1
        return self.give(name, HostTensor("int", mask), 0)


def _join(parts: list[HostTensor]) -> HostTensor:
    """Rows below rows; decoded, which is exact, where the stored form cannot be joined."""
    first = parts[0]
    if isinstance(first, SyntheticTensor):
        return first.of_shape(sum(part.shape[0] for part in parts), first.shape[1])
    blocks = parts[0].format == "fp8" and any(p.shape[0] % FP8_BLOCK for p in parts[:-1])
    if blocks or len({part.kind for part in parts}) > 1:
        parts = [HostTensor("f32", part.decode()) for part in parts]
    return concatenate(parts)


def _split(tensor: HostTensor, groups: int) -> HostTensor:
    """Rows in groups; decoded, which is exact, where a group ends inside an FP8 block."""
    rows = tensor.shape[0]
    if isinstance(tensor, SyntheticTensor):
        return tensor.of_shape(groups, rows // groups, tensor.shape[1])
    if tensor.format == "fp8" and rows // groups % FP8_BLOCK:
        tensor = HostTensor("f32", tensor.decode())
    return tensor.map(lambda x: x.reshape(groups, -1, x.shape[-1]))


def _layer(stream: _Stream, cfg: Config, path: str, ratio: int, hashed: bool) -> SimpleNamespace:
    return SimpleNamespace(
        hc_attn=_hyper(stream, f"{path}.hc_attn"),
        hc_ffn=_hyper(stream, f"{path}.hc_ffn"),
        attn_norm=stream.weight(f"{path}.attn_norm"),
        ffn_norm=stream.weight(f"{path}.ffn_norm"),
        attn=_attention(stream, cfg, f"{path}.attn", ratio),
        ffn=_feed_forward(stream, cfg, f"{path}.ffn", hashed),
    )


def _hyper(stream: _Stream, path: str) -> SimpleNamespace:
    return SimpleNamespace(**{x: stream.plain(f"{path}_{x}") for x in ("fn", "base", "scale")})


def _attention(stream: _Stream, cfg: Config, path: str, ratio: int) -> SimpleNamespace:
    modules = ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_b")
    return SimpleNamespace(
        ratio=ratio,
        freqs=stream.give(f"{path}.freqs", HostTensor("f32", cfg.rope_freqs(ratio)), 0),
        attn_sink=stream.plain(f"{path}.attn_sink"),
        wo_a=stream.grouped(f"{path}.wo_a", cfg.o_groups),
        compressor=_compressor(stream, f"{path}.compressor") if ratio else None,
        indexer=_indexer(stream, f"{path}.indexer") if ratio == CSA_RATIO else None,
        **{module: stream.weight(f"{path}.{module}") for module in modules},
    )


def _compressor(stream: _Stream, path: str) -> SimpleNamespace:
    return SimpleNamespace(
        wkv_gate=stream.joined(f"{path}.wkv_gate", (f"{path}.wkv", f"{path}.wgate")),
        ape=stream.plain(f"{path}.ape"),
        norm=stream.weight(f"{path}.norm"),
    )


def _indexer(stream: _Stream, path: str) -> SimpleNamespace:
    return SimpleNamespace(
        wq_b=stream.weight(f"{path}.wq_b"),
        weights_proj=stream.weight(f"{path}.weights_proj"),
        compressor=_compressor(stream, f"{path}.compressor"),
    )


def _feed_forward(stream: _Stream, cfg: Config, path: str, hashed: bool) -> SimpleNamespace:
    experts, matrices = cfg.n_routed_experts, ("w1", "w2", "w3")
    held = stream.held(path, experts)
    gate, shared = f"{path}.gate", f"{path}.shared_experts"
    return SimpleNamespace(
        gate=SimpleNamespace(
            weight=stream.weight(gate),
            bias=None if hashed else stream.plain(f"{gate}.bias"),
            tid2eid=stream.table(f"{gate}.tid2eid", experts) if hashed else None,
            held=None if held is None else stream.mask(f"{gate}.held", held, experts),
        ),
        experts=SimpleNamespace(
            **{w: stream.experts(f"{path}.experts", w, experts, held) for w in matrices}
        ),
        shared_experts=SimpleNamespace(**{w: stream.weight(f"{shared}.{w}") for w in matrices}),
    )
