"""Number formats, against the specification's arithmetic written a second time and ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest

from ds4.quant import formats
from ds4.weights.tensor import HostTensor, concatenate, stack

BYTES = np.arange(256, dtype=np.uint8)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def bits(x: np.ndarray) -> np.ndarray:
    """float32 bit patterns: tells -0 from 0, and NaN equals NaN."""
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def e4m3(code: int) -> float:
    """One byte, 1-4-3 bits, bias 7, no infinity (specification 2.3)."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return np.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e2m1(code: int) -> float:
    return -FP4[code & 7] if code & 8 else FP4[code]


def scale(byte: int) -> float:
    return 2.0 ** (byte - 127)


# decoding


def test_every_fp8_byte() -> None:
    written = np.array([e4m3(int(b)) for b in BYTES], np.float32)
    library = BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = ~np.isnan(written)
    for expected in (written, library):
        assert np.array_equal(np.isnan(formats.E4M3), np.isnan(expected))
        np.testing.assert_array_equal(bits(formats.E4M3[finite]), bits(expected[finite]))


def test_every_fp4_code() -> None:
    np.testing.assert_array_equal(bits(formats.E2M1), bits([e2m1(c) for c in range(16)]))
    library = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(bits(formats.E2M1), bits(library))


def test_every_scale_byte() -> None:
    written = np.array([scale(b) for b in range(255)], np.float32)
    np.testing.assert_array_equal(bits(formats.E8M0[:255]), bits(written))
    assert np.isnan(formats.E8M0[255])
    library = BYTES[:255].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(bits(formats.E8M0[:255]), bits(library))


def test_every_bf16_pattern() -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    library = patterns.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(bits(formats.decode_bf16(patterns)), bits(library))


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 257), (1, 1), (64, 200)])
def test_fp8_matrix_is_code_times_scale_of_its_block(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    codes = rng.choice(np.delete(BYTES, [127, 255]), shape)
    scales = rng.integers(100, 140, [-(-n // 128) for n in shape], dtype=np.uint8)
    expected = np.empty(shape, np.float32)
    for o in range(shape[0]):
        for i in range(shape[1]):
            expected[o, i] = e4m3(int(codes[o, i])) * scale(int(scales[o // 128, i // 128]))
    np.testing.assert_array_equal(bits(formats.decode_fp8(codes, scales)), bits(expected))
    tensor = HostTensor("fp8", codes, scales)
    assert tensor.shape == shape
    np.testing.assert_array_equal(bits(tensor.decode()), bits(expected))


def test_fp4_matrix_is_low_nibble_first_times_scale_of_its_group() -> None:
    rng = np.random.default_rng(1)
    codes = rng.permuted(np.tile(BYTES, (6, 1)), axis=1)[:, :96]  # 192 inputs, 6 groups
    codes[0, :] = BYTES[:96]
    scales = rng.integers(100, 140, (6, 6), dtype=np.uint8)
    expected = np.empty((6, 192), np.float32)
    for o in range(6):
        for i in range(192):
            byte = int(codes[o, i // 2])
            nibble = byte >> 4 if i % 2 else byte & 15
            expected[o, i] = e2m1(nibble) * scale(int(scales[o, i // 32]))
    np.testing.assert_array_equal(bits(formats.decode_mxfp4(codes, scales)), bits(expected))
    tensor = HostTensor("mxfp4", codes, scales)
    assert tensor.shape == (6, 192)
    np.testing.assert_array_equal(bits(tensor.decode()), bits(expected))


def test_all_bytes_under_several_scales() -> None:
    for byte in (0, 1, 100, 127, 140, 200):
        fp4 = formats.decode_mxfp4(BYTES.reshape(16, 16), np.full((16, 1), byte, np.uint8))
        pairs = [[e2m1(b & 15) * scale(byte), e2m1(b >> 4) * scale(byte)] for b in range(256)]
        np.testing.assert_array_equal(bits(fp4.reshape(-1, 2)), bits(pairs))
        fp8 = formats.decode_fp8(BYTES[None, :127], np.full((1, 1), byte, np.uint8))
        np.testing.assert_array_equal(
            bits(fp8[0]), bits([e4m3(b) * scale(byte) for b in range(127)])
        )


def test_decoded_weights_are_exact_in_bf16() -> None:
    rng = np.random.default_rng(2)
    for decoded in (
        formats.decode_fp8(BYTES[None, :127], np.array([[120]], np.uint8)),
        formats.decode_mxfp4(BYTES[None], rng.integers(110, 130, (1, 16), dtype=np.uint8)),
    ):
        again = formats.decode_bf16(formats.encode_bf16(decoded))
        np.testing.assert_array_equal(bits(again), bits(decoded))


def test_leading_axes_are_kept() -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 127, (3, 256, 128), dtype=np.uint8)
    scales = rng.integers(110, 130, (3, 2, 1), dtype=np.uint8)
    each = [formats.decode_fp8(c, s) for c, s in zip(codes, scales, strict=True)]
    np.testing.assert_array_equal(formats.decode_fp8(codes, scales), np.stack(each))
    one = [HostTensor("fp8", c, s) for c, s in zip(codes, scales, strict=True)]
    np.testing.assert_array_equal(stack(one).decode(), np.stack(each))
    np.testing.assert_array_equal(concatenate(one).decode(), np.concatenate(each))


# encoding


def test_encoding_is_the_inverse_of_decoding() -> None:
    finite = np.delete(BYTES, [127, 255])
    np.testing.assert_array_equal(formats.encode_e4m3(formats.E4M3[finite]), finite)
    np.testing.assert_array_equal(formats.encode_e2m1(formats.E2M1), np.arange(16))


@pytest.mark.parametrize(
    ("encode", "dtype", "limit"),
    [
        (formats.encode_e4m3, ml_dtypes.float8_e4m3fn, 448),
        (formats.encode_e2m1, ml_dtypes.float4_e2m1fn, 6),
    ],
)
def test_rounding_is_to_nearest_with_ties_to_even(encode, dtype, limit: float) -> None:
    rng = np.random.default_rng(4)
    x = np.concatenate(
        [
            rng.uniform(-limit, limit, 20_000),
            rng.standard_normal(20_000) * 0.02,
            np.arange(-limit, limit, 0.25),  # every tie of FP4, many of FP8
            np.arange(-64, 65) * 2.0**-10,
        ]
    ).astype(np.float32)
    np.testing.assert_array_equal(encode(x), x.astype(dtype).view(np.uint8))


def test_bf16_rounding() -> None:
    rng = np.random.default_rng(5)
    x = rng.integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    x = np.append(
        x[np.isfinite(x)], np.float32([0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8])
    )
    with np.errstate(over="ignore"):
        library = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(formats.encode_bf16(x), library)
    assert np.isnan(formats.decode_bf16(formats.encode_bf16(np.float32([np.nan]))))[0]


def q8(x: np.ndarray) -> np.ndarray:
    """Quantiser Q8 of specification 3.1 on one group, in float64."""
    amax = max(float(np.abs(x).max()), 1e-4)
    s = 2.0 ** np.ceil(np.log2(amax / 448))
    code = np.clip(x / s, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return code.astype(np.float64) * s


def q4(x: np.ndarray) -> np.ndarray:
    amax = max(float(np.abs(x).max()), 6 * 2.0**-126)
    s = 2.0 ** np.ceil(np.log2(amax / 6))
    code = np.clip(x / s, -6, 6).astype(np.float32).astype(ml_dtypes.float4_e2m1fn)
    return code.astype(np.float64) * s


@pytest.mark.parametrize(
    ("size", "rounded", "quantiser"), [(64, "round_q8", q8), (32, "round_q4", q4)]
)
def test_cache_rows_round_as_specified(size: int, rounded: str, quantiser) -> None:
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((40, 4 * size)) * np.exp(rng.uniform(-12, 6, (40, 1)))
    rows = rows.astype(np.float32)
    rows[0], rows[1] = 0, 1e-6
    rows[2, :] = rng.choice([-448, 448, 6, -6, 3, 0.5], 4 * size)
    groups = rows.reshape(-1, size).astype(np.float64)
    expected = np.stack([quantiser(group) for group in groups]).reshape(rows.shape)
    actual = getattr(formats, rounded)(rows)
    np.testing.assert_array_equal(actual, expected.astype(np.float32))
    np.testing.assert_array_equal(getattr(formats, rounded)(actual), actual)  # on the grid already


def test_weights_survive_a_second_encoding() -> None:
    rng = np.random.default_rng(7)
    w = rng.standard_normal((200, 320)).astype(np.float32)
    for encode, decode in (
        (formats.encode_fp8, formats.decode_fp8),
        (formats.encode_mxfp4, formats.decode_mxfp4),
    ):
        once = decode(*encode(w))
        np.testing.assert_array_equal(decode(*encode(once)), once)
        assert np.abs(once - w).max() < 0.6


def test_hadamard_is_the_formula_of_the_specification() -> None:
    h = formats.hadamard(128)
    formula = [[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)]
    np.testing.assert_allclose(h, np.array(formula) * 0.088388348, rtol=1e-7)
    np.testing.assert_allclose(h @ h, np.eye(128), atol=1e-6)
    with pytest.raises(ValueError, match="power of two"):
        formats.hadamard(96)
