"""Correction tables: what rows say is learnt, and forgotten outside them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.calibration.laws.base import FloatArray
from kvsim.calibration.table import RIM_OCTAVES, CorrectionTable, Surface, fit_table


def core(features: FloatArray) -> FloatArray:
    """Launch and a product of powers."""
    return np.log(1e-5 + 1e-9 * np.exp2(features.sum(1)))


def grid() -> FloatArray:
    x, y = np.meshgrid(np.arange(0.0, 8.1, 0.5), np.arange(2.0, 9.1, 0.5))
    return np.stack([x.ravel(), y.ravel()], 1)


def test_rows_that_follow_the_law_need_no_correction() -> None:
    features = grid()
    table = fit_table(features, core(features), (1.0, 1.0), core)
    assert np.abs(table.values).max() < 0.05


def test_a_surface_learns_what_the_law_misses() -> None:
    features = grid()
    missed = 0.2 * features[:, 0] / 8.0 + 0.1
    surface = Surface(fit_table(features, core(features) + missed, (1.0, 1.0), core), core)
    assert np.abs(surface(features) - core(features) - missed).max() < 0.06


def test_rows_that_fall_are_flattened_to_their_mean() -> None:
    features = np.repeat(np.asarray([[0.0], [1.0]]), 50, axis=0)
    log_seconds = np.where(features[:, 0] > 0.5, -11.6, -11.4)
    flat = Surface(
        fit_table(features, log_seconds, (1.0,), lambda f: np.full(len(f), -11.5)), lambda f: np.full(len(f), -11.5)
    )
    assert flat(np.asarray([[0.0], [1.0]])) == pytest.approx([-11.5, -11.5], abs=0.02)


def test_the_correction_ends_beyond_the_rim() -> None:
    table = CorrectionTable((0.0, 0.0), (1.0, 1.0), np.full((5, 5), 0.5))
    surface = Surface(table, core)
    top = 4.0 + RIM_OCTAVES[-1]
    far = np.asarray([[top, top]])
    # Time may not fall, so what the rim cannot give back stays: here the law rises by far more than 0.5.
    assert surface(far) == pytest.approx(core(far), abs=1e-9)
    beyond = np.asarray([[top + 3.0, top]])
    slope = (core(far) - core(far - [[1e-3, 0.0]])) / 1e-3
    assert surface(beyond) - surface(far) == pytest.approx(3.0 * slope)


def test_below_the_rim_time_stays() -> None:
    surface = Surface(CorrectionTable((0.0,), (1.0,), np.asarray([0.1, 0.2])), core)
    assert surface(np.asarray([[-4.0], [-40.0]])) == pytest.approx(np.repeat(surface(np.asarray([[-4.0]])), 2))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_any_rows_give_a_surface_that_never_falls(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.uniform(0.0, 6.0, (60, 2))
    table = fit_table(features, core(features) + rng.normal(0.0, 0.5, 60), (1.0, 2.0), core)
    surface = Surface(table, core)
    start = rng.uniform(-8.0, 12.0, (200, 2))
    step = rng.uniform(0.0, 3.0, (200, 2))
    assert (surface(start + step) >= surface(start) - 1e-9).all()
    assert np.isfinite(surface(start)).all()


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_fitted_table_is_not_changed_by_its_surface(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.uniform(0.0, 6.0, (60, 2))
    table = fit_table(features, core(features) + rng.normal(0.0, 0.5, 60), (1.0, 1.0), core)
    axes = np.stack(np.meshgrid(*table.axes, indexing="ij"), -1).reshape(-1, 2)
    assert Surface(table, core)(axes) == pytest.approx(core(axes) + table.values.ravel(), abs=1e-9)
