"""Reverse water-filling among a few widths."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.numerics.water_filling import allocate_widths

COSTS = np.array([0.0, 2.25, 4.25, 8.25, 16.0])


@given(entries=st.integers(1, 5), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_no_choice_that_costs_as_much_is_better(entries: int, share: float, seed: int) -> None:
    errors = np.random.default_rng(seed).exponential(size=(entries, 5))
    widths = allocate_widths(errors, COSTS, share * 16 * entries)
    spent, error = COSTS[widths].sum(), errors[np.arange(entries), widths].sum()
    assert spent <= share * 16 * entries
    for other in product(range(5), repeat=entries):
        if COSTS[list(other)].sum() <= spent:
            assert error <= errors[np.arange(entries), list(other)].sum() + 1e-12


@given(entries=st.integers(1, 30), budgets=st.lists(st.floats(0, 500), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_more_bits_never_more_error(entries: int, budgets: list[float], seed: int) -> None:
    errors = np.random.default_rng(seed).exponential(size=(entries, 5))
    totals = [errors[np.arange(entries), allocate_widths(errors, COSTS, one)].sum() for one in sorted(budgets)]
    assert all(after <= before + 1e-12 for before, after in pairwise(totals))


@given(entries=st.integers(1, 40), budget=st.floats(0, 640), seed=st.integers(0, 99))
def test_what_is_left_is_less_than_one_entry(entries: int, budget: float, seed: int) -> None:
    weights = np.random.default_rng(seed).exponential(size=(entries, 1)) + 1e-3
    spent = COSTS[allocate_widths(weights * 4.0 ** -np.array([0, 2, 4, 8, 16.0]), COSTS, budget)].sum()
    assert spent <= budget
    assert spent == 16 * entries or budget - spent < 16


def test_two_widths_are_eviction_by_what_dropping_costs() -> None:
    dropped = np.random.default_rng(3).exponential(size=50)
    errors = np.stack((dropped, np.zeros(50)), axis=1)
    kept = np.flatnonzero(allocate_widths(errors, np.array([0.0, 16.0]), 16 * 20 + 7))
    assert set(kept) == set(np.argsort(-dropped)[:20])


@pytest.mark.parametrize("index", [1, 2, 3, 4])
def test_equal_entries_get_one_width(index: int) -> None:
    errors = np.tile(4.0 ** -np.array([0, 2, 4, 8, 16.0]), (30, 1))
    assert (allocate_widths(errors, COSTS, 30 * COSTS[index]) == index).all()


def test_widths_that_are_no_better_are_passed_over() -> None:
    errors = np.array([[1.0, 1.5, 0.9, 2.0, 0.0], [0.0, 0.5, 0.2, 0.1, 0.0]])
    assert allocate_widths(errors, COSTS, 4.3).tolist() == [0, 0]
    assert allocate_widths(errors, COSTS, 16).tolist() == [4, 0]


def test_the_water_level_of_the_continuous_rule() -> None:
    """Of errors w 4^-b with a width for every bit, each entry ends within one bit of 1/2 log2(w / level)."""
    weights = 4.0 ** np.random.default_rng(5).uniform(0, 10, 400)
    bits = np.arange(17.0)
    widths = allocate_widths(weights[:, None] * 4.0**-bits, bits, 1600)
    left = weights * 4.0**-widths
    level = np.median(left[widths > 0])
    assert np.abs(widths - np.maximum(0, np.log2(weights / level) / 2)).max() <= 1
    assert widths.sum() == 1600


def test_refusals() -> None:
    with pytest.raises(ValueError, match="ascend"):
        allocate_widths(np.zeros((2, 2)), np.array([1.0, 1.0]), 5)
    with pytest.raises(ValueError, match="less than 2 entries"):
        allocate_widths(np.zeros((2, 2)), np.array([1.0, 2.0]), 1)
