"""Clusters of equal weight, by halving along the widest direction."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import DoubleArray, IntArray

POWER_STEPS: Final = 6
"""Products with the covariance that look for the widest direction."""


def balanced_clusters(features: DoubleArray, sizes: DoubleArray, count: int) -> IntArray:
    """Put points (n, F) with ``sizes``, (n,), into ``count`` clusters of nearly equal size; labels (n,).

    A node of k clusters is cut across its widest direction where its lower part holds k // 2 of its k shares. Equal
    sizes give clusters that differ by a point or so at most per level; no cluster is empty. Points keep their labels
    when all are put in another order, but for ties.

    Raises
    ------
    ValueError
        There are fewer points than clusters, or no cluster.
    """
    if not 1 <= count <= len(features):
        msg = f"{len(features)} points do not fill {count} clusters"
        raise ValueError(msg)
    labels = np.empty(len(features), dtype=np.int64)
    waiting: list[tuple[IntArray, int, int]] = [(np.arange(len(features)), 0, count)]
    while waiting:
        members, first, shares = waiting.pop()
        if shares == 1:
            labels[members] = first
        elif shares == len(members):
            labels[members] = first + np.arange(shares)
        else:
            lower = shares // 2
            order = members[_along_widest(features[members])]
            cut = _cut(sizes[order], lower, shares)
            waiting.append((order[:cut], first, lower))
            waiting.append((order[cut:], first + lower, shares - lower))
    return labels


def _along_widest(points: DoubleArray) -> IntArray:
    """Order of points along their first principal direction, found by power iteration from the outermost one."""
    centred = points - points.mean(axis=0)
    direction = centred[(centred**2).sum(axis=1).argmax()]
    for _ in range(POWER_STEPS):
        length = np.linalg.norm(direction)
        if length == 0.0:
            break
        direction = (centred @ (direction / length)) @ centred
    return np.asarray(np.argsort(centred @ direction, kind="stable"))


def _cut(sizes: DoubleArray, lower: int, shares: int) -> int:
    """How many points go below: those that hold lower / shares of the size, and enough for either side."""
    filled = np.cumsum(sizes)
    wanted = filled[-1] * lower / shares
    cut = int(np.searchsorted(filled, wanted - 0.5 * sizes.mean(), side="left")) + 1
    return max(lower, min(len(sizes) - (shares - lower), cut))


def add_up(labels: IntArray, rows: NDArray[np.float64], count: int) -> DoubleArray:
    """Sum rows, (n,) or (n, F), by label: (count,) or (count, F)."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(count))
    return np.asarray(np.add.reduceat(rows[order], starts, axis=0))
