"""Memory of a device, beside what ds4.plan predicts."""

import torch
from rich.console import Console
from rich.table import Table

from ds4.plan.memory import predict

from .models import Model, free


def used(device: str) -> int:
    """Bytes that torch has given out on the device."""
    on_gpu = torch.cuda.is_available() and device != "cpu"
    return torch.cuda.memory_allocated() if on_gpu else 0


def peak(device: str) -> int:
    """The most that torch had given out at once since `reset_peak`."""
    on_gpu = torch.cuda.is_available() and device != "cpu"
    return torch.cuda.max_memory_allocated() if on_gpu else 0


def reset_peak(device: str) -> None:
    if torch.cuda.is_available() and device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def show(screen: Console, model: Model, before: int, context: int, chunk: int = 256) -> None:
    """Weights, and weights with one sequence's cache, predicted and as the GPU reports them."""
    if not model.be.device.startswith("cuda"):
        return
    free(model.be.device)
    unique = len(set(model.source.same_as.values()))
    recipe = model.source.recipe
    assert recipe is not None
    want = predict(model.cfg, recipe, context, 1, chunk, unique)
    weights = used(model.be.device) - before
    runner = model.runner(1, context, min(chunk, context))
    loaded = used(model.be.device) - before
    runner.run({0: model.tokens(1)})
    free_bytes, total = torch.cuda.mem_get_info()
    table = Table("memory, MB", "predicted", "allocated", "difference", title_justify="left")
    _row(table, "weights", want.weights, weights)
    _row(table, f"with a cache of {context:,}", want.held, loaded)
    screen.print(table)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
    screen.print(
        f"torch: most allocated {peak / 1e6:,.0f} MB, reserved {reserved / 1e6:,.0f} MB; "
        f"whole GPU in use {(total - free_bytes) / 1e6:,.0f} of {total / 1e6:,.0f} MB",
        highlight=False,
    )


def _row(table: Table, name: str, want: int, got: int) -> None:
    table.add_row(name, f"{want / 1e6:,.1f}", f"{got / 1e6:,.1f}", f"{got / want - 1:+.2%}")
