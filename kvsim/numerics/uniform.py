"""Uniform quantisation of groups of numbers that share a step, symmetric or with a zero point.

Steps and zero points are rounded to the precision that they are stored in before codes are chosen, so that a code is
the nearest one to what will be read back. In the high-rate limit the mean squared error is ``step ** 2 / 12``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import CodeArray, FloatArray
from kvsim.numerics.floats import round_fp16


@dataclass(frozen=True, eq=False)
class Quantised:
    """Codes of groups along the last axis: an element is ``code * scale + zero``.

    Attributes
    ----------
    codes : (..., group) of int32
    scale, zero : (..., 1)
        As stored; fp32 arrays of fp16 numbers where metadata is fp16.
    """

    codes: CodeArray
    scale: FloatArray
    zero: FloatArray

    def read_back(self) -> FloatArray:
        """What is read back, fp32."""
        return self.codes.astype(np.float32) * self.scale + self.zero


def quantise_range(groups: FloatArray, bits: int, *, smallest_scale: float = 0.0) -> Quantised:
    """Quantise each group, (..., group), over its own range, with an fp16 scale and an fp16 zero point.

    The zero point is the smallest element and the scale is the range over ``2 ** bits - 1``; codes run from 0. A group
    of equal elements has scale ``smallest_scale`` and reads back its zero point. Ties go to the even code.
    """
    if groups.size == 0:
        empty = np.zeros((*groups.shape[:-1], 1), dtype=np.float32)
        return Quantised(np.zeros(groups.shape, dtype=np.int32), empty, empty)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    largest = np.float32(2**bits - 1)
    scale = round_fp16(np.maximum((high - low) / largest, np.float32(smallest_scale)))
    zero = round_fp16(low)
    codes = np.clip(np.rint((groups - zero) * reciprocal(scale)), 0, largest)
    return Quantised(codes.astype(np.int32), scale, zero)


def quantise_symmetric(groups: FloatArray, bits: int, scale: FloatArray) -> Quantised:
    """Quantise groups, (..., group), to whole multiples of ``scale``, (..., 1), from ``-(2**(bits-1) - 1)`` up.

    Codes are signed; ties go to the even one.
    """
    largest = np.float32(2 ** (bits - 1) - 1)
    codes = np.clip(np.rint(groups * reciprocal(scale)), -largest, largest)
    return Quantised(codes.astype(np.int32), scale, np.zeros_like(scale))


def largest_magnitude(groups: FloatArray) -> FloatArray:
    """Largest magnitude along the last axis, (..., 1); 0 for groups without elements."""
    largest: FloatArray = np.abs(groups).max(axis=-1, keepdims=True, initial=0.0)
    return largest


def reciprocal(scale: FloatArray) -> FloatArray:
    """1 / scale in fp32, and 0 where the scale is 0, so that a group of zeros has zero codes."""
    inverse = np.zeros_like(scale, dtype=np.float32)
    np.divide(np.float32(1.0), scale, out=inverse, where=scale != 0)
    return inverse


def pack_codes(codes: CodeArray, bits: int) -> NDArray[np.uint8]:
    """Pack codes, (..., n) below ``2 ** bits``, into a stream of bits, lowest first; rows end on whole bytes."""
    planes = (codes[..., None] >> np.arange(bits, dtype=np.int32)) & 1
    flat = planes.reshape(*codes.shape[:-1], codes.shape[-1] * bits).astype(np.uint8)
    return np.packbits(flat, axis=-1, bitorder="little")


def unpack_codes(packed: NDArray[np.uint8], bits: int, count: int) -> CodeArray:
    """Invert `pack_codes`: the first ``count`` codes of each row."""
    flat = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little").astype(np.int32)
    planes = flat.reshape(*packed.shape[:-1], count, bits)
    codes: CodeArray = (planes << np.arange(bits, dtype=np.int32)).sum(axis=-1, dtype=np.int32)
    return codes
