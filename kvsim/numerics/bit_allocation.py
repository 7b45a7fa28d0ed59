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


def water_fill(variances: DoubleArray, mean_bits: float) -> DoubleArray:
    """Bits of reverse water-filling, ``max(0, log2(variance / level) / 2)``, that are ``mean_bits`` on average.

    Cover and Thomas, Elements of Information Theory, theorem 10.3.3. What whole bits can at best come near.
    """
    spread = np.sort(variances[variances > 0])[::-1]
    if not len(spread) or mean_bits <= 0:
        return np.zeros(len(variances))
    logs, total = np.log2(spread), 2.0 * mean_bits * len(variances)
    # With k components above water, their logs' sum - k * level = total; the right k leaves the next one under water.
    levels = (np.cumsum(logs) - total) / np.arange(1, len(spread) + 1)
    level = levels[np.flatnonzero(levels < logs)[-1]]
    with np.errstate(divide="ignore"):
        return np.asarray(np.maximum(0.0, 0.5 * (np.log2(variances) - level)), dtype=np.float64)
