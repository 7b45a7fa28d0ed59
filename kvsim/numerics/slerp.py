"""Directions on the sphere, the angle between them and the great circle that joins them; fp64 inside."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import DoubleArray

_PARALLEL = 1e-6
"""Sine of an angle below which the chord stands for the arc."""


def unit(vectors: NDArray[Any]) -> tuple[DoubleArray, DoubleArray]:
    """Give directions, (..., D), and lengths, (...); a zero vector has the zero direction."""
    wide = vectors.astype(np.float64)
    lengths: DoubleArray = np.sqrt((wide**2).sum(axis=-1))
    return wide / np.where(lengths > 0, lengths, 1.0)[..., None], lengths


def angles(first: DoubleArray, second: DoubleArray) -> DoubleArray:
    """Angle between unit vectors, (...), from 0 to pi."""
    between: DoubleArray = np.arccos(np.clip((first * second).sum(axis=-1), -1.0, 1.0))
    return between


def slerp(first: DoubleArray, second: DoubleArray, weight: float) -> DoubleArray:
    """Point at ``weight`` of the way from the first to the second unit vector along the great circle.

    Vectors that are parallel take the chord, brought back to length one. Opposite ones have no shortest way; they give
    the nearer end, the first one at the middle.
    """
    angle = angles(first, second)[..., None]
    sine = np.sin(angle)
    is_plain = sine > _PARALLEL
    safe = np.where(is_plain, sine, 1.0)
    one = np.where(is_plain, np.sin((1.0 - weight) * angle) / safe, 1.0 - weight)
    other = np.where(is_plain, np.sin(weight * angle) / safe, weight)
    is_opposite = (first * second).sum(axis=-1, keepdims=True) < 0
    opposite = first if weight <= 0.5 else second
    return unit(np.where(~is_plain & is_opposite, opposite, one * first + other * second))[0]
