"""Split a bit budget among components so that the sum of their errors is least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import DoubleArray


@dataclass(frozen=True)
class Segment:
    """One way to store the components from ``start`` up to ``stop``.

    Attributes
    ----------
    width : int
        Bits of each component; 0 drops them.
    cost : int
        Bits in all, with what the components share.
    error : float
    """

    start: int
    stop: int
    width: int
    cost: int
    error: float


def allocate_bits(errors: DoubleArray, budget: int) -> NDArray[np.int64]:
    """Bits per component that minimise the total error under a budget, by dynamic programming.

    Parameters
    ----------
    errors : (C, B + 1)
        Error of each component at 0 to B bits. It may have any shape: where each further bit gains less than the
        one before, giving every bit to the largest gain finds the same; measured errors need not be like that.
    budget : int
        Most bits in all.

    Returns
    -------
    (C,)
        Among equally good splits one with the fewest bits.

    Raises
    ------
    ValueError
        The budget is negative.
    """
    if budget < 0:
        msg = f"a budget of {budget} bits is negative"
        raise ValueError(msg)
    count, choices = errors.shape
    budget = min(budget, count * (choices - 1))
    best = np.zeros(budget + 1)
    chosen = np.zeros((count, budget + 1), dtype=np.int8)
    for component in range(count):
        best, chosen[component] = _extend(best, errors[component])
    bits = np.zeros(count, dtype=np.int64)
    left = int(np.argmin(best))
    for component in range(count - 1, -1, -1):
        bits[component] = chosen[component, left]
        left -= int(bits[component])
    return bits


def _extend(best: DoubleArray, errors: DoubleArray) -> tuple[DoubleArray, NDArray[np.int8]]:
    """Least error with one more component, for every number of bits spent, and the bits that it gets."""
    total = best + errors[0]
    chosen = np.zeros(len(best), dtype=np.int8)
    for bits in range(1, min(len(errors), len(best))):
        other = np.full(len(best), np.inf)
        other[bits:] = best[:-bits] + errors[bits]
        better = other < total
        total[better], chosen[better] = other[better], bits
    return total, chosen


def allocate_segments(count: int, segments: Sequence[Segment], budget: int) -> tuple[Segment, ...]:
    """Segments, end to end over components 0 to ``count``, of least total error under a budget.

    Dynamic programming over the end of the last segment and the bits spent: what follows does not depend on how the
    components before were cut, so the best cut up to ``stop`` ends in one segment after the best cut up to its start.

    Returns
    -------
    tuple of Segment
        In order; among equally good cuts one of least cost.

    Raises
    ------
    ValueError
        The budget is negative, or no cut of these segments covers all components within it.
    """
    if budget < 0:
        msg = f"a budget of {budget} bits is negative"
        raise ValueError(msg)
    best = {0: np.zeros(budget + 1)}
    chosen: dict[int, NDArray[np.int64]] = {}
    for index in sorted(range(len(segments)), key=lambda one: (segments[one].stop, segments[one].cost)):
        one = segments[index]
        if one.start not in best or one.cost > budget:
            continue
        total = best.setdefault(one.stop, np.full(budget + 1, np.inf))[one.cost :]
        taken = chosen.setdefault(one.stop, np.full(budget + 1, -1, dtype=np.int64))[one.cost :]
        other = best[one.start][: len(total)] + one.error
        better = other < total
        total[better], taken[better] = other[better], index
    if not np.isfinite(best.get(count, np.array([np.inf]))).any():
        msg = f"no segments cover {count} components within {budget} bits"
        raise ValueError(msg)
    found, left, end = [], int(np.argmin(best[count])), count
    while end:
        one = segments[chosen[end][left]]
        found.append(one)
        end, left = one.start, left - one.cost
    return tuple(reversed(found))
