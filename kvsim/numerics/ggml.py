"""Block formats of ggml (llama.cpp): 32 elements that share an fp16 step, and an fp16 minimum in some.

Rounding is that of ggml's reference routines (ggml-quants.c, MIT licence; these are our own words for it): codes are
chosen by the step in fp32, before it is rounded to fp16 for storage; q8_0 rounds halves away from zero, the others
towards plus infinity; the symmetric formats take the step from the element of largest magnitude with its sign, so that
this element has the lowest code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from kvsim.numerics.arrays import CodeArray, FloatArray
from kvsim.numerics.floats import round_fp16
from kvsim.numerics.uniform import reciprocal

GgmlType = Literal["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]

BLOCK: Final = 32
BITS: Final[dict[GgmlType, int]] = {"q8_0": 8, "q5_1": 5, "q5_0": 5, "q4_1": 4, "q4_0": 4}
METADATA_BITS: Final[dict[GgmlType, int]] = {"q8_0": 16, "q5_1": 32, "q5_0": 16, "q4_1": 32, "q4_0": 16}
"""Per block: the step, and the minimum of the formats named ``_1``."""


@dataclass(frozen=True, eq=False)
class GgmlBlocks:
    """Blocks as stored: an element is ``code * step + minimum``.

    Attributes
    ----------
    codes : (..., blocks, 32) of int32
        From 0 up.
    step, minimum : (..., blocks, 1)
        fp16 numbers. Formats without a minimum have ``-offset * step`` here, which is not stored.
    """

    codes: CodeArray
    step: FloatArray
    minimum: FloatArray

    def read_back(self) -> FloatArray:
        """What is read back, fp32."""
        return self.codes.astype(np.float32) * self.step + self.minimum


def quantise_blocks(blocks: FloatArray, form: GgmlType) -> GgmlBlocks:
    """Quantise fp32 blocks, (..., blocks, 32)."""
    if form == "q8_0":
        return _eight_bits(blocks)
    return _from_minimum(blocks, BITS[form]) if form.endswith("_1") else _from_extreme(blocks, BITS[form])


def _eight_bits(blocks: FloatArray) -> GgmlBlocks:
    step = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    codes = _half_away_from_zero(blocks * reciprocal(step)).astype(np.int32)
    return _symmetric(codes, step, 127)


def _from_extreme(blocks: FloatArray, bits: int) -> GgmlBlocks:
    half = 2 ** (bits - 1)
    place = np.abs(blocks).argmax(axis=-1)[..., None]
    step = np.take_along_axis(blocks, place, axis=-1) / np.float32(-half)
    codes = _half_up(blocks * reciprocal(step), half, 2**bits - 1)
    return _symmetric(codes - half, step, half)


def _from_minimum(blocks: FloatArray, bits: int) -> GgmlBlocks:
    low, high = blocks.min(axis=-1, keepdims=True), blocks.max(axis=-1, keepdims=True)
    step = (high - low) / np.float32(2**bits - 1)
    codes = _half_up((blocks - low) * reciprocal(step), 0, 2**bits - 1)
    return GgmlBlocks(codes, round_fp16(step), round_fp16(low))


def _symmetric(signed: CodeArray, step: FloatArray, offset: int) -> GgmlBlocks:
    stored = round_fp16(step)
    return GgmlBlocks(signed + offset, stored, stored * np.float32(-offset))


def _half_up(scaled: FloatArray, offset: int, largest: int) -> CodeArray:
    """Truncate ``scaled + offset + 0.5``, summed in fp32, and cap it."""
    codes: CodeArray = np.minimum(np.trunc(scaled + np.float32(offset + 0.5)), largest).astype(np.int32)
    return codes


def _half_away_from_zero(values: FloatArray) -> FloatArray:
    """Round as C's ``roundf``."""
    whole = np.trunc(values)
    rounded: FloatArray = whole + np.sign(values) * (np.abs(values - whole) >= np.float32(0.5))
    return rounded
