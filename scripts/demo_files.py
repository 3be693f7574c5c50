"""The demo's folder: weights and configs, written and read back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds4.weights.checkpoint import Checkpoint
from ds4.weights.export import from_transformers, quantize_official, write_checkpoint
from ds4.weights.names import stacked_experts, to_official


def export(folder: Path, official: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write the weights and the two configs in DeepSeek's format."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    write_checkpoint(folder, quantize_official(official, from_transformers(arrays)))
    generation = {
        "bos_token_id": 0,
        "do_sample": True,
        "eos_token_id": 1,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    for name, content in (("config.json", official), ("generation_config.json", generation)):
        text = json.dumps(dict(sorted(content.items())), indent=2)
        (folder / name).write_text(text + "\n", "utf-8")


def decoded(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights in a folder, under the names and in the shapes of transformers' model."""
    checkpoint = Checkpoint(folder)
    found = {}
    for name, tensor in model.state_dict().items():
        stack = stacked_experts(name)
        if stack is None:
            value = checkpoint.read(to_official(name), tuple(tensor.shape)).decode()
        else:
            value = np.stack([_expert(checkpoint, stack, e, t) for e, t in enumerate(tensor)])
        found[name] = torch.from_numpy(np.array(value))
    return found


def _expert(checkpoint: Checkpoint, stack: Any, expert: int, tensor: Tensor) -> np.ndarray:
    layer, matrices, _ = stack
    shape = (tensor.shape[0] // len(matrices), tensor.shape[1])
    prefix = f"{layer}.ffn.experts.{expert}"
    return np.concatenate(
        [checkpoint.read(f"{prefix}.{matrix}.weight", shape).decode() for matrix in matrices]
    )
