"""What a GPU keeps of a model: matrices as its kernels read them, caches, and recorded steps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ds4.backend import CacheMode, RowKind, StepFunction
from ds4.errors import BackendError
from ds4.ranks import Alone
from ds4.weights.tensor import HostTensor

from .graph import Graphs
from .kernels import gemm, gemv
from .pending import Asked, Chosen
from .qmatrix import QMatrix, load_matrix, renumbered
from .ranks import Group
from .rows import PackedRows, alloc
from .weights import dense, in_host_memory, pack

if TYPE_CHECKING:
    from ds4.plan.placement import Need

    from .placement import Placement

# ends of names: not for matrix kernels
PLAIN = ("embed", "_fn", ".ape", ".confidence_head.proj", ".tid2eid", ".freqs", ".markov_w1")


class Keeping:
    """Weights, rows, arrays and steps of Fast."""

    device: str
    cache: CacheMode
    ranks: Group | Alone
    max_chunk: int
    placement: "Placement | None" = None  # of experts that are not all on the GPU
    head: QMatrix | None = None
    logits: Tensor | None = None  # where a step that is being recorded leaves them

    def free_memory(self) -> int:
        """Bytes of the device that nobody has."""
        free: int = torch.cuda.mem_get_info(self.device)[0]
        return free

    def place(
        self,
        need: "Need",
        gpu_memory: int | None,
        heat_map: Path | None = None,
        host_memory: int | None = None,
    ) -> None:
        """Before loading: if `gpu_memory` bytes do not hold it all, some experts go to the host."""
        from .placement.opening import open_placement

        self.placement = open_placement(need, self, gpu_memory, heat_map, host_memory)
        if self.placement is not None:
            self.max_chunk = self.placement.budget.chunk

    def keep(self, name: str, tensor: HostTensor) -> Any:
        if len(tensor.shape) < 2 or name.endswith(PLAIN):
            w = pack(tensor, self.device)
            if self.placement is not None and name == "embed" and isinstance(w, Tensor):
                return in_host_memory(w)
            return dense(w) if name.endswith(PLAIN[1:4]) else w
        try:
            m = load_matrix(tensor, self.device, stacked=".experts." in name)
        except torch.OutOfMemoryError as error:
            raise BackendError(f"{name} does not fit in the memory of {self.device}") from error
        if not (gemv.fits(m) and gemm.fits(m)):
            raise BackendError(
                f"{name}: the GPU kernels cannot read {m.rows} x {m.cols}; use --device cpu"
            )
        if self.placement is not None and name.startswith("layers.") and ".experts." in name:
            placed: QMatrix = self.placement.load(name, m)
            del m
            torch.cuda.empty_cache()  # what stays would be put into what the stack has left
            return placed
        if name == "head":
            self.head = m
        return m

    def numbered(self, weight: QMatrix, ids: Sequence[int], experts: int) -> QMatrix:
        return weight if weight.tier is not None else renumbered(weight, ids, experts)

    def alloc(
        self, kind: RowKind, slots: int, rows: int, width: int, rotary: int = 0
    ) -> PackedRows:
        return alloc(kind, slots, rows, width, rotary, self.cache, self.device)

    def upload(self, host: NDArray[Any] | Tensor) -> Tensor:
        if isinstance(host, Tensor):
            return host
        x = torch.from_numpy(host).to(self.device, non_blocking=True)  # else all work is waited for
        x.host = host  # type: ignore[attr-defined]  # known without waiting: see `sample`
        return x

    def download(self, x: Any) -> NDArray[Any]:
        if (coming := getattr(x, "coming", None)) is not None:
            return coming.wait()
        host: NDArray[Any] = (x.ids if isinstance(x, Chosen | Asked) else x).cpu().numpy()
        return host

    def empty_logits(self, rows: int) -> Tensor | None:
        """Memory for what the head makes of so many rows; None before it is loaded."""
        return None if self.head is None else torch.empty(rows, self.head.rows, device=self.device)

    @contextmanager
    def logits_in(self, place: Tensor | None) -> Iterator[None]:
        """While it lasts the head's products go to the rows of `place`, one after another."""
        self.logits = place
        try:
            yield
        finally:
            self.logits = None

    def capture(self, fn: StepFunction) -> StepFunction:
        run: StepFunction = lambda step: fn(step.on(self))  # noqa: E731
        if isinstance(self.ranks, Alone) or self.ranks.recordable:
            run = Graphs(fn, self)
        return run if self.placement is None else self.placement.around(run)
