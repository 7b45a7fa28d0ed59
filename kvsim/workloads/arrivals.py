"""Arrival processes: when requests (or first turns of sessions) come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvsim.errors import InvalidSpec
from kvsim.requests import UNSCHEDULED, IntArray
from kvsim.specs.workload import (
    BurstArrivals,
    ConcurrencyArrivals,
    ConstantArrivals,
    GammaArrivals,
    PoissonArrivals,
    ReplayArrivals,
)
from kvsim.traces.rows import FloatArray
from kvsim.units import TICKS_PER_SECOND, seconds_to_ticks

OpenArrivals = PoissonArrivals | GammaArrivals | ConstantArrivals
GeneratedArrivals = OpenArrivals | ConcurrencyArrivals | BurstArrivals
AnyArrivals = GeneratedArrivals | ReplayArrivals

MAX_CLOCK_S: Final = np.iinfo(np.int64).max // TICKS_PER_SECOND
"""About 106 days: what 64 bits of picoseconds hold."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """When each of ``count`` items comes; arrays have shape (count,)."""

    arrival_ticks: IntArray
    parent: IntArray
    """Item whose end releases this one, or -1."""
    delay_ticks: IntArray


def to_ticks(seconds: FloatArray, what: str) -> IntArray:
    """Round times to the clock's picoseconds; raise InvalidSpec where they pass MAX_CLOCK_S."""
    if len(seconds) and not float(seconds.max()) < MAX_CLOCK_S:
        msg = (
            f"workload: {what} reach {float(seconds.max()):.4g} s; the clock holds at most {MAX_CLOCK_S} s (106 days); "
            "take fewer requests or a higher rate or speedup"
        )
        raise InvalidSpec(msg)
    return np.rint(seconds * TICKS_PER_SECOND).astype(np.int64)


def scheduled(arrival_s: FloatArray) -> Schedule:
    """Schedule of items that come at given times."""
    count = len(arrival_s)
    ticks = to_ticks(arrival_s, "arrivals")
    return Schedule(ticks, np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.int64))


def generate(
    arrivals: GeneratedArrivals, count: int, rng: np.random.Generator, *, items_per_request: float
) -> Schedule:
    """Schedule of ``count`` items; ``items_per_request`` scales the rate (sessions hold several requests).

    A true closed loop lets whichever client is free first send next. Here each client keeps its own chain: item i
    follows item i - max_concurrency. The number in flight is the same; which lengths meet in a batch is fixed by the
    seed and not by the strategy's speed, so strategies stay comparable.
    """
    if isinstance(arrivals, BurstArrivals):
        return scheduled(np.zeros(count))
    if isinstance(arrivals, ConcurrencyArrivals):
        return _closed_loop(arrivals, count)
    return scheduled(_open_arrival_s(arrivals, count, rng, arrivals.request_rate * items_per_request))


def _closed_loop(arrivals: ConcurrencyArrivals, count: int) -> Schedule:
    items = np.arange(count, dtype=np.int64)
    follows = items >= arrivals.max_concurrency
    to_ticks(np.array([arrivals.think_time_s]), "think times")
    return Schedule(
        arrival_ticks=np.where(follows, UNSCHEDULED, 0),
        parent=np.where(follows, items - arrivals.max_concurrency, -1),
        delay_ticks=np.where(follows, seconds_to_ticks(arrivals.think_time_s), 0),
    )


def _open_arrival_s(arrivals: OpenArrivals, count: int, rng: np.random.Generator, rate: float) -> FloatArray:
    """Arrival times in seconds; random processes start with a gap, the constant one at 0.

    Gamma gaps have shape ``burstiness`` and mean 1/rate (``vllm bench serve --burstiness``; vLLM then also rescales
    the gaps to their exact mean, which is left out here).
    """
    with np.errstate(over="ignore", divide="ignore"):
        if isinstance(arrivals, ConstantArrivals):
            return np.arange(count, dtype=np.float64) / rate
        shape = arrivals.burstiness if isinstance(arrivals, GammaArrivals) else 1.0
        gaps = rng.standard_gamma(shape, size=count) / shape / rate
        return np.cumsum(gaps)
