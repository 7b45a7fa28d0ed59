"""Distributions of a run: latencies of requests, and the pooled gaps between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvsim.report import Figure
from kvsim.specs.base import Basis

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
QUANTILES = (0.5, 0.9, 0.95, 0.99)
MIN_SAMPLES_FOR_P99 = 100
EXPANDED_STEPS = 5_000_000
"""Above this many steps a run stands as two points with its mean and spread instead of step by step."""


def spread(values: Sequence[float], basis: Basis | None) -> Figure:
    """Figure of one number over priced edges: the first, central value, and the span of all where there are several."""
    if len(values) == 1:
        return Figure(value=values[0], basis=basis)
    return Figure(value=values[0], low=min(values), high=max(values), basis=basis)


@dataclass(frozen=True)
class Distribution:
    """Moments and quantiles in seconds; None where there are too few samples."""

    count: int
    mean_s: float | None
    std_s: float | None
    median_s: float | None
    p90_s: float | None
    p95_s: float | None
    p99_s: float | None


EMPTY = Distribution(0, None, None, None, None, None, None)


def of_samples(samples_s: FloatArray) -> Distribution:
    """Distribution of equally weighted samples, quantiles by linear interpolation."""
    if not len(samples_s):
        return EMPTY
    median, p90, p95, p99 = np.quantile(samples_s, QUANTILES)
    enough = len(samples_s) >= MIN_SAMPLES_FOR_P99
    return Distribution(
        len(samples_s),
        float(samples_s.mean()),
        float(samples_s.std()),
        float(median),
        float(p90),
        float(p95),
        float(p99) if enough else None,
    )


def of_gaps(runs: npt.ArrayLike, gaps_ticks: list[int], ticks_per_second: int) -> Distribution:
    """Pooled inter-token gaps of ``runs``, shape (runs, 4): each step of a run counts once per sequence.

    Quantiles interpolate linearly between order statistics of the pooled sample, as numpy does.
    """
    values, weights = _expand(np.asarray(runs, dtype=np.int64).reshape(-1, 4), gaps_ticks)
    count = int(weights.sum())
    if count == 0:
        return EMPTY
    values, weights = _in_order(values, weights)
    values, cumulative = values / ticks_per_second, np.cumsum(weights)
    mean = float((values * weights).sum() / count)
    variance = float((weights * (values - mean) ** 2).sum() / count)
    median, p90, p95, p99 = (_weighted_quantile(values, cumulative, q) for q in QUANTILES)
    return Distribution(count, mean, variance**0.5, median, p90, p95, p99 if count >= MIN_SAMPLES_FOR_P99 else None)


def _in_order(values: FloatArray, weights: IntArray) -> tuple[FloatArray, IntArray]:
    """Sort by value. Whole ticks and their weights fit one integer, which sorts ten times as fast as indices."""
    bits = int(weights.max()).bit_length()
    whole = values.astype(np.int64)
    if (whole == values).all() and int(whole.max()) >> (62 - bits) == 0:
        packed = np.sort(whole << bits | weights)
        return (packed >> bits).astype(np.float64), packed & ((1 << bits) - 1)
    order = np.argsort(values)
    return values[order], weights[order]


def _expand(runs: IntArray, gaps_ticks: list[int]) -> tuple[FloatArray, IntArray]:
    steps = runs[:, 0]
    sequences, first, slope = (runs[:, column].astype(np.float64) for column in (1, 2, 3))
    if int(steps.sum()) > EXPANDED_STEPS:
        # A run's gaps rise evenly: two points one standard deviation beside their mean keep both (one gap in an odd
        # count goes to the upper point).
        middle = first + slope * (steps - 1) / 2
        spread = slope * np.sqrt((steps.astype(np.float64) ** 2 - 1) / 12)
        gaps = steps * sequences
        values = np.concatenate([middle - spread, middle + spread])
        weights = np.concatenate([np.floor(gaps / 2), gaps - np.floor(gaps / 2)])
    else:
        offsets = np.arange(int(steps.sum())) - np.repeat(np.cumsum(steps) - steps, steps)
        values = np.repeat(first, steps) + np.repeat(slope, steps) * offsets
        weights = np.repeat(sequences, steps)
    values = np.concatenate([values, np.asarray(gaps_ticks, dtype=np.float64)])
    weights = np.concatenate([weights, np.ones(len(gaps_ticks))])
    return values, weights.astype(np.int64)


def _weighted_quantile(values: FloatArray, cumulative: IntArray, quantile: float) -> float:
    rank = quantile * (int(cumulative[-1]) - 1)
    below = int(np.floor(rank))
    low = float(values[int(np.searchsorted(cumulative, below + 1))])
    high = float(values[min(int(np.searchsorted(cumulative, below + 2)), len(values) - 1)])
    return low + (high - low) * (rank - below)
