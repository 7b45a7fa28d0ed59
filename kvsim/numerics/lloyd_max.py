"""Lloyd-Max quantisers: the levels of least mean squared error for a known law (Max 1960; Lloyd 1982).

Two laws of unit variance: N(0, 1), and ``sqrt(d)`` times a coordinate of a uniformly random unit vector in dimension
``d``, whose density is proportional to ``(1 - x**2 / d) ** ((d - 3) / 2)`` (TurboQuant, arXiv 2504.19874, lemma 1) and
tends to the first. Both densities are log-concave from d = 3 on, so there is one optimum; Newton's method finds it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import CodeArray, DoubleArray, FloatArray

MAX_BITS = 8
SMALLEST_DIMENSION = 3
_QUADRATURE_NODES = 64
_MOST_STEPS = 500
_TAIL = 9.0
"""Where the search for N(0, 1) starts to ignore its tail; it matters to no result."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """A scalar quantiser for numbers of unit variance, with what theory says of it.

    Attributes
    ----------
    levels : (2 ** bits,)
        Ascending; code ``i`` stands for ``levels[i]``.
    thresholds : (2 ** bits - 1,)
        Midpoints between neighbouring levels; a number at or above the ``i``-th has a code above ``i``.
    probabilities : (2 ** bits,)
        How often each code occurs under the law.
    distortion : float
        Mean squared error under the law.
    """

    bits: int
    levels: DoubleArray
    thresholds: DoubleArray
    probabilities: DoubleArray
    distortion: float

    @property
    def entropy_bits(self) -> float:
        """Entropy of a code under the law: what an ideal entropy coder would need."""
        return float(-(self.probabilities * np.log2(self.probabilities)).sum())

    def quantise(self, values: FloatArray) -> CodeArray:
        """Give the codes of the nearest levels."""
        return np.searchsorted(self.thresholds.astype(np.float32), values, side="right").astype(np.int32)

    def read_back(self, codes: CodeArray) -> FloatArray:
        """Give the levels of codes, fp32."""
        return self.levels.astype(np.float32)[codes]


@lru_cache(maxsize=64)
def lloyd_max(bits: int, dimension: int | None = None) -> Codebook:
    """Find the Lloyd-Max quantiser of ``2 ** bits`` levels.

    Parameters
    ----------
    dimension : int, optional
        Of the sphere whose coordinate is quantised, times its square root; N(0, 1) without.

    Raises
    ------
    InvalidSpec
        ``bits`` is not 0 to 8, or ``dimension`` below 3.
    """
    if not 0 <= bits <= MAX_BITS:
        msg = f"a Lloyd-Max codebook has 0 to {MAX_BITS} bits, not {bits}"
        raise InvalidSpec(msg)
    if dimension is not None and dimension < SMALLEST_DIMENSION:
        msg = f"the law of a coordinate needs {SMALLEST_DIMENSION} dimensions or more, not {dimension}"
        raise InvalidSpec(msg)
    law: _Law = _Normal() if dimension is None else _SphereCoordinate(dimension)
    levels = _solve(law, 2**bits)
    thresholds = _midpoints(levels)
    return Codebook(bits, levels, thresholds, law.cells(thresholds)[0], _distortion(law, levels))


class _Law(ABC):
    """A symmetric density of unit variance."""

    @property
    @abstractmethod
    def half_width(self) -> float:
        """Where the density ends, or is as good as 0."""

    @abstractmethod
    def density(self, points: DoubleArray) -> DoubleArray:
        """Density at points inside."""

    @abstractmethod
    def cells(self, thresholds: DoubleArray) -> tuple[DoubleArray, DoubleArray]:
        """Mass and first moment of each cell that the thresholds cut the line into."""


class _Normal(_Law):
    """N(0, 1)."""

    half_width = _TAIL

    def density(self, points: DoubleArray) -> DoubleArray:
        return np.exp(-0.5 * points * points) / math.sqrt(2.0 * math.pi)

    def cells(self, thresholds: DoubleArray) -> tuple[DoubleArray, DoubleArray]:
        below = np.array([0.5 * math.erfc(-edge / math.sqrt(2.0)) for edge in thresholds])
        height = self.density(thresholds)
        return np.diff(below, prepend=0.0, append=1.0), -np.diff(height, prepend=0.0, append=0.0)


class _SphereCoordinate(_Law):
    """Square root of d times a coordinate of a uniform unit vector: x = sqrt(d) sin(t), density of t ~ cos(t)^(d-2)."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        log_ratio = math.lgamma(dimension / 2) - math.lgamma((dimension - 1) / 2)
        self._scale = math.exp(log_ratio) / math.sqrt(math.pi)
        self._nodes, self._weights = np.polynomial.legendre.leggauss(_QUADRATURE_NODES)

    @property
    def half_width(self) -> float:
        return math.sqrt(self._dimension)

    def density(self, points: DoubleArray) -> DoubleArray:
        inside = np.maximum(1.0 - points * points / self._dimension, 0.0)
        return self._scale / self.half_width * inside ** ((self._dimension - 3) / 2)

    def cells(self, thresholds: DoubleArray) -> tuple[DoubleArray, DoubleArray]:
        angles = np.concatenate(([-math.pi / 2], np.arcsin(thresholds / self.half_width), [math.pi / 2]))
        half = np.diff(angles)[:, None] / 2
        points = (angles[:-1, None] + half) + half * self._nodes
        mass = self._scale * (half * self._weights * np.cos(points) ** (self._dimension - 2)).sum(axis=1)
        ends = np.cos(angles) ** (self._dimension - 1)
        return mass / mass.sum(), -self._scale * self.half_width / (self._dimension - 1) * np.diff(ends)


def _midpoints(levels: DoubleArray) -> DoubleArray:
    return (levels[1:] + levels[:-1]) / 2


def _solve(law: _Law, count: int) -> DoubleArray:
    """Levels that are the centroids of their cells, to rounding: Newton's steps, Lloyd's where one leads nowhere."""
    levels = _start(law, count)
    for _ in range(_MOST_STEPS):
        moved = _improved(law, levels)
        moved = (moved - moved[::-1]) / 2
        change = float(np.abs(moved - levels).max())
        levels = moved
        if change < 1e-13:
            break
    return levels


def _improved(law: _Law, levels: DoubleArray) -> DoubleArray:
    """Levels after the longest of Newton's step, its half, ... that keeps them in order and does no harm."""
    step, before = _newton_step(law, levels), _distortion(law, levels)
    for halvings in range(6):
        moved: DoubleArray = levels + step / 2**halvings
        in_order = bool(np.all(np.diff(moved) > 0)) and abs(moved[-1]) < law.half_width
        if in_order and _distortion(law, moved) <= before + 1e-16:
            return moved
    mass, moment = law.cells(_midpoints(levels))
    centroids: DoubleArray = moment / mass
    return centroids


def _distortion(law: _Law, levels: DoubleArray) -> float:
    mass, moment = law.cells(_midpoints(levels))
    return float(1.0 + (levels * (levels * mass - 2.0 * moment)).sum())


def _newton_step(law: _Law, levels: DoubleArray) -> DoubleArray:
    """Newton's step for ``moment - level * mass = 0`` in every cell; a threshold moves by half of what a level does."""
    thresholds = _midpoints(levels)
    mass, moment = law.cells(thresholds)
    height = law.density(thresholds)
    right = 0.5 * height * (thresholds - levels[:-1])
    left = 0.5 * height * (levels[1:] - thresholds)
    slope = np.diag(-mass)
    lower, upper = np.arange(len(thresholds)), np.arange(1, len(levels))
    slope[lower, lower] += right
    slope[lower, upper] += right
    slope[upper, upper] += left
    slope[upper, lower] += left
    return np.linalg.solve(slope, levels * mass - moment).astype(np.float64)


def _start(law: _Law, count: int) -> DoubleArray:
    """Levels as dense as the cube root of the density, which is right for many levels (Panter and Dite 1951)."""
    grid = np.linspace(-law.half_width, law.half_width, 20_001)
    weight = np.cumsum(law.density(grid) ** (1 / 3))
    weight = (weight - weight[0]) / (weight[-1] - weight[0])
    return np.interp((np.arange(count) + 0.5) / count, weight, grid)
