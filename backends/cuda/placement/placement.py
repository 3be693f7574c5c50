"""The experts of a model in two memories: loading, steps, figures."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds4.errors import BackendError
from ds4.plan.placement import Budget
from ds4.step import Step

from ..kernels.gemm import Routed
from ..kernels.gemv_arguments import Copies
from ..kernels.router import Tiles
from ..kernels.split import Split
from ..qmatrix import QMatrix
from . import kernel, prompt
from .heat import load_heat, save_heat
from .layer import MATRICES, Layer, PlacedStack
from .lent import Lent
from .pinned import PinnedPool
from .policy import (
    COPY_NS,
    HITS,
    MISSES,
    PAIR_HITS,
    PAIRS,
    PASSED,
    LayerState,
    decide,
    first_state,
    prompt_score,
    set_lent,
)
from .stream import Stream
from .swap import Swaps
from .tables import Tables

Three = tuple[QMatrix, QMatrix, QMatrix]  # w1, w3, w2
FEW = 32  # tokens of a step up to which its experts are fetched; more are streamed
LOOK_EVERY = 32  # steps between two looks at what the device has counted
SAVE_EVERY = 60.0  # seconds between two writes of the heat map
LEND_AFTER = 4  # short steps on end: prompts may be in between


@dataclass(frozen=True)
class Report:
    """What the steps so far met. Arrays have a number for each layer."""

    hits: NDArray[np.int64]  # experts of a step that were on the GPU
    misses: NDArray[np.int64]  # that were copied there
    passed: NDArray[np.int64]  # that were read from host memory, no slot being free
    pair_hits: NDArray[np.int64]  # (token, pick) pairs whose expert was on the GPU
    pairs: NDArray[np.int64]
    seconds: NDArray[np.float64]  # lost to copying
    bytes: NDArray[np.int64]  # copied from host memory
    gpu_bytes: NDArray[np.int64]  # of experts read from GPU memory, without those copied first

    @property
    def hit_rate(self) -> float:
        """Share of the experts that steps asked for; a step asks for each once."""
        asked = self.hits.sum() + self.misses.sum() + self.passed.sum()
        return float(self.hits.sum() / max(asked, 1))

    @property
    def host_rate(self) -> float:
        """Bytes a second from host memory while something was copied."""
        copied = self.bytes * (self.misses / np.maximum(self.misses + self.passed, 1))
        return float(copied.sum() / max(self.seconds.sum(), 1e-9))

    def fields(self) -> dict[str, Any]:
        """For programs: in all, and by layer."""
        asked = self.hits + self.misses + self.passed
        return {
            "hit_rate": round(self.hit_rate, 4),
            "pair_hit_rate": round(float(self.pair_hits.sum() / max(self.pairs.sum(), 1)), 4),
            "misses": int(self.misses.sum()),
            "read_in_host_memory": int(self.passed.sum()),
            "host_bytes": int(self.bytes.sum()),
            "gpu_bytes": int(self.gpu_bytes.sum()),
            "copy_seconds": round(float(self.seconds.sum()), 4),
            "host_gb_s": round(self.host_rate / 1e9, 1),
            "layer_hit_rate": [round(float(x), 4) for x in self.hits / np.maximum(asked, 1)],
            "layer_copy_seconds": [round(float(x), 4) for x in self.seconds],
        }

    def line(self) -> str:
        """For people."""
        return (
            f"experts: {self.hit_rate:.0%} found on the GPU; {self.bytes.sum() / 1e9:,.1f} GB from "
            f"host memory at {self.host_rate / 1e9:.1f} GB/s, {self.seconds.sum():.2f} s in all"
        )

    def since(self, before: "Report") -> "Report":
        return Report(**{name: x - getattr(before, name) for name, x in vars(self).items()})


class Placement:
    """Made from a budget before weights are loaded; a backend asks it where experts go.

    heat_map  file of earlier runs' counts, read if there is one and written as steps go by
    held      of each layer, the experts that this rank holds; None: all
    """

    def __init__(
        self,
        budget: Budget,
        device: str,
        heat_map: Path | None = None,
        held: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.budget, self.device, self.heat_map = budget, device, heat_map
        cfg = budget.need.cfg
        heat = np.zeros((cfg.num_hidden_layers, cfg.n_routed_experts), np.int64)
        if heat_map is not None and heat_map.exists():
            heat = load_heat(heat_map, *heat.shape)
        self._earlier = heat
        states = [
            first_state(
                heat[i], slots, budget.homes, None if held is None else held[i], budget.lent
            )
            for i, slots in enumerate(budget.slots)
        ]
        expert = budget.need.expert
        self.lent = Lent(budget.lent_bytes, device) if budget.lent else None
        self.layers = [Layer(i, s, device, expert, self.lent) for i, s in enumerate(states)]
        each = budget.homes * expert + (1 << 20)
        self.pool = PinnedPool([each] * len(states) if budget.homes else [], device)
        self.tables = Tables(states, device) if device.startswith("cuda") else None
        self.swaps = Swaps(self.layers, self.tables)
        self._arguments: dict[int, Any] = {}
        self._stream: Stream | None = None
        self._steps, self._saved = 0, time.monotonic()
        self._short = 0  # short steps since the last long one

    # loading

    def load(self, name: str, weight: Any) -> Any:
        """Keep a stack of experts, a QMatrix or a tensor on the device, in its two places."""
        layer = self.layers[int(name.split(".")[1])]
        matrix = name.rpartition(".")[2]
        blob = weight.blob if isinstance(weight, QMatrix) else weight.flatten(1).view(torch.uint8)
        layer.fill(matrix, blob, self.pool.take)
        if self.tables is None:
            return PlacedStack(layer, matrix, weight)
        torch.cuda.current_stream().synchronize()  # the whole stack may go
        ptrs = self.tables.point(layer, matrix, layer.state)
        if all(m in layer.slots for m in MATRICES):
            self._arguments[layer.number] = self.tables.arguments(layer)
        return replace(weight, blob=layer.slots[matrix], ptrs=ptrs, address=0, tier=layer)

    # steps

    def around(self, run: Callable[[Step], Tensor]) -> Callable[[Step], Tensor]:
        """The same function of a step, with what is to be done before it."""

        def placed(step: Step) -> Tensor:
            try:
                self.before(len(step.tokens))
                return run(step)
            except torch.OutOfMemoryError as error:
                raise BackendError(self._shrunk(len(step.tokens))) from error

        return placed

    def before(self, tokens: int) -> None:
        """Between two steps, the next of which has so many tokens."""
        self._steps += 1
        if self._steps % LOOK_EVERY == 0:
            if self.budget.homes < self.budget.need.held:  # some are pinned
                self.swaps.turn(self.states)
            if self.heat_map is not None and time.monotonic() - self._saved > SAVE_EVERY:
                self.save()
        self._lend(tokens <= FEW)
        if tokens > FEW and self.device.startswith("cuda"):
            self.stream().begin(self.states())

    def _lend(self, short: bool) -> None:
        """Have lent memory while steps are short, and give it back before a long one."""
        self._short = self._short + 1 if short else 0
        if self.lent is None or self.lent.there == short:
            return
        if short and self._short < LEND_AFTER:
            return
        if short:
            if self._stream is not None:
                self._stream.release()
            if self.tables is not None:
                torch.cuda.empty_cache()
            if not self.lent.take():
                self._short = -1000  # try again, but not soon
                return
        if self.tables is not None:
            self.tables.set_lent(self.layers, short)
        else:
            for layer in self.layers:
                set_lent(layer.state, layer.kept, short)
        if not short:
            self.lent.give()

    def _shrunk(self, tokens: int) -> str:
        free, _ = torch.cuda.mem_get_info(self.device)
        planned = self.budget.gpu_bytes
        return (
            f"{self.device}: a step of {tokens} tokens found only {free / 1e9:.1f} GB free, though "
            f"the plan kept to {planned / 1e9:.1f} GB: another process has taken memory since "
            "loading (nvidia-smi); end it, or start again with a smaller --gpu-memory"
        )

    def stream(self) -> Stream:
        """The ring for long steps."""
        if self._stream is None:
            self._stream = Stream(self.layers, self.budget.group, self.device)
        return self._stream

    def fetch(self, layer: Layer, tiles: Tiles) -> Copies:
        """Let the experts of a short step be on the GPU, as far as there is room."""
        arguments = self._arguments[layer.number]
        kernel.fetch(arguments, tiles.expert, tiles.count)
        return Copies(arguments.jobs, arguments.arrived)

    def prompt(
        self,
        routed: Three,
        shared: Three,
        x: Tensor,
        plan: Routed,
        limit: float,
        out: Tensor,
        split: Split | None,
    ) -> None:
        """A long step's experts, through the ring: as moe_gemm.experts."""
        assert self.tables is not None
        layer: Layer = routed[0].tier
        self.tables.prompt(layer.number, plan.offsets.diff(), len(x))
        prompt.experts(self.stream(), layer, routed, shared, x, plan, limit, out, split)

    def chosen(self, stack: Any, ids: Tensor) -> None:
        """Both for PyTorch's plain operations: `ids` (T, K) are a step's choices, of `stack`."""
        layer: Layer = getattr(stack, "weight", stack).tier
        count = np.bincount(ids.flatten().numpy(), minlength=len(layer.state.slot_of))
        pairs = np.where(layer.state.here, count, 0).astype(np.int32)
        if len(ids) > FEW:
            layer.state.heat += pairs
            layer.state.score = prompt_score(layer.state.score, pairs, len(ids))
            return
        each = np.flatnonzero(pairs).astype(np.int32)
        layer.copy_in(decide(layer.state, each, pairs[each]))

    # figures

    def states(self) -> list[LayerState]:
        """Where everything is; waits for the device."""
        if self.tables is not None:
            return self.tables.states()
        return [layer.state for layer in self.layers]

    def report(self) -> Report:
        """Counts since loading; waits for the device."""
        counts = np.stack([s.counts for s in self.states()]).T.copy()
        size = self.budget.need.expert
        moved = counts[MISSES] + counts[PASSED]
        return Report(
            hits=counts[HITS],
            misses=counts[MISSES],
            passed=counts[PASSED],
            pair_hits=counts[PAIR_HITS],
            pairs=counts[PAIRS],
            seconds=counts[COPY_NS] / 1e9,
            bytes=moved * size,
            gpu_bytes=counts[HITS] * size,
        )

    def heat(self) -> NDArray[np.int64]:
        """Pairs of each layer's experts, earlier runs included at half their weight."""
        return self._earlier // 2 + np.stack([s.heat for s in self.states()])

    def save(self) -> None:
        """Write the heat map, for the next start. Without a file, nothing."""
        if self.heat_map is not None:
            save_heat(self.heat_map, self.heat())
            self._saved = time.monotonic()
