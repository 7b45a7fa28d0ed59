"""Low-rank maps: each is a projection, and the best one under its own objective."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.errors import InvalidSpec
from kvsim.numerics.svd import (
    Projection,
    discarded_energy,
    discarded_product_energy,
    logit_error_bound,
    principal_projection,
    query_aware_projection,
    randomised_projection,
    rank_for_energy,
    second_moment,
    stored_as,
)

DIM = 24


def _rows(seed: int, count: int, *, dim: int = DIM, decay: float = 0.7) -> np.ndarray:
    """Rows of a falling spectrum in a random basis."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return (rng.standard_normal((count, dim)) * decay ** np.arange(dim)) @ basis


def _kept(rows: np.ndarray, projection: Projection) -> np.ndarray:
    return rows @ projection.down @ projection.up


def _product_error(keys: np.ndarray, queries: np.ndarray, projection: Projection) -> float:
    return float((((keys - _kept(keys, projection)) @ queries.T) ** 2).sum())


shapes = st.tuples(st.integers(2, 16), st.integers(1, 40), st.integers(1, 30), st.integers(0, 10**6))


@given(shapes, st.data())
@settings(max_examples=60, deadline=None)
def test_every_map_is_a_projection_with_orthonormal_rows(shape: tuple[int, int, int, int], data: st.DataObject) -> None:
    dim, tokens, queries, seed = shape
    rank = data.draw(st.integers(1, dim))
    keys, asked = _rows(seed, tokens, dim=dim), _rows(seed + 1, queries, dim=dim)
    maps = (
        principal_projection(second_moment(keys), rank),
        query_aware_projection(second_moment(keys), second_moment(asked), rank),
        query_aware_projection(second_moment(keys), second_moment(asked), rank, ridge=1e-6),
        randomised_projection(keys, rank, 2),
        principal_projection(second_moment(keys), rank).turned(),
    )
    for one in maps:
        assert one.down.shape == (dim, rank)
        assert np.allclose(one.up @ one.up.T, np.eye(rank), atol=1e-9)
        once = _kept(keys, one)
        assert np.allclose(_kept(once, one), once, atol=1e-6 * np.abs(keys).max())


@pytest.mark.parametrize("rank", [1, 5, 12, 23])
def test_plain_svd_leaves_the_discarded_energy_and_no_map_leaves_less(rank: int) -> None:
    keys, queries = _rows(0, 300), _rows(1, 80)
    moment = second_moment(keys)
    best = ((keys - _kept(keys, principal_projection(moment, rank))) ** 2).sum()
    assert best == pytest.approx(discarded_energy(moment, rank), rel=1e-6)
    other = query_aware_projection(moment, second_moment(queries), rank)
    assert ((keys - _kept(keys, other)) ** 2).sum() >= best


@pytest.mark.parametrize("rank", [1, 5, 12, 23])
def test_query_aware_svd_leaves_the_discarded_product_energy_and_no_map_leaves_less(rank: int) -> None:
    keys, queries = _rows(2, 300), _rows(3, 80)
    moments = second_moment(keys), second_moment(queries)
    best = _product_error(keys, queries, query_aware_projection(*moments, rank))
    assert best == pytest.approx(discarded_product_energy(*moments, rank), rel=1e-6)
    left_out = np.linalg.svd(keys @ queries.T, compute_uv=False)[rank:]
    assert best == pytest.approx((left_out**2).sum(), rel=1e-6)
    assert _product_error(keys, queries, principal_projection(moments[0], rank)) >= best


def test_heavy_channels_that_no_query_reads_are_left_to_the_last() -> None:
    rng = np.random.default_rng(4)
    keys, queries = rng.standard_normal((400, DIM)), rng.standard_normal((200, DIM))
    keys[:, :6] *= 30.0
    queries[:, :6] = 0.0
    moments = second_moment(keys), second_moment(queries)
    plain, aware = principal_projection(moments[0], 6), query_aware_projection(*moments, 6, ridge=1e-6)
    whole = ((keys @ queries.T) ** 2).sum()
    # Plain SVD spends its whole rank on what nobody reads.
    assert _product_error(keys, queries, plain) / whole > 0.98
    assert _product_error(keys, queries, aware) / whole < 0.70
    assert ((keys - _kept(keys, plain)) ** 2).sum() < 0.01 * ((keys - _kept(keys, aware)) ** 2).sum()
    # With rank to spare the ridge keeps them after all.
    full = query_aware_projection(*moments, DIM, ridge=1e-6)
    assert np.allclose(_kept(keys, full), keys, atol=1e-6)


@pytest.mark.parametrize("maker", ["plain", "aware", "randomised"])
def test_error_falls_with_rank_and_is_zero_at_full_rank(maker: str) -> None:
    keys, queries = _rows(5, 300), _rows(6, 90)
    moments = second_moment(keys), second_moment(queries)

    def error(rank: int) -> float:
        if maker == "aware":
            return _product_error(keys, queries, query_aware_projection(*moments, rank))
        if maker == "plain":
            return float(((keys - _kept(keys, principal_projection(moments[0], rank))) ** 2).sum())
        return float(((keys - _kept(keys, randomised_projection(keys, rank, 2))) ** 2).sum())

    errors = [error(rank) for rank in range(1, DIM + 1)]
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-18 * (keys**2).sum() * (queries**2).sum()


def test_rows_of_low_rank_come_back_at_that_rank() -> None:
    keys = _rows(7, 200)[:, :6] @ np.random.default_rng(8).standard_normal((6, DIM))
    queries = _rows(9, 50)
    for one in (
        principal_projection(second_moment(keys), 6),
        query_aware_projection(second_moment(keys), second_moment(queries), 6),
        randomised_projection(keys, 6, 0),
    ):
        assert np.allclose(_kept(keys, one), keys, atol=1e-7 * np.abs(keys).max())


def test_sketch_comes_close_to_the_best_basis_as_it_iterates() -> None:
    keys = _rows(10, 600, dim=96, decay=0.97)
    best = discarded_energy(second_moment(keys), 24)
    excess = [((keys - _kept(keys, randomised_projection(keys, 24, n))) ** 2).sum() / best - 1.0 for n in (0, 1, 2, 4)]
    assert excess == sorted(excess, reverse=True)
    assert 0.0 <= excess[-1] < excess[2] < 0.05


def test_fewer_rows_than_rank_are_kept_exactly() -> None:
    keys = _rows(11, 3)
    one = randomised_projection(keys, 10, 2)
    assert one.up.shape == (10, DIM)
    assert np.allclose(_kept(keys, one), keys)


def test_scaling_the_rows_leaves_the_basis() -> None:
    keys = _rows(12, 100)
    one, other = (principal_projection(second_moment(scale * keys), 7) for scale in (1.0, 8.0))
    assert np.allclose(one.up, other.up, atol=1e-9)


def test_logit_error_stays_below_its_bound() -> None:
    keys, queries = _rows(13, 100), _rows(14, 40)
    errors = keys - _kept(keys, principal_projection(second_moment(keys), 8))
    bound = logit_error_bound(queries, errors, DIM**-0.5)
    change = np.abs(queries @ errors.T) * DIM**-0.5
    assert (change <= bound * (1 + 1e-9)).all()
    # Cauchy-Schwarz is tight where query and error point the same way.
    aligned = logit_error_bound(errors[:1], errors[:1], DIM**-0.5)
    assert aligned[0, 0] == pytest.approx((errors[0] ** 2).sum() * DIM**-0.5)


def test_rank_for_energy_counts_directions() -> None:
    moment = np.diag([6.0, 3.0, 1.0])
    assert [rank_for_energy(moment, share) for share in (0.5, 0.6, 0.61, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]


def test_storage_in_another_width_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="16 or 32 bits"):
        stored_as(np.ones(3, dtype=np.float32), 8)
