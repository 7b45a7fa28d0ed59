"""The exact allocator, against every choice there is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.numerics.option_allocation import allocate_options

PROBLEMS = st.integers(1, 4).flatmap(
    lambda options: st.tuples(
        st.lists(st.integers(0, 6), min_size=options, max_size=options),
        st.lists(
            st.lists(st.one_of(st.integers(0, 20), st.just(np.inf)), min_size=options, max_size=options),
            min_size=1,
            max_size=4,
        ),
        st.integers(0, 20),
        st.booleans(),
    )
)


def _best_of_all(costs: list[int], errors: list[list[float]], budget: int, *, exactly: bool) -> float:
    """Least total error over every choice that fits; inf where none does."""
    totals = [
        sum(row[option] for row, option in zip(errors, choice, strict=True))
        for choice in product(range(len(costs)), repeat=len(errors))
        if (spent := sum(costs[option] for option in choice)) == budget or (not exactly and spent < budget)
    ]
    return min(totals, default=np.inf)


@given(PROBLEMS)
def test_no_choice_is_better(problem: tuple[list[int], list[list[float]], int, bool]) -> None:
    costs, errors, budget, exactly = problem
    best = _best_of_all(costs, errors, budget, exactly=exactly)
    if not np.isfinite(best):
        with pytest.raises(ValueError, match="no choice of options"):
            allocate_options(np.array(costs), np.array(errors, dtype=float), budget, exactly=exactly)
        return
    chosen = allocate_options(np.array(costs), np.array(errors, dtype=float), budget, exactly=exactly)
    assert sum(row[option] for row, option in zip(errors, chosen, strict=True)) == best
    spent = sum(costs[option] for option in chosen)
    assert spent == budget if exactly else spent <= budget


@given(PROBLEMS, st.randoms(use_true_random=False))
def test_the_order_of_components_does_not_matter(problem: tuple, random: object) -> None:
    costs, errors, budget, _ = problem
    order = list(range(len(errors)))
    random.shuffle(order)  # type: ignore[attr-defined]
    try:
        chosen = allocate_options(np.array(costs), np.array(errors, dtype=float), budget, exactly=False)
    except ValueError:
        return
    again = allocate_options(np.array(costs), np.array([errors[one] for one in order]), budget, exactly=False)
    total = sum(errors[row][option] for row, option in enumerate(chosen))
    assert sum(errors[row][option] for row, option in zip(order, again, strict=True)) == total


def test_a_dent_in_the_errors_does_not_stop_it() -> None:
    """A greedy walk along gains would stop before the step that pays off only as a whole."""
    errors = np.array([[10.0, 10.0, 0.0], [10.0, 6.0, 5.0]])
    assert allocate_options(np.array([0, 1, 2]), errors, 2) == (2, 0)


def test_of_equal_choices_the_earlier_option_stands() -> None:
    assert allocate_options(np.array([1, 1]), np.zeros((3, 2)), 3) == (0, 0, 0)


def test_costs_are_not_negative() -> None:
    with pytest.raises(ValueError, match="costs are 0 or more"):
        allocate_options(np.array([-1]), np.zeros((1, 1)), 0)
