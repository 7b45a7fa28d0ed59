"""Folding vectors into their nearest, and sharing out whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.numerics.merging import complement, folded_means, nearest_by_cosine, sum_at, weight_at
from kvsim.numerics.shares import share_out


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_complement_is_the_rest() -> None:
    kept = np.array([[0, 3, 4], [1, 2, 5]])
    assert np.array_equal(complement(kept, 6), [[1, 2, 5], [0, 3, 4]])
    assert complement(np.array([[0, 1]]), 2).shape == (1, 0)


def test_nearest_is_the_largest_cosine_and_the_first_of_equals(rng: np.random.Generator) -> None:
    vectors, candidates = rng.standard_normal((2, 7, 16)), rng.standard_normal((2, 5, 16))
    candidates[:, 4] = candidates[:, 1]
    places, cosines = nearest_by_cosine(vectors.astype(np.float32), candidates.astype(np.float32))
    for head in range(2):
        for row in range(7):
            one = [float(c @ vectors[head, row] / np.linalg.norm(c) / np.linalg.norm(vectors[head, row]))
                   for c in candidates[head]]  # fmt: skip
            assert cosines[head, row] == pytest.approx(max(one), abs=1e-6)
            assert places[head, row] == int(np.argmax(np.round(one, 6)))
    assert (places != 4).all()


def test_scale_does_not_change_the_nearest(rng: np.random.Generator) -> None:
    vectors, candidates = (rng.standard_normal((1, 30, 8)).astype(np.float32) for _ in range(2))
    scales = rng.uniform(0.1, 10, (1, 30, 1)).astype(np.float32)
    places, _ = nearest_by_cosine(vectors, candidates)
    assert np.array_equal(nearest_by_cosine(vectors * scales, candidates * scales)[0], places)


def test_sums_and_means_against_a_plain_loop(rng: np.random.Generator) -> None:
    kept, gone = rng.standard_normal((2, 4, 3)).astype(np.float32), rng.standard_normal((2, 9, 3)).astype(np.float32)
    places, weights = rng.integers(0, 3, (2, 9)), rng.uniform(0, 1, (2, 9)).astype(np.float32)
    means = folded_means(kept, gone, places, weights)
    for head in range(2):
        for slot in range(4):
            mine = places[head] == slot
            total = weights[head, mine].sum()
            assert weight_at(places, weights, 4)[head, slot] == pytest.approx(total, abs=1e-6)
            summed = (weights[head, mine, None] * gone[head, mine]).sum(axis=0)
            assert sum_at(places, weights[..., None] * gone, 4)[head, slot] == pytest.approx(summed, abs=1e-6)
            assert means[head, slot] == pytest.approx((kept[head, slot] + summed) / (1 + total), abs=1e-6)
    # Nothing goes to the last one.
    assert np.array_equal(means[:, 3], kept[:, 3])


def test_folding_equal_vectors_changes_nothing(rng: np.random.Generator) -> None:
    kept = rng.standard_normal((2, 4, 3)).astype(np.float32)
    places, weights = rng.integers(0, 4, (2, 9)), rng.uniform(0, 1, (2, 9)).astype(np.float32)
    gone = np.take_along_axis(kept, places[..., None], axis=1)
    assert folded_means(kept, gone, places, weights) == pytest.approx(kept, abs=1e-6)


def test_nothing_to_fold(rng: np.random.Generator) -> None:
    kept = rng.standard_normal((1, 4, 3)).astype(np.float32)
    none, empty = np.zeros((1, 0), dtype=np.int64), np.zeros((1, 0), dtype=np.float32)
    assert np.array_equal(folded_means(kept, kept[:, :0], none, empty), kept)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(0, 100, allow_subnormal=False), min_size=1, max_size=40), st.integers(1, 60), st.data())
def test_shares_add_up_within_their_limits(shares: list[float], most: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(0, most))
    total = data.draw(st.integers(least * len(shares), most * len(shares)))
    found = share_out(np.array(shares), total, least, most)
    assert found.sum() == total
    assert ((found >= least) & (found <= most)).all()
    order = np.argsort(shares, kind="stable")
    # Who asks for more gets no less, but for one left over by rounding.
    assert (np.diff(found[order]) >= -1).all()


def test_plain_shares() -> None:
    assert share_out(np.ones(4), 10, 0, 10).tolist() == [3, 3, 2, 2]
    assert share_out(np.array([1.0, 2.0, 7.0]), 100, 0, 100).tolist() == [10, 20, 70]
    # What the limit cuts off goes to the others in proportion.
    assert share_out(np.array([1.0, 2.0, 7.0]), 100, 0, 40).tolist() == [20, 40, 40]
    assert share_out(np.array([0.0, 1.0]), 10, 1, 9).tolist() == [1, 9]
