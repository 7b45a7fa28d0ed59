"""Interpolation on the sphere."""

from __future__ import annotations

import numpy as np
import pytest

from kvsim.numerics.slerp import angles, slerp, unit


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return unit(rng.standard_normal((50, 16)))[0], unit(rng.standard_normal((50, 16)))[0]


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.6, 1.0])
def test_the_arc_is_cut_in_proportion(pair, weight):
    between = slerp(*pair, weight)
    assert np.linalg.norm(between, axis=1) == pytest.approx(1.0)
    assert angles(pair[0], between) == pytest.approx(weight * angles(*pair), abs=1e-7)
    assert angles(between, pair[1]) == pytest.approx((1 - weight) * angles(*pair), abs=1e-7)


def test_swapping_the_ends_mirrors_the_weight(pair):
    assert slerp(*pair, 0.3) == pytest.approx(slerp(*pair[::-1], 0.7))


def test_a_rotation_of_both_rotates_the_result(pair):
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0]
    assert slerp(pair[0] @ turn, pair[1] @ turn, 0.6) == pytest.approx(slerp(*pair, 0.6) @ turn)


def test_parallel_opposite_and_zero_vectors(pair):
    first = pair[0]
    assert slerp(first, first, 0.6) == pytest.approx(first)
    assert slerp(first, -first, 0.6) == pytest.approx(-first)
    assert slerp(first, -first, 0.4) == pytest.approx(first)
    direction, length = unit(np.zeros((2, 4), dtype=np.float32))
    assert not direction.any()
    assert not length.any()
