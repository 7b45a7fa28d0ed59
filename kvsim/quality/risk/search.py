"""The fewest entries at which an error is small enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

RESOLUTION: Final = 1.02
"""Ratio of a number that is enough to one that is not, where a search over measured errors ends."""


def fewest(is_enough: Callable[[int], bool], most: int, resolution: float = 1.0) -> int:
    """Bisect for the fewest of 1 to ``most``, which is enough by definition, at which ``is_enough``.

    By ratios where ``resolution`` > 1: it ends once the next lower number tried is as near. Where ``is_enough`` is not
    monotone, what is found is enough, and a smaller one may be too.
    """
    low, high = 0, most
    while high - low > 1 and high > resolution * low:
        middle = (
            (low + high) // 2 if resolution == 1.0 else max(low + 1, min(high - 1, round((max(low, 1) * high) ** 0.5)))
        )
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high
