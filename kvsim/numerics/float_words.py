"""16-bit floats as words: exponent apart from sign and mantissa."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint16]
HalfFormat = Literal["bf16", "fp16"]

MANTISSA_BITS: Final[dict[HalfFormat, int]] = {"bf16": 7, "fp16": 10}


def exponent_levels(half: HalfFormat) -> int:
    """How many values the exponent field takes."""
    return 1 << (15 - MANTISSA_BITS[half])


def to_words(values: NDArray[np.float32], half: HalfFormat) -> Words | None:
    """Bits of numbers in a 16-bit format, or None where it does not hold all of them exactly."""
    bits = values.view(np.uint32)
    if half == "bf16":
        return None if (bits & 0xFFFF).any() else (bits >> 16).astype(np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        words = values.astype(np.float16).view(np.uint16)
    return words if np.array_equal(from_words(words, "fp16").view(np.uint32), bits) else None


def from_words(words: Words, half: HalfFormat) -> NDArray[np.float32]:
    """Numbers that the words stand for."""
    if half == "bf16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        return words.view(np.float16).astype(np.float32)


def split(words: Words, half: HalfFormat) -> tuple[NDArray[np.int32], Words]:
    """Exponent field, and the rest: sign and mantissa side by side."""
    mantissa = MANTISSA_BITS[half]
    exponents = ((words & 0x7FFF) >> mantissa).astype(np.int32)
    rest = ((words >> 15) << mantissa) | (words & ((1 << mantissa) - 1))
    return exponents, rest.astype(np.uint16)


def join(exponents: NDArray[np.int32], rest: Words, half: HalfFormat) -> Words:
    """Invert `split`."""
    mantissa = MANTISSA_BITS[half]
    sign = (rest >> mantissa) << 15
    return (sign | (exponents.astype(np.uint16) << mantissa) | (rest & ((1 << mantissa) - 1))).astype(np.uint16)
