"""Number formats and transforms: exact where the format says so, bounded by theory elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.errors import InvalidSpec
from kvsim.numerics.floats import (
    LARGEST,
    LEVELS,
    MANTISSA_BITS,
    FloatFormat,
    decode_float,
    encode_float,
    round_bf16,
    round_float,
    round_fp16,
)
from kvsim.numerics.hadamard import hadamard_matrix, largest_block, random_signs, rotate
from kvsim.numerics.uniform import (
    largest_magnitude,
    pack_codes,
    quantise_range,
    quantise_symmetric,
    unpack_codes,
)

FORMATS: tuple[FloatFormat, ...] = ("e4m3", "e5m2", "e2m1")
SMALLEST_NORMAL = {"e4m3": 2.0**-6, "e5m2": 2.0**-14, "e2m1": 1.0}


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("form", FORMATS)
def test_every_finite_code_of_a_float_format_survives_a_round_trip(form: FloatFormat) -> None:
    codes = np.arange(LEVELS[form], dtype=np.uint8)
    values = decode_float(codes, form)
    finite = np.isfinite(values)
    assert np.array_equal(encode_float(values[finite], form), codes[finite])
    assert np.abs(values[finite]).max() == LARGEST[form]


@pytest.mark.parametrize("form", FORMATS)
def test_relative_error_of_normal_numbers_is_at_most_half_a_unit_in_the_last_place(form: FloatFormat) -> None:
    magnitudes = np.exp(np.random.default_rng(0).uniform(np.log(SMALLEST_NORMAL[form]), np.log(LARGEST[form]), 50_000))
    values = magnitudes.astype(np.float32)
    worst = (np.abs(round_float(values, form) - values) / values).max()
    bound = 2.0 ** -(MANTISSA_BITS[form] + 1)
    assert 0.9 * bound / (1 + bound) < worst <= bound / (1 + bound) * (1 + 1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_floats_saturate_and_keep_signs(form: FloatFormat) -> None:
    values = np.array([1e30, -1e30, 2 * LARGEST[form], 0.0], dtype=np.float32)
    assert round_float(values, form).tolist() == [LARGEST[form], -LARGEST[form], LARGEST[form], 0.0]


def test_ties_go_to_even() -> None:
    assert round_float(np.array([0.25, 0.75, 1.25, 2.5, 3.5, 5.0], np.float32), "e2m1").tolist() == [0, 1, 1, 2, 4, 4]
    assert round_float(np.array([17.0, 19.0], np.float32), "e4m3").tolist() == [16.0, 20.0]
    assert round_bf16(np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)).tolist() == [1.0, 1 + 2**-6]
    assert round_fp16(np.array([1e9, 1 + 2**-11], np.float32)).tolist() == [65504.0, 1.0]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126, min_value=-(2.0**126)))
def test_bf16_is_what_ml_dtypes_says(value: float) -> None:
    import ml_dtypes

    array = np.array([value], dtype=np.float32)
    assert round_bf16(array) == array.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("dim", [1, 2, 4, 32, 128, 256])
def test_hadamard_is_orthogonal_symmetric_and_agrees_with_the_fast_transform(dim: int) -> None:
    matrix = hadamard_matrix(dim)
    assert np.allclose(matrix @ matrix, np.eye(dim), atol=1e-6)
    assert np.array_equal(matrix, matrix.T)
    assert np.allclose(np.abs(matrix), dim**-0.5)
    vectors = _normal(3, 5, dim)
    assert np.allclose(rotate(vectors), vectors @ matrix, atol=1e-5)
    assert np.allclose(rotate(rotate(vectors)), vectors, atol=1e-6)


def test_blocks_of_a_hadamard_rotation_do_not_mix() -> None:
    vectors = _normal(4, 96)
    turned = rotate(vectors, 32)
    for start in range(0, 96, 32):
        assert np.allclose(turned[:, start : start + 32], rotate(vectors[:, start : start + 32]), atol=1e-6)


def test_a_rotation_spreads_one_heavy_channel_evenly() -> None:
    vector = np.zeros(64, dtype=np.float32)
    vector[5] = 8.0
    assert np.allclose(np.abs(rotate(vector)), 1.0)


def test_random_signs_are_fixed_by_their_seed_and_keep_products() -> None:
    signs = random_signs(64, 7)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert np.array_equal(signs, random_signs(64, 7))
    first, second = _normal(64), _normal(64, seed=1)
    assert np.dot(rotate(first * signs), rotate(second * signs)) == pytest.approx(np.dot(first, second), abs=1e-4)


def test_sizes_that_no_hadamard_matrix_has_are_refused_with_one_that_fits() -> None:
    with pytest.raises(InvalidSpec, match="blocks of 32 would do"):
        rotate(_normal(2, 96))
    with pytest.raises(InvalidSpec, match="a block of 32 does"):
        rotate(_normal(2, 96), 64)
    assert [largest_block(dim) for dim in (1, 7, 80, 96, 128, 576)] == [1, 1, 16, 32, 128, 64]


@given(
    bits=st.integers(1, 12),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 40)),
    seed=st.integers(0, 1 << 30),
)
def test_packed_codes_come_back(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.int32)
    packed = pack_codes(codes, bits)
    assert packed.shape == (shape[0], -(-shape[1] * bits // 8))
    assert np.array_equal(unpack_codes(packed, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_uniform_error_at_a_high_rate_is_a_twelfth_of_the_squared_step(bits: int) -> None:
    groups = np.random.default_rng(bits).uniform(-1, 1, (4000, 64)).astype(np.float32)
    made = quantise_range(groups, bits)
    error = np.mean((made.read_back() - groups) ** 2 / (made.scale**2 / 12))
    # The two ends of a range are codes themselves, so their error is 0: 1 - 2/64 of the elements are free.
    assert error == pytest.approx(1 - 2 / 64, rel=0.03)


def test_uniform_error_falls_with_bits_and_never_exceeds_a_step() -> None:
    groups = _normal(500, 32)
    errors = []
    for bits in range(1, 9):
        made = quantise_range(groups, bits)
        deviation = np.abs(made.read_back() - groups)
        # Half a step, and what fp16 rounding of the zero point and the scale adds at the ends.
        slack = 2.0**-11 * (np.abs(groups).max() + (2**bits - 1) * made.scale)
        assert (deviation <= made.scale / 2 + slack).all()
        errors.append(float(np.mean(deviation**2)))
    assert errors == sorted(errors, reverse=True)


def test_equal_elements_read_back_as_fp16_holds_them() -> None:
    groups = np.full((3, 32), np.float32(1.5))
    assert np.array_equal(quantise_range(groups, 2).read_back(), groups)
    assert np.array_equal(quantise_range(0 * groups, 4).read_back(), 0 * groups)


def test_symmetric_codes_use_the_whole_range_and_keep_zero() -> None:
    groups = _normal(50, 64)
    scale = largest_magnitude(groups) / np.float32(127)
    made = quantise_symmetric(groups, 8, scale)
    assert (np.abs(made.codes).max(axis=-1) == 127).all()
    assert np.array_equal(quantise_symmetric(-groups, 8, scale).codes, -made.codes)
    assert np.array_equal(quantise_symmetric(0 * groups, 8, 0 * scale).read_back(), 0 * groups)


def test_groups_without_elements_are_no_trouble() -> None:
    empty = np.zeros((2, 5, 0), dtype=np.float32)
    assert quantise_range(empty, 4).read_back().shape == (2, 5, 0)
    assert largest_magnitude(empty).tolist() == [[[0.0]] * 5] * 2
