"""Split a bit budget among components so that the sum of their errors is least."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import DoubleArray


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
