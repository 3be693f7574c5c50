"""Checkpoints in DeepSeek's own form: its names, dtypes and files (specification 2).

For fixtures and for the demo model. `from_transformers` and `quantize_official` turn a model that
was made with transformers into official tensors; `write_checkpoint` writes any official tensors.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..quant import formats
from .names import stacked_experts, to_official
from .tensor import Array, HostTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# the order of data in the official shards
_DTYPES = ("I64", "I32", "F32", "F16", "BF16", "F8_E8M0", "F8_E4M3", "I8")
_STORED = {"f32": "F32", "f16": "F16", "bf16": "BF16", "fp8": "F8_E4M3", "mxfp4": "I8"}

_ROUTED = re.compile(r"(layers|mtp)\.\d+\.ffn\.experts\.\d+\.w[123]\.weight")
_FP8 = re.compile(
    r"(layers|mtp)\.\d+\.("
    r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123]|([eh]|main)_proj"
    r")\.weight"
)
_F32 = re.compile(r"(.*\.)?(hc_(attn|ffn|head)_(fn|base|scale)|attn_sink|ape|gate\.bias)")


# choosing formats


def storage_format(name: str, expert_dtype: str = "fp4") -> str:
    """The HostTensor format of an official weight in the official checkpoint (specification 2.2).

    `expert_dtype` is config.json's: "fp4", "fp8" (the Base model) or anything else for BF16.
    """
    if name.endswith("tid2eid"):
        return "int"
    if _ROUTED.fullmatch(name):
        return {"fp4": "mxfp4", "fp8": "fp8"}.get(expert_dtype, "bf16")
    if _FP8.fullmatch(name):
        return "fp8"
    return "f32" if _F32.fullmatch(name) else "bf16"


def encode(values: Array, kind: str) -> HostTensor:
    """float32 values (integers for "int") in one of HostTensor's formats."""
    if kind == "int":
        return HostTensor("int", np.asarray(values, np.int64))
    values = np.asarray(values, np.float32)
    if kind == "f32":
        return HostTensor(kind, values)
    if kind == "f16":
        return HostTensor(kind, values.astype(np.float16))
    if kind == "bf16":
        return HostTensor(kind, formats.encode_bf16(values))
    encoder = {"fp8": formats.encode_fp8, "mxfp4": formats.encode_mxfp4}[kind]
    return HostTensor(kind, *encoder(values))


def quantize_official(
    config: Mapping[str, Any], state: Mapping[str, Array]
) -> Iterator[tuple[str, HostTensor]]:
    """Official names with float32 (tid2eid: integer) values -> the same in official formats.

    Of `config`, a parsed config.json, only expert_dtype counts.
    """
    experts = config.get("expert_dtype", "fp4")
    for name, values in state.items():
        yield name, encode(values, storage_format(name, experts))


def from_transformers(state: Mapping[str, Array]) -> dict[str, Array]:
    """A state_dict of transformers' DeepseekV4ForCausalLM, as arrays, under official names.

    Stacked experts are taken apart: gate_up_proj (E, 2I, D) -> w1, w3; down_proj -> w2.
    """
    official: dict[str, Array] = {}
    for name, values in state.items():
        stack = stacked_experts(name)
        if stack is None:
            official[to_official(name)] = values
            continue
        layer, matrices, _ = stack
        for expert, rows in enumerate(values):
            for matrix, part in zip(matrices, np.split(rows, len(matrices)), strict=True):
                official[f"{layer}.ffn.experts.{expert}.{matrix}.weight"] = part
    return official


# writing


def write_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Iterable[tuple[str, HostTensor]],
    shard_bytes: int | None = None,
) -> list[Path]:
    """Write official tensors to `folder`: one model.safetensors, or shards and their index.

    `shard_bytes`: begin a new shard rather than exceed this; None for one file. A file appears
    under its name only when it is complete; then those of an earlier call go. Returns the paths,
    the index last. Raises OSError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if shard_bytes is None:
        paths = [folder / SINGLE_FILE]
        _write_file(paths[0], dict(tensors))
    else:
        paths = _write_shards(folder, list(_shards(tensors, shard_bytes)))
    for pattern in (SINGLE_FILE, INDEX_FILE, "model-?????-of-?????.safetensors"):
        for stale in set(folder.glob(pattern)) - set(paths):
            stale.unlink()
    return paths


def _write_shards(folder: Path, shards: list[dict[str, HostTensor]]) -> list[Path]:
    paths: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(_write_file(path, shard), path.name)
        paths.append(path)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _replace(folder / INDEX_FILE, [json.dumps(index, indent=2).encode()])
    return [*paths, folder / INDEX_FILE]


def _shards(
    tensors: Iterable[tuple[str, HostTensor]], limit: int
) -> Iterator[dict[str, HostTensor]]:
    shard: dict[str, HostTensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _write_file(path: Path, tensors: Mapping[str, HostTensor]) -> list[str]:
    """Write one safetensors file; returns the names in it, those of scales included."""
    stored = [one for name, tensor in tensors.items() for one in _parts(name, tensor)]
    stored.sort(key=lambda one: (_DTYPES.index(one[1]), one[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, dtype, data in stored:
        start, end = end, end + data.nbytes
        header[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    contents = (np.ascontiguousarray(data).tobytes() for _, _, data in stored)
    _replace(path, [len(text).to_bytes(8, "little"), text], contents)
    return list(header)


def _parts(name: str, tensor: HostTensor) -> Iterator[tuple[str, str, Array]]:
    """(name, safetensors dtype, array) of a tensor and of its scales."""
    dtype = f"I{8 * tensor.data.itemsize}" if tensor.format == "int" else _STORED[tensor.format]
    yield name, dtype, tensor.data
    if tensor.scales is not None:
        yield name.removesuffix(".weight") + ".scale", "F8_E8M0", tensor.scales


def _replace(path: Path, *pieces: Iterable[bytes]) -> None:
    """Write a file so that a reader or a crash never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for group in pieces:
                file.writelines(group)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
