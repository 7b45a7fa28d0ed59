"""k-means of plain numbers: the codebook that a sample, and no law, asks for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import DoubleArray


def kmeans_levels(values: NDArray[np.float32], count: int, steps: int = 100) -> DoubleArray:
    """Find ``count`` ascending levels near which the values lie, by Lloyd's algorithm from their quantiles.

    A level whose cell holds no value stays where it is. The result is a local optimum, the same every time.

    Raises
    ------
    ValueError
        There are no values.
    """
    ordered = np.sort(values, axis=None).astype(np.float64)
    if not ordered.size:
        msg = "k-means needs values"
        raise ValueError(msg)
    sums = np.concatenate(([0.0], np.cumsum(ordered)))
    levels = np.quantile(ordered, (np.arange(count) + 0.5) / count)
    for _ in range(steps):
        ends = np.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
        edges = np.concatenate(([0], ends, [ordered.size]))
        held = np.diff(edges)
        moved = np.where(held > 0, np.diff(sums[edges]) / np.maximum(held, 1), levels)
        if np.array_equal(moved, levels):
            break
        levels = moved
    return levels
