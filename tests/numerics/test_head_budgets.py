"""One budget shared over heads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.numerics.head_budgets import fullest_rank, joint_top_k


@given(
    heads=st.integers(1, 6),
    tokens=st.integers(1, 40),
    share=st.floats(0.05, 1),
    alpha=st.floats(0, 1),
    levels=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_budget_is_conserved_and_the_safeguard_respected(
    heads: int, tokens: int, share: float, alpha: float, levels: int, seed: int
) -> None:
    scores = np.random.default_rng(seed).integers(0, levels, (heads, tokens)).astype(np.float32)
    kept = max(1, int(tokens * share))
    safe = int(kept * alpha)
    chosen = joint_top_k(scores, heads * kept, safe)
    assert chosen.sum() == heads * kept
    assert (chosen.sum(axis=1) >= safe).all()
    # Beyond the safeguard, nothing left out beats anything taken, and within a head nothing does at all.
    order = np.argsort(-scores, axis=1, kind="stable")
    free = chosen.copy()
    np.put_along_axis(free, order[:, :safe], False, axis=1)
    if free.any() and not chosen.all():
        assert scores[free].min() >= scores[~chosen].max()
    for head in range(heads):
        assert set(np.flatnonzero(chosen[head])) == set(order[head, : chosen[head].sum()].tolist())


@pytest.mark.parametrize("safe", [0, 1, 3])
def test_equal_scores_give_equal_budgets(safe: int) -> None:
    assert (joint_top_k(np.zeros((4, 20), np.float32), 4 * 7, safe).sum(axis=1) == 7).all()


def test_heads_with_better_tokens_get_more() -> None:
    scores = np.array([[9, 8, 7, 0], [1, 2, 0, 0]], np.float32)
    assert joint_top_k(scores, 4).tolist() == [[True, True, True, False], [False, True, False, False]]
    assert joint_top_k(scores, 4, 2).tolist() == [[True, True, False, False], [True, True, False, False]]


def test_a_full_safeguard_is_a_top_k_per_head() -> None:
    scores = np.random.default_rng(1).standard_normal((3, 30)).astype(np.float32)
    assert (joint_top_k(scores, 3 * 11, 11).sum(axis=1) == 11).all()


def test_infinite_scores_come_first() -> None:
    scores = np.array([[1, np.inf], [np.inf, 5]], np.float32)
    assert joint_top_k(scores, 2).tolist() == [[False, True], [True, False]]


def test_the_fullest_rank_is_the_largest_run_of_heads() -> None:
    tokens = np.array([4, 0, 1, 3])
    assert fullest_rank(tokens, 1) == 1
    assert fullest_rank(tokens, 2) == 1
    assert fullest_rank(tokens, 4) == 2
