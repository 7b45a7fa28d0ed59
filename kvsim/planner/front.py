"""The Pareto set, exactly, with unknown values in their place.

One point dominates another when it is no worse on any axis and better on one. What is unknown cannot be better:

- A point whose risk is unknown dominates only points of its own strategy, whose risk is the same whatever it is. A
  known risk is no worse than an unknown one.
- Points whose price or energy is unknown are compared on that axis with points of the same device alone, by device
  seconds per token, and with no other point at all.

Both keep dominance transitive, so every dominated point is dominated by one of the set.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_POINTS = 512
"""Points that are compared with the set at once."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A point as dominance sees it."""

    costs: tuple[float, ...]
    """The less, the better; a point with another ``world`` has other axes."""
    risk: float | None
    strategy: Hashable
    """Points with the same value have the same risk, known or not."""
    world: Hashable = None
    """Points of different worlds are not compared."""


def pareto(points: Sequence[Standing]) -> tuple[int, ...]:
    """Indices of points that no other dominates, ascending; equal points are all there."""
    worlds: dict[Hashable, list[int]] = {}
    for index, point in enumerate(points):
        worlds.setdefault(point.world, []).append(index)
    kept = [index for members in worlds.values() for index in _front(points, members)]
    return tuple(sorted(kept))


def dominates(one: Standing, other: Standing) -> bool:
    """Whether ``one`` dominates ``other``: the definition, for a pair."""
    if one.world != other.world or (one.risk is None and one.strategy != other.strategy):
        return False
    mine, theirs = _row(one), _row(other)
    return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs


def _row(point: Standing) -> tuple[float, ...]:
    return (*point.costs, np.inf if point.risk is None else point.risk)


def _front(points: Sequence[Standing], members: list[int]) -> list[int]:
    """Sort by all axes, so that no point is dominated by a later one, then hold blocks against the set so far."""
    rows = np.array([_row(points[index]) for index in members], dtype=np.float64)
    codes = {strategy: code for code, strategy in enumerate(dict.fromkeys(points[i].strategy for i in members))}
    strategy = np.array([codes[points[index].strategy] for index in members])
    order = np.lexsort(rows.T[::-1])
    kept = np.empty(0, dtype=np.intp)
    for start in range(0, len(order), BLOCK_POINTS):
        block = order[start : start + BLOCK_POINTS]
        block = block[~_dominated(rows, strategy, kept, block)]
        block = block[~_dominated(rows, strategy, block, block)]
        kept = np.concatenate((kept, block))
    return [members[index] for index in kept]


def _dominated(
    rows: NDArray[np.float64], strategy: NDArray[np.intp], by: NDArray[np.intp], points: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Which of ``points`` one of ``by`` dominates."""
    if not len(by) or not len(points):
        return np.zeros(len(points), dtype=bool)
    mine, theirs = rows[by][:, None, :], rows[points][None, :, :]
    no_worse = (mine <= theirs).all(axis=2) & (mine < theirs).any(axis=2)
    may = np.isfinite(rows[by][:, -1])[:, None] | (strategy[by][:, None] == strategy[points][None, :])
    found: NDArray[np.bool_] = (no_worse & may).any(axis=0)
    return found


def spread_out(points: Sequence[Standing], count: int) -> tuple[int, ...]:
    """Choose ``count`` points that differ most: the best on each axis, then always the one farthest from all chosen.

    Distances are of ranks on each axis, so that no unit weighs more than another. Ties go to the earlier point.
    """
    if not points:
        return ()
    rows = _ranks(points)
    chosen: list[int] = []
    for axis in range(rows.shape[1]):
        best = min(range(len(points)), key=lambda index: (rows[index, axis], rows[index].sum(), index))
        if best not in chosen:
            chosen.append(best)
    distance = np.min([np.abs(rows - rows[index]).sum(axis=1) for index in chosen], axis=0)
    while len(chosen) < min(count, len(points)):
        distance[chosen] = -1.0
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.abs(rows - rows[chosen[-1]]).sum(axis=1))
    return tuple(chosen[:count])


def _ranks(points: Sequence[Standing]) -> NDArray[np.float64]:
    """Rank of each point on each axis, from 0 for the best to 1."""
    width = max(len(point.costs) for point in points)
    table = np.full((len(points), width + 1), np.inf)
    for index, point in enumerate(points):
        table[index, : len(point.costs)] = point.costs
        table[index, -1] = np.inf if point.risk is None else point.risk
    ranks = np.empty_like(table)
    for axis in range(width + 1):
        _, places = np.unique(table[:, axis], return_inverse=True)
        ranks[:, axis] = places / max(1, places.max())
    return ranks
