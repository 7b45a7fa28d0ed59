"""Distributions against numpy on the fully expanded sample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim import statistics
from kvsim.statistics import MIN_SAMPLES_FOR_P99, QUANTILES, Distribution, of_gaps, of_samples

RUNS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 9), st.integers(1, 10**12), st.integers(0, 10**7)), max_size=12
)
GAPS = st.lists(st.integers(1, 10**13), max_size=20)
Run = tuple[int, int, int, int]


def expanded(runs: list[Run], gaps: list[int]) -> np.ndarray:
    values = [first + slope * step for steps, size, first, slope in runs for step in range(steps) for _ in range(size)]
    return np.array(values + gaps, dtype=np.float64)


def quantiles_of(one: Distribution) -> list[float | None]:
    return [one.median_s, one.p90_s, one.p95_s, one.p99_s]


@given(runs=RUNS, gaps=GAPS)
@settings(max_examples=200, deadline=None)
def test_gaps_equal_numpy_on_the_pooled_sample(runs: list[Run], gaps: list[int]) -> None:
    pooled = expanded(runs, gaps) / 1e12
    found = of_gaps(runs, gaps, 10**12)
    assert found.count == len(pooled)
    if not len(pooled):
        assert found == statistics.EMPTY
        return
    assert found.mean_s == pytest.approx(pooled.mean(), rel=1e-9)
    assert found.std_s == pytest.approx(pooled.std(), rel=1e-6, abs=1e-9 * pooled.max())
    wanted = np.quantile(pooled, QUANTILES)
    for got, expected in zip(quantiles_of(found), wanted, strict=True):
        if got is None:
            assert len(pooled) < MIN_SAMPLES_FOR_P99
        else:
            assert got == pytest.approx(expected, rel=1e-9)


@given(samples=st.lists(st.floats(0, 1e6), min_size=1, max_size=250))
@settings(deadline=None)
def test_samples_equal_numpy(samples: list[float]) -> None:
    values = np.array(samples)
    found = of_samples(values)
    assert (found.count, found.mean_s, found.std_s) == (len(values), values.mean(), values.std())
    assert quantiles_of(found)[:3] == np.quantile(values, QUANTILES[:3]).tolist()


@pytest.mark.parametrize(("count", "known"), [(99, False), (100, True)])
def test_p99_needs_a_hundred_samples(count: int, known: bool) -> None:
    """Under 100 samples p99 is the largest or near it: one unlucky request, not a property of the system."""
    assert (of_samples(np.arange(count, dtype=np.float64)).p99_s is not None) is known
    assert (of_gaps([(count, 1, 5, 1)], [], 10**12).p99_s is not None) is known


def test_no_samples_are_unknown_and_not_zero() -> None:
    assert of_samples(np.array([])) == of_gaps([], [], 10**12) == Distribution(0, *(None,) * 6)


def test_very_long_runs_keep_their_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond EXPANDED_STEPS a run stands as two points; runs of rising steps move the figures by under a percent."""
    rng = np.random.default_rng(3)
    runs = [(int(s), int(n), 5_000_000_000, 40_000) for s, n in zip(*rng.integers(1, 200, (2, 400)), strict=True)]
    exact = of_gaps(runs, [], 10**12)
    monkeypatch.setattr(statistics, "EXPANDED_STEPS", 10)
    coarse = of_gaps(runs, [], 10**12)
    assert coarse.count == exact.count
    for field in ("mean_s", "median_s", "p90_s", "p95_s", "p99_s"):
        assert getattr(coarse, field) == pytest.approx(getattr(exact, field), rel=1e-3)
