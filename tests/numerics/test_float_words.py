"""16-bit floats taken apart and put together again, every one of them."""

from __future__ import annotations

import numpy as np
import pytest

from kvsim.numerics.float_words import HalfFormat, exponent_levels, from_words, join, split, to_words

EVERY = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_every_word_splits_and_joins(half: HalfFormat) -> None:
    exponents, rest = split(EVERY, half)
    assert exponents.min() == 0
    assert exponents.max() == exponent_levels(half) - 1
    assert np.array_equal(join(exponents, rest, half), EVERY)


def test_every_bf16_word_survives_fp32_nan_and_infinity_too() -> None:
    assert np.array_equal(to_words(from_words(EVERY, "bf16"), "bf16"), EVERY)


def test_every_fp16_number_survives_fp32() -> None:
    numbers = EVERY[~np.isnan(EVERY.view(np.float16))]
    assert np.array_equal(to_words(from_words(numbers, "fp16"), "fp16"), numbers)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_numbers_between_are_not_words(half: HalfFormat) -> None:
    assert to_words(np.array([1.0, 1.0 + 2.0**-20], dtype=np.float32), half) is None
    assert to_words(np.array([np.pi], dtype=np.float32), half) is None


def test_large_numbers_are_no_fp16() -> None:
    assert to_words(np.array([2.0**17], dtype=np.float32), "fp16") is None
    assert to_words(np.array([2.0**17], dtype=np.float32), "bf16") is not None
