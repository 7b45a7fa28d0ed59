"""How many equal steps fill a stretch of time, on the integer clock."""

from __future__ import annotations

import math

from kvsim.sim.arrivals import NEVER


def steps_to_cover(gap: int, first: int, slope: int) -> tuple[int, int]:
    """Smallest k >= 1 with k·first + slope·k·(k-1)/2 >= gap, and that sum, all in ticks."""
    if slope:
        linear = first - slope / 2
        steps = max(1, math.ceil((math.sqrt(linear * linear + 2.0 * slope * gap) - linear) / slope))
    else:
        steps = max(1, -(-gap // first))
    total = steps * first + slope * (steps * (steps - 1) // 2)
    while total < gap:
        total += first + slope * steps
        steps += 1
    while steps > 1 and total - first - slope * (steps - 1) >= gap:
        steps -= 1
        total -= first + slope * steps
    return steps, total


def steps_within(room: int, slope: int) -> int:
    """Steps whose growth of ``slope`` each stays within ``room`` of the first; one where they shrink."""
    if slope > 0:
        return room // slope + 1
    return 1 if slope else NEVER
