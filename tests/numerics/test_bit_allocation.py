"""Splitting bits: the least error that any split has, and reverse water-filling but for whole bits."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvsim.limit.rate_distortion import Spectrum
from kvsim.numerics.bit_allocation import Segment, allocate_bits, allocate_segments

VARIANCES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=24).map(np.array)


def _errors(variances: np.ndarray, max_bits: int = 8) -> np.ndarray:
    return variances[:, None] * 4.0 ** -np.arange(max_bits + 1)


def _water_fill(variances: np.ndarray, budget: float) -> np.ndarray:
    """Bits of each component, ``max(0, log2(variance / level) / 2)``, with the level found by halving."""
    logs = np.log2(variances)
    low, high = logs.min() - 2.0 * budget, logs.max()
    for _ in range(80):
        middle = (low + high) / 2
        is_over = np.maximum(0.0, 0.5 * (logs - middle)).sum() > budget
        low, high = (middle, high) if is_over else (low, middle)
    return np.maximum(0.0, 0.5 * (logs - high))


@given(
    errors=arrays(np.float64, st.tuples(st.integers(1, 4), st.just(4)), elements=st.floats(0, 10)),
    budget=st.integers(0, 14),
)
def test_no_split_is_better_whatever_the_errors(errors: np.ndarray, budget: int) -> None:
    count = len(errors)
    chosen = allocate_bits(errors, budget)
    best = min(
        sum(errors[index, bits] for index, bits in enumerate(split))
        for split in itertools.product(range(4), repeat=count)
        if sum(split) <= budget
    )
    assert chosen.sum() <= budget
    assert errors[np.arange(count), chosen].sum() == pytest.approx(best)


@given(variances=VARIANCES, budget=st.integers(0, 80))
def test_falling_gains_make_it_greedy(variances: np.ndarray, budget: int) -> None:
    errors = _errors(variances)
    heap = [(-error[0] + error[1], index, 1) for index, error in enumerate(errors)]
    heapq.heapify(heap)
    total = errors[:, 0].sum()
    for _ in range(min(budget, 8 * len(variances))):
        gain, index, bits = heapq.heappop(heap)
        total += gain
        if bits < 8:
            heapq.heappush(heap, (errors[index, bits + 1] - errors[index, bits], index, bits + 1))
    chosen = allocate_bits(errors, budget)
    assert errors[np.arange(len(variances)), chosen].sum() == pytest.approx(total, rel=1e-9)


@given(variances=VARIANCES, budget=st.integers(1, 60))
def test_whole_bits_are_within_one_of_water_filling(variances: np.ndarray, budget: int) -> None:
    chosen = allocate_bits(_errors(variances, 60), budget)
    filled = _water_fill(variances, budget)
    assert filled.sum() == pytest.approx(budget)
    assert np.abs(chosen - filled).max() <= 1 + 1e-9
    least = len(variances) * Spectrum.of(variances).distortion(budget / len(variances))
    assert least == pytest.approx((variances * 4.0**-filled).sum())
    assert least <= _errors(variances, 60)[np.arange(len(variances)), chosen].sum() * (1 + 1e-9)


def test_water_filling_leaves_equal_errors_above_water_and_nothing_below() -> None:
    variances = np.array([16.0, 4.0, 1.0, 0.01])
    # The level is 1, so 16, 4 and 1 get 2, 1 and 0 bits; the last lies under water.
    assert _water_fill(variances, 3) == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert Spectrum.of(variances).distortion(0.75) == pytest.approx(3.01 / 4)


def _cuts(count: int, segments: list[Segment]) -> list[tuple[Segment, ...]]:
    """Every way to cover components 0 to ``count`` end to end."""
    if not count:
        return [()]
    return [(*rest, last) for last in segments if last.stop == count for rest in _cuts(last.start, segments)]


@st.composite
def _segments(draw: st.DrawFn) -> tuple[int, list[Segment]]:
    count = draw(st.integers(1, 5))
    spans = [(start, stop) for start in range(count) for stop in range(start + 1, count + 1)]
    shared, found = draw(st.integers(0, 3)), []
    for start, stop in spans:
        # Errors need not fall with bits, nor groups be worse than their parts.
        for width in (0, 1, 2):
            cost = (stop - start) * width + (shared if width else 0)
            found.append(Segment(start, stop, width, cost, draw(st.floats(0, 10))))
    return count, found


@given(drawn=_segments(), budget=st.integers(0, 12))
def test_no_cut_into_groups_is_better_whatever_the_errors(drawn: tuple[int, list[Segment]], budget: int) -> None:
    count, segments = drawn
    chosen = allocate_segments(count, segments, budget)
    affordable = [cut for cut in _cuts(count, segments) if sum(one.cost for one in cut) <= budget]
    assert sum(one.error for one in chosen) == pytest.approx(min(sum(one.error for one in cut) for cut in affordable))
    assert sum(one.cost for one in chosen) <= budget
    assert [one.start for one in chosen] == [0, *(one.stop for one in chosen[:-1])]
    assert chosen[-1].stop == count


@given(variances=VARIANCES, budget=st.integers(0, 80))
def test_groups_of_one_without_scales_are_the_plain_split(variances: np.ndarray, budget: int) -> None:
    errors = _errors(variances)
    segments = [
        Segment(index, index + 1, bits, bits, float(error))
        for index, row in enumerate(errors)
        for bits, error in enumerate(row)
    ]
    chosen = allocate_segments(len(errors), segments, budget)
    plain = errors[np.arange(len(errors)), allocate_bits(errors, budget)].sum()
    assert sum(one.error for one in chosen) == pytest.approx(plain)


@given(drawn=_segments())
def test_a_larger_budget_never_loses_more(drawn: tuple[int, list[Segment]]) -> None:
    errors = [sum(one.error for one in allocate_segments(*drawn, budget)) for budget in range(10)]
    assert errors == sorted(errors, reverse=True) or np.allclose(errors, np.minimum.accumulate(errors))


def test_components_that_nothing_covers_are_refused() -> None:
    assert allocate_segments(0, [], 3) == ()
    with pytest.raises(ValueError, match="no segments cover 2 components within 3 bits"):
        allocate_segments(2, [Segment(0, 1, 1, 1, 0.0)], 3)


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bits"):
        allocate_bits(np.ones((2, 3)), -1)
    with pytest.raises(ValueError, match="-1 bits"):
        allocate_segments(1, [], -1)
