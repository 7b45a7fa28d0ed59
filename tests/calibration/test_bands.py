"""Bands: an 80 % band holds about 80 % of shapes that neither the fit nor the band has seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from kvsim.calibration.artefact import COVERAGE
from kvsim.calibration.build import conformal_quantiles
from kvsim.calibration.facts import device_facts
from kvsim.calibration.fit import FOLDS, MIN_ROWS, cold_share, fit_law, fold_of, shape_of
from kvsim.calibration.laws import law_for
from kvsim.calibration.laws.base import FloatArray, Law
from kvsim.calibration.sources.aiconfigurator import read
from kvsim.calibration.timings import KEY_COLUMNS
from kvsim.device_catalog import load_device


def test_quantiles_hold_their_share_of_new_values() -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        low, high = conformal_quantiles(rng.normal(size=60), COVERAGE)
        fresh = rng.normal(size=200)
        held.append(((fresh >= low) & (fresh <= high)).mean())
    assert np.mean(held) == pytest.approx(COVERAGE, abs=0.02)


def test_few_rows_give_wider_bands() -> None:
    rng = np.random.default_rng(0)
    widths = {n: np.mean([np.ptp(conformal_quantiles(rng.normal(size=n), 0.8)) for _ in range(300)]) for n in (9, 500)}
    assert widths[9] > widths[500]


def hits(law: Law, rows: pl.DataFrame) -> FloatArray:
    """Whether each row lies in its band, cold and cached apart: three folds fit, one sets the band, one is tested."""
    facts = device_facts(load_device(str(rows["device"][0])).spec)
    key = {name: str(rows[name][0]) for name in KEY_COLUMNS}
    fold, found = fold_of(rows, law.operation), np.full(len(rows), np.nan)
    is_cold = cold_share(law, shape_of(rows, law.operation), key, facts) >= 1.0
    for tested in range(FOLDS):
        setting = (tested + 1) % FOLDS
        fitted_on = (fold != tested) & (fold != setting)
        if fitted_on.sum() < MIN_ROWS:
            continue
        predicted = fit_law(law, rows.filter(fitted_on), facts).seconds(shape_of(rows, law.operation))
        logs = np.log(rows["seconds"].to_numpy() / predicted)
        for domain in (is_cold, ~is_cold):
            known, test = domain & (fold == setting), domain & (fold == tested)
            if known.any() and test.any():
                low, high = conformal_quantiles(logs[known], COVERAGE)
                found[test] = (logs[test] >= low) & (logs[test] <= high)
    return found


@pytest.mark.parametrize("operation", ["all_reduce", "mla_decode", "mla_prefill"])
def test_bands_hold_unseen_shapes_of_public_tables(operation: str, kernel_timings: Path) -> None:
    found = [
        hits(law_for(operation), rows)
        for timings in read(kernel_timings, operations=[operation])
        for _, rows in timings.frame.group_by(KEY_COLUMNS, maintain_order=True)
    ]
    held = np.nanmean(np.concatenate(found))
    assert 0.75 <= held <= 0.85


def test_bands_hold_unseen_gemms(kernel_timings: Path) -> None:
    path = kernel_timings / "h100_sxm" / "gemm" / "sglang"
    rows = pl.concat(timings.frame for timings in read(path, operations=["gemm"]))
    found = [hits(law_for("gemm"), part) for _, part in rows.group_by(KEY_COLUMNS, maintain_order=True)]
    assert 0.75 <= np.nanmean(np.concatenate(found)) <= 0.85
