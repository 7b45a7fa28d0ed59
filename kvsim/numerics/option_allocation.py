"""Choose one option for each of several components so that the sum of their errors is least at a fixed total cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import DoubleArray

_NONE: Final = -1


def allocate_options(
    costs: NDArray[np.int64], errors: DoubleArray, budget: int, *, exactly: bool = True
) -> tuple[int, ...]:
    """Option of each component that minimises the total error, by dynamic programming over the cost so far.

    This is the multiple-choice knapsack problem, solved exactly: errors may have any shape, where the convex hull and a
    greedy walk along it would find the best only if each further unit gained less than the one before.

    Parameters
    ----------
    costs : (O,)
        Of each option, the same for every component.
    errors : (C, O)
        Of each option in each component; inf rules an option out.
    budget : int
        What all components may cost.
    exactly : bool
        Spend the whole budget. Measured errors may rise with cost, so this need not be the same.

    Returns
    -------
    (C,)
        Indices of options; of equally good choices one of least cost, and then the earlier option.

    Raises
    ------
    ValueError
        A cost is negative, or nothing fits the budget.
    """
    if costs.size and int(costs.min()) < 0:
        msg = f"an option costs {int(costs.min())}; costs are 0 or more"
        raise ValueError(msg)
    best = np.full(max(budget, -1) + 1, np.inf)
    best[:1] = 0.0
    chosen = np.full((len(errors), len(best)), _NONE, dtype=np.int64)
    for component, row in enumerate(errors):
        best, chosen[component] = _extend(best, costs, row)
    left = budget if exactly else int(np.argmin(best)) if best.size else 0
    if not best.size or not np.isfinite(best[left]):
        spent = "exactly" if exactly else "at most"
        msg = f"no choice of options for {len(errors)} components costs {spent} {budget}"
        raise ValueError(msg)
    return _walk_back(chosen, costs, left)


def _extend(
    best: DoubleArray, costs: Sequence[int] | NDArray[np.int64], errors: DoubleArray
) -> tuple[DoubleArray, NDArray[np.int64]]:
    """Least error with one more component, for every cost, and the option that it gets."""
    total = np.full(len(best), np.inf)
    chosen = np.full(len(best), _NONE, dtype=np.int64)
    for option, (cost, error) in enumerate(zip(costs, errors, strict=True)):
        if cost >= len(best):
            continue
        other = best[: len(best) - cost] + error
        better = other < total[cost:]
        total[cost:][better], chosen[cost:][better] = other[better], option
    return total, chosen


def _walk_back(chosen: NDArray[np.int64], costs: NDArray[np.int64], left: int) -> tuple[int, ...]:
    found: list[int] = []
    for row in chosen[::-1]:
        found.append(int(row[left]))
        left -= int(costs[found[-1]])
    return tuple(reversed(found))
