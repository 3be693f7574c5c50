"""The packed formats: our specification, MLX and torch read the same values from one file."""

from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from ds4.backends.cuda import weights as torch_weights
from ds4.backends.mlx import weights as mlx_weights

from ds4.quant.affine import decode_affine, encode_affine
from ds4.quant.formats import decode_bf16, encode_bf16, encode_fp8, encode_mxfp4
from ds4.quant.mxfp8 import encode_mxfp8, spread_scales
from ds4.quant.packing import BITS, pack, unpack
from ds4.weights.tensor import HostTensor, concatenate, stack
from tests.fixtures import Tensors, write_safetensors

KINDS = ["mxfp4", "mxfp8", *(f"affine{bits}-{group}" for bits in BITS for group in (64, 128))]


def values(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, shape) * 0.02 + 0.005 * rng.standard_normal(shape)).astype(np.float32)


def encode(kind: str, w: np.ndarray) -> HostTensor:
    if kind == "mxfp4":
        return HostTensor(kind, *encode_mxfp4(w))
    if kind == "mxfp8":
        return HostTensor(kind, *encode_mxfp8(w))
    bits, group = map(int, kind.removeprefix("affine").split("-"))
    return HostTensor("affine", *encode_affine(w, bits, group), bits, group)


def file_of(tensor: HostTensor, path: Path) -> dict[str, mx.array]:
    """What mx.load finds in a file of ours."""
    words = np.ascontiguousarray(tensor.data).view(np.uint32)
    tensors: Tensors = {"x.weight": ("U32", words.shape, words.tobytes())}
    scales = "U8" if tensor.biases is None else "BF16"
    for leaf, dtype, data in (
        ("scales", scales, tensor.scales),
        ("biases", "BF16", tensor.biases),
    ):
        if data is not None:
            tensors[f"x.{leaf}"] = dtype, data.shape, data.tobytes()
    write_safetensors(path, tensors)
    return mx.load(str(path))


def bits_of(x: mx.array) -> np.ndarray:
    """bfloat16 -> bit patterns."""
    return np.array(x.view(mx.uint16))


# the bit stream


@pytest.mark.parametrize("bits", BITS)
def test_a_row_is_one_little_endian_bit_stream(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 2, 96), np.uint8)
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little", count=bits)
    want = np.packbits(stream.reshape(3, 2, -1), axis=-1, bitorder="little").view(np.uint32)
    words = pack(codes, bits)
    np.testing.assert_array_equal(words, want)
    assert words.dtype == np.uint32
    np.testing.assert_array_equal(unpack(words, bits), codes)
    np.testing.assert_array_equal(unpack(words[:, ::2], bits), codes[:, ::2])


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="not 7"):
        pack(np.zeros((1, 64), np.uint8), 7)
    with pytest.raises(ValueError, match="multiple of 32"):
        pack(np.zeros((1, 40), np.uint8), 4)


# affine


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_what_mlx_quantizes_decodes_to_the_bit(bits: int, group: int) -> None:
    w = mx.array(values(24, 512)).astype(mx.bfloat16)
    words, scales, biases = mx.quantize(w, group_size=group, bits=bits)
    s, b = bits_of(scales), bits_of(biases)
    assert 0.3 < (decode_bf16(s) < 0).mean() < 0.7
    found = decode_affine(np.array(words), s, b, bits, group)
    how = {"group_size": group, "bits": bits}
    f32 = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), **how)
    np.testing.assert_array_equal(found, np.array(f32))
    # in bf16 MLX rounds the product, then the sum
    codes = unpack(np.array(words), bits).reshape(24, -1, group).astype(np.float32)
    product = decode_bf16(encode_bf16(codes * decode_bf16(s)[..., None]))
    twice = encode_bf16(product + decode_bf16(b)[..., None]).reshape(24, 512)
    np.testing.assert_array_equal(twice, bits_of(mx.dequantize(words, scales, biases, **how)))


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_our_codes_are_as_near_as_mlx_s(bits: int, group: int) -> None:
    w = np.array(mx.array(values(64, 512)).astype(mx.bfloat16).astype(mx.float32))
    ours = encode(f"affine{bits}-{group}", w)
    assert ours.scales is not None
    theirs = mx.quantize(mx.array(w).astype(mx.bfloat16), group_size=group, bits=bits)
    np.testing.assert_array_equal(ours.scales, bits_of(theirs[1]))
    there = decode_affine(np.array(theirs[0]), *map(bits_of, theirs[1:]), bits, group)
    assert np.square(ours.decode() - w).sum() <= np.square(there - w).sum() * (1 + 1e-6)


def test_degenerate_groups() -> None:
    w = np.zeros((4, 64), np.float32)
    w[1], w[2], w[3, 5] = 0.5, -3, 1e-30
    for bits in BITS:
        found = encode(f"affine{bits}-64", w).decode()
        np.testing.assert_allclose(found, w, atol=1e-6, rtol=0)


# mxfp8


def test_official_fp8_is_mxfp8_with_its_scales_repeated() -> None:
    codes, scales = encode_fp8(values(200, 320))
    spread = spread_scales(scales, 200, 320)
    assert spread.shape == (200, 10)
    as_mxfp8 = HostTensor("mxfp8", codes, spread).decode()
    np.testing.assert_array_equal(as_mxfp8, HostTensor("fp8", codes, scales).decode())


def test_mxfp8_rounds_to_nearest() -> None:
    w = values(32, 256)
    tensor = encode("mxfp8", w)
    assert tensor.scales is not None
    scale = np.exp2(tensor.scales.astype(np.float32) - 127).repeat(32, -1)
    want = (w / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(tensor.decode(), want)
    assert (np.abs(w / scale).reshape(32, 8, 32).max(-1) > 224).all()


# one file, three readers


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_and_torch_read_a_file_of_ours(kind: str, tmp_path: Path) -> None:
    w = values(3, 40, 256)
    tensor = encode(kind, w)
    want = tensor.decode()
    assert want.shape == tensor.shape == w.shape
    assert np.abs(want - w).mean() < 0.8 * np.abs(w).mean()
    found = file_of(tensor, tmp_path / "x.safetensors")
    mode = {"mode": tensor.format} if tensor.biases is None else {}
    size = {"bits": tensor.bits, "group_size": tensor.group} if tensor.biases is not None else {}
    words, scales, biases = found["x.weight"], found["x.scales"], found.get("x.biases")
    x = np.random.default_rng(1).standard_normal((3, 5, 256), np.float32)
    product = mx.quantized_matmul(mx.array(x), words, scales, biases, **size, **mode)
    np.testing.assert_allclose(product, x @ want.swapaxes(1, 2), atol=2e-5)
    ids = np.array([2, 0, 2, 1], np.uint32)
    each = mx.array(np.random.default_rng(2).standard_normal((4, 1, 256), np.float32))
    ids_mx = mx.array(ids)
    got = mx.gather_qmm(each, words, scales, biases, rhs_indices=ids_mx, **size, **mode)
    np.testing.assert_allclose(got, np.array(each) @ want[ids].swapaxes(1, 2), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_backends_decode_to_the_bit(kind: str) -> None:
    tensor = encode(kind, values(3, 40, 256))
    want = tensor.decode()
    packed = torch_weights.pack(tensor, "cpu")
    assert isinstance(packed, torch_weights.Packed)
    np.testing.assert_array_equal(torch_weights.dense(packed).numpy(), want)
    np.testing.assert_array_equal(torch_weights.dense(packed[[2, 0]]).numpy(), want[[2, 0]])
    ours = mlx_weights.pack(tensor)
    assert isinstance(ours, mlx_weights.Packed)
    eye = mx.broadcast_to(mx.eye(256), (3, 256, 256))
    np.testing.assert_array_equal(np.array(ours.matmul(eye)).swapaxes(1, 2), want)
    single = mlx_weights.pack(encode(kind, values(40, 256)))
    rows = np.array(single.rows(mx.array([7, 0, 7])))
    np.testing.assert_array_equal(rows, encode(kind, values(40, 256)).decode()[[7, 0, 7]])


@pytest.mark.parametrize("kind", ["mxfp8", "affine3-64"])
def test_tensors_are_stacked_and_joined(kind: str) -> None:
    parts = [encode(kind, values(8, 128, seed=seed)) for seed in (0, 1)]
    decoded = [part.decode() for part in parts]
    np.testing.assert_array_equal(stack(parts).decode(), np.stack(decoded))
    np.testing.assert_array_equal(concatenate(parts).decode(), np.concatenate(decoded))
    assert stack(parts).nbytes == sum(part.nbytes for part in parts)
    with pytest.raises(ValueError, match="cannot join"):
        concatenate([parts[0], encode("affine4-64", values(8, 128))])
