"""Uniform quantisation of groups over a clipped range, as QuaRot and RotateKV do it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvsim.numerics.arrays import CodeArray, FloatArray
from kvsim.numerics.floats import round_fp16
from kvsim.numerics.uniform import Quantised, pack_codes, reciprocal


class Grouped(NamedTuple):
    """Vectors quantised in groups of channels.

    Attributes
    ----------
    codes : (..., D)
    vectors : (..., D)
        As they are read back.
    payload_bits, metadata_bits : float
        Packed codes, a vector's on whole bytes; fp16 scales and zero points.
    """

    codes: CodeArray
    vectors: FloatArray
    payload_bits: float
    metadata_bits: float


def quantise_clipped(groups: FloatArray, bits: int, clip_ratio: float) -> Quantised:
    """Quantise each group, (..., group), over ``clip_ratio`` times its smallest to so much of its largest element.

    Scale and zero point are fp16, and rounded before codes are chosen. What lies outside gets the code at the end.
    """
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    clip, largest = np.float32(clip_ratio), np.float32(2**bits - 1)
    scale, zero = round_fp16((high - low) * (clip / largest)), round_fp16(low * clip)
    codes = np.clip(np.rint((groups - zero) * reciprocal(scale)), 0, largest)
    return Quantised(codes.astype(np.int32), scale, zero)


def quantise_groups(vectors: FloatArray, bits: int, group_size: int, clip_ratio: float) -> Grouped:
    """Quantise runs of ``group_size`` neighbouring channels of vectors, (..., D), the last run shorter."""
    starts = range(0, vectors.shape[-1], group_size)
    groups = [quantise_clipped(vectors[..., start : start + group_size], bits, clip_ratio) for start in starts]
    codes = np.concatenate([group.codes for group in groups], axis=-1)
    return Grouped(
        codes,
        np.concatenate([group.read_back() for group in groups], axis=-1),
        payload_bits=8.0 * pack_codes(codes, bits).size,
        metadata_bits=16.0 * sum(group.scale.size + group.zero.size for group in groups),
    )
