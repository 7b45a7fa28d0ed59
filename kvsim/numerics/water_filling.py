"""Widths in bits of many entries so that the sum of their errors is least for what they cost: reverse water-filling."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import DoubleArray


def allocate_widths(errors: DoubleArray, costs: DoubleArray, budget: float) -> NDArray[np.int64]:
    """Choose a width for each entry under a budget for all.

    The continuous rule gives each component bits until its error falls to one water level. Among a few widths it
    becomes: walk down each entry's lower convex hull of error over cost, and of all these steps take the steepest first
    until one does not fit. No choice of widths that costs as much has a smaller error; what is left of the budget is
    less than that step.

    Parameters
    ----------
    errors : (N, W)
        Error of each entry at each width; any shape, and widths that are no better than cheaper ones are passed over.
    costs : (W,)
        What an entry costs at each width, ascending.
    budget : float
        At least N x the first cost.

    Returns
    -------
    (N,)
        Index of the width of each entry. Of equal steps the earlier entry's comes first.

    Raises
    ------
    ValueError
        Costs do not ascend, or the budget does not even hold the first width everywhere.
    """
    count = len(errors)
    if (np.diff(costs) <= 0).any():
        msg = f"costs must ascend: {costs.tolist()}"
        raise ValueError(msg)
    if budget < count * costs[0]:
        msg = f"a budget of {budget:g} is less than {count} entries at {costs[0]:g} each"
        raise ValueError(msg)
    chosen = np.zeros(count, dtype=np.int64)
    entries, targets, slopes = _hull_steps(errors, costs)
    # Slopes fall along a hull, so a stable sort keeps the steps of an entry in order.
    order = np.argsort(-slopes, kind="stable")
    entries, targets = entries[order], targets[order]
    extra = costs[targets] - costs[_starts(entries, targets)]
    fits = count * costs[0] + np.cumsum(extra) <= budget
    taken = len(fits) if fits.all() else int(np.argmin(fits))
    np.maximum.at(chosen, entries[:taken], targets[:taken])
    return chosen


def _hull_steps(errors: DoubleArray, costs: DoubleArray) -> tuple[NDArray[np.int64], NDArray[np.int64], DoubleArray]:
    """Steps down the hulls, entry by entry: (entry, width stepped to, error saved per cost)."""
    rows = np.arange(len(errors))
    at = np.zeros(len(errors), dtype=np.int64)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], DoubleArray]] = []
    for _ in range(len(costs) - 1):
        ahead = np.arange(len(costs)) > at[:, None]
        span = np.where(ahead, costs - costs[at][:, None], 1.0)
        slope = np.where(ahead, (errors[rows, at][:, None] - errors) / span, -np.inf)
        # Of equally steep ones the farthest: the hull has no corner between.
        best = len(costs) - 1 - np.argmax(slope[:, ::-1], axis=1)
        steep = slope[rows, best]
        moves = steep > 0
        found.append((rows[moves], best[moves], steep[moves]))
        at = np.where(moves, best, at)
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    entries, targets, slopes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return entries, targets, slopes


def _starts(entries: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Width that each step starts from: where the entry's step before it ended, the first width at first."""
    order = np.lexsort((targets, entries))
    before = np.zeros(len(entries), dtype=np.int64)
    same = np.flatnonzero(entries[order][1:] == entries[order][:-1]) + 1 if len(entries) else np.zeros(0, np.int64)
    before[order[same]] = targets[order[same - 1]]
    return before
