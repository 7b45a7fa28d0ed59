"""Whole numbers with a given sum, as near to given shares as limits allow."""

from __future__ import annotations

import numpy as np

from kvsim.numerics.arrays import DoubleArray, IntArray

_LEAST_SHARE = 1e-9
"""Of the largest one: smaller shares count as this, so that they still take what nobody else can."""
_BISECTIONS = 200


def share_out(shares: DoubleArray, total: int, least: int, most: int) -> IntArray:
    """Divide ``total`` in proportion to ``shares``, (L,) >= 0, ``least`` to ``most`` each; what is cut off moves on.

    ``total`` lies between L least and L most. What rounding down leaves goes to the largest remainders, the first of
    equals first.
    """
    wanted = _within(shares, float(total), float(least), float(most))
    whole = np.clip(np.floor(wanted + 1e-6), least, most).astype(np.int64)
    order = np.argsort(-(wanted - whole), kind="stable")
    order = order[whole[order] < most]
    whole[order[: total - int(whole.sum())]] += 1
    return whole


def _within(shares: DoubleArray, total: float, least: float, most: float) -> DoubleArray:
    """clip(c · share, least, most) for the factor c at which they add up to ``total``, found by bisection."""
    largest = float(shares.max())
    positive = np.maximum(shares / largest, _LEAST_SHARE) if largest > 0 else np.ones_like(shares)
    low, high = 0.0, most / float(positive.min())
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if np.clip(middle * positive, least, most).sum() < total:
            low = middle
        else:
            high = middle
    found: DoubleArray = np.clip(high * positive, least, most)
    return found
