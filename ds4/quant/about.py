"""What tells one quantizer's run from another: its source and what weighs the errors."""

from typing import Any

import numpy as np
import xxhash

from ..weights.checkpoint import Checkpoint
from .encoder import Importance
from .pruning import PrunedCheckpoint

_SAMPLE = 1 << 20  # bytes at either end of a source file that its fingerprint covers


def fingerprint(checkpoint: Checkpoint | PrunedCheckpoint) -> dict[str, Any]:
    """What tells one source from another, without reading all of it."""
    digest = xxhash.xxh3_128()
    total = 0
    for path in checkpoint.files:
        size = path.stat().st_size
        total += size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(size - _SAMPLE, 0))
            digest.update(file.read())
    digest.update((checkpoint.folder / "config.json").read_bytes())
    return {"bytes": total, "files": len(checkpoint.files), "sampled_xxh3_128": digest.hexdigest()}


def digest_of(importance: Importance) -> str | None:
    """Of all its names and values; None if it is empty."""
    if not importance:
        return None
    digest = xxhash.xxh3_128()
    for name in sorted(importance):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(importance[name], np.float32).tobytes())
    return digest.hexdigest()
