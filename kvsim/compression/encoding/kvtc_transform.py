"""kvtc's transform: components of rows, quantised in groups that share a scale and a zero point per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvsim.compression.codec import CodeArray
from kvsim.numerics.bit_allocation import Segment, allocate_segments
from kvsim.numerics.byte_coders import compressed_bits, pack, unpack
from kvsim.numerics.uniform import Quantised, quantise_range
from kvsim.tensors import FloatArray

Table: TypeAlias = NDArray[np.float64]

UNIT: Final = 16
"""Groups start at multiples of it."""
GROUP_SIZES: Final = (16, 32, 64, 128, 256, 512, 1024)
WIDTHS: Final = (1, 2, 3, 4, 5, 6, 7, 8)
SCALE_BITS: Final = 32
"""fp16 scale and fp16 zero point of a group of one token."""
SEARCHED_ROWS: Final = 256
"""Calibration rows on which quantisers are compared."""


@dataclass(frozen=True)
class ComponentGroup:
    """Neighbouring components with one scale and one zero point per token."""

    size: int
    bits: int

    @property
    def cost(self) -> int:
        """Bits per token, before DEFLATE."""
        return _cost(self.size, self.bits)


@dataclass(frozen=True, eq=False)
class Transform:
    """A linear map to components, and groups of those that are kept.

    Attributes
    ----------
    mean : (C,)
    down : (C, k)
        Rows to components. Orthonormal columns, unless channels are weighted.
    up : (k, C)
        Components to rows; ``up @ down`` is the identity.
    groups : tuple of ComponentGroup
        Their sizes add up to k.
    """

    mean: FloatArray
    down: FloatArray
    up: FloatArray
    groups: tuple[ComponentGroup, ...]

    @property
    def bits_per_row(self) -> int:
        """Before DEFLATE, scales included."""
        return sum(group.cost for group in self.groups)

    def encode(self, rows: FloatArray) -> tuple[Quantised, ...]:
        """Codes and scales, group by group, of rows (n, C)."""
        components = ((rows - self.mean) @ self.down).astype(np.float32)
        ends = np.cumsum([group.size for group in self.groups])
        return tuple(
            quantise_range(components[:, end - group.size : end], group.bits)
            for group, end in zip(self.groups, ends, strict=True)
        )

    def decode(self, coded: Sequence[Quantised], count: int) -> FloatArray:
        """Rows, (count, C), that the codes stand for; the mean where nothing was kept."""
        if not coded:
            return np.repeat(self.mean[None], count, axis=0)
        components = np.concatenate([one.read_back() for one in coded], axis=1)
        return (components @ self.up + self.mean).astype(np.float32)


def make_transform(rows: FloatArray, mean_bits: float, weights: Table | None = None) -> Transform:
    """Fit basis and groups to sample rows, (n, C), for a budget in bits per column, scales included.

    ``weights``, (C, C), positive definite, measures an error e as ``e' weights e``; without it errors are squared.
    Components of weighted rows ``x' weights^1/2`` make this a squared error again.
    """
    exact = rows.astype(np.float64)
    mean = exact.mean(axis=0)
    root, inverse = _roots(weights, len(mean))
    centred = (exact - mean) @ root
    variances, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    vectors = vectors[:, np.argsort(-variances, kind="stable")]
    cut = choose_groups(centred @ vectors, round(mean_bits * len(mean)))
    kept = np.repeat([one.width > 0 for one in cut], [one.stop - one.start for one in cut])
    return Transform(
        mean.astype(np.float32),
        np.ascontiguousarray(root @ vectors[:, kept], dtype=np.float32),
        np.ascontiguousarray(vectors[:, kept].T @ inverse, dtype=np.float32),
        tuple(ComponentGroup(one.stop - one.start, one.width) for one in cut if one.width),
    )


def choose_groups(components: Table, budget: int) -> tuple[Segment, ...]:
    """Groups of components (n, C) and their widths, of least error measured on these rows, for a budget per row."""
    chosen = np.linspace(0, len(components) - 1, min(len(components), SEARCHED_ROWS)).astype(np.int64)
    rows = components[chosen].astype(np.float32)
    return allocate_segments(rows.shape[1], candidates(rows, budget), budget)


def candidates(rows: FloatArray, budget: int) -> list[Segment]:
    """Every group that a budget allows, with its mean error over rows (n, C), and every unit dropped."""
    count = rows.shape[1]
    found = [
        Segment(start, min(start + UNIT, count), 0, 0, _mean_square(rows[:, start : start + UNIT]))
        for start in range(0, count, UNIT)
    ]
    for start in range(0, count, UNIT):
        for stop in sorted({min(start + size, count) for size in GROUP_SIZES if start + size < count + UNIT}):
            group = rows[:, start:stop]
            found += [
                Segment(start, stop, width, _cost(stop - start, width), _quantisation_error(group, width))
                for width in WIDTHS
                if _cost(stop - start, width) <= budget
            ]
    return found


def coded_bits(coded: Sequence[Quantised], groups: Sequence[ComponentGroup]) -> tuple[float, float]:
    """Bits of codes through DEFLATE, and of scales and zero points, which are not coded."""
    if not coded:
        return 0.0, 0.0
    widths = np.repeat([group.bits for group in groups], [group.size for group in groups])
    payload = deflated_bits(np.concatenate([one.codes for one in coded], axis=1), widths)
    return payload, float(sum(SCALE_BITS * one.scale.size for one in coded))


def deflated_bits(codes: CodeArray, bits: NDArray[np.int64]) -> float:
    """Bits of codes (n, k) through DEFLATE: one block for the components of each number of bits, packed in turn."""
    total = 0.0
    for width in np.unique(bits) if codes.size else ():
        row = np.ascontiguousarray(codes[:, bits == width].T).ravel()
        data = pack(row, 1 << int(width))
        if not np.array_equal(unpack(data, 1 << int(width), len(row)), row):
            msg = "packing gave back other codes than it was given"
            raise RuntimeError(msg)
        total += compressed_bits(data.tobytes(), "deflate")
    return total


def _cost(size: int, width: int) -> int:
    return size * width + SCALE_BITS if width else 0


def _quantisation_error(group: FloatArray, width: int) -> float:
    return _mean_square(group - quantise_range(group, width).read_back())


def _mean_square(lost: FloatArray) -> float:
    """Squared norm of a row, on average."""
    return float(np.einsum("nc,nc->", lost, lost, dtype=np.float64)) / max(1, len(lost))


def _roots(weights: Table | None, width: int) -> tuple[Table, Table]:
    """Symmetric square root of the weights, and its inverse."""
    if weights is None:
        return np.eye(width), np.eye(width)
    values, vectors = np.linalg.eigh(weights)
    roots = np.sqrt(values)
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
