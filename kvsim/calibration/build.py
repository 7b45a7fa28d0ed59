"""From timings to artefacts: one per kernel and format, with errors on shapes it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import numpy.typing as npt
import polars as pl

from kvsim import __version__
from kvsim.calibration.artefact import (
    COVERAGE,
    Artefact,
    Band,
    ExcludedRows,
    HeldOut,
    Part,
    RowOrigin,
    StoredTable,
)
from kvsim.calibration.facts import DeviceFacts, device_facts
from kvsim.calibration.fit import (
    MIN_ROWS,
    FittedLaw,
    cold_share,
    fit_law,
    held_out_columns,
    held_out_seconds,
    shape_of,
)
from kvsim.calibration.laws import law_for
from kvsim.calibration.laws.base import FloatArray, Law
from kvsim.calibration.staleness import OWN_KERNELS
from kvsim.calibration.timings import HELD_OUT_BY, KEY_COLUMNS, SHAPE_COLUMNS, Excluded, Timings
from kvsim.specs.base import Basis
from kvsim.specs.device import DeviceSpec

SOFTWARE = ("numpy", "polars", "scipy")
SIGNIFICANT_DIGITS = 8
MIN_SHAPES = 3
"""With fewer distinct shapes too little is left to fit when one is held out."""
_MARK = "category:"


@dataclass(frozen=True)
class Prediction:
    """Held-out predictions of one key's rows."""

    measured_s: FloatArray
    predicted_s: FloatArray
    is_cold: npt.NDArray[np.bool_]


def fit_artefacts(timings: Timings, spec: DeviceSpec) -> tuple[list[Artefact], tuple[Excluded, ...]]:
    """Fit every kernel and format of a device's rows; keys with too few rows are excluded by name."""
    facts = device_facts(spec)
    artefacts, excluded = [], list(timings.excluded)
    for _, rows in timings.frame.group_by(KEY_COLUMNS, maintain_order=True):
        if len(rows) < MIN_ROWS:
            key = "/".join(str(rows[name][0]) for name in KEY_COLUMNS if rows[name][0])
            excluded.append(Excluded(f"fewer than {MIN_ROWS} rows", len(rows), key))
            continue
        artefacts.append(fit_artefact(timings, rows, facts))
    return artefacts, tuple(excluded)


def fit_artefact(timings: Timings, rows: pl.DataFrame, facts: DeviceFacts) -> Artefact:
    """Fit the rows of one key."""
    law = law_for(timings.operation)
    parts, predictions = choose_parts(law, rows, facts)
    held_out, bands = errors_and_bands(predictions)
    artefact = Artefact(
        **{name: str(rows[name][0]) for name in KEY_COLUMNS},
        basis=Basis.FITTED,
        law=law.name,
        parts=tuple(_part(selector, fit_law(law, part, facts)) for selector, part in parts),
        domain={name: (float(rows[name].min()), float(rows[name].max())) for name in SHAPE_COLUMNS[law.operation]},  # type: ignore[arg-type]
        rows=len(rows),
        held_out_by=held_out_columns(rows, law.operation),
        held_out=held_out,
        bands=bands,
        excluded=tuple(ExcludedRows(reason=one.reason, count=one.count) for one in timings.excluded),
        origins=tuple(
            RowOrigin(path=o.path, sha256=o.sha256, origin=o.origin, licence=o.licence) for o in timings.origins
        ),
        software=software_versions(),
        kernel_source_sha256=own_kernel_source(rows),
    )
    return artefact.model_copy(update={"probe": _probe(artefact, rows, facts)})


def _probe(artefact: Artefact, rows: pl.DataFrame, facts: DeviceFacts) -> dict[str, float]:
    """Predict the middle row."""
    middle = shape_of(rows.slice(len(rows) // 2, 1), artefact.operation)
    seconds = float(artefact.predictor(facts).seconds(middle)[0])
    return {name: float(column[0]) for name, column in middle.items()} | {"seconds": _rounded(seconds)}


def own_kernel_source(rows: pl.DataFrame) -> str | None:
    """Hash of the source that rows of kvsim's own kernels were taken with, which is their version."""
    is_own = str(rows["kernel"][0]).startswith(OWN_KERNELS) or rows["operation"][0] == "kernel"
    return str(rows["version"][0]) if is_own else None


Parts = list[tuple[dict[str, int], pl.DataFrame]]
"""Rows by category: selector and rows."""


def choose_parts(law: Law, rows: pl.DataFrame, facts: DeviceFacts) -> tuple[Parts, list[Prediction]]:
    """Split rows into the law's categories, and by the optional ones that lower the held-out error; predict each."""
    chosen = law.categories
    parts = split_parts(law, rows, chosen)
    predictions = [predict_held_out(law, part, facts) for _, part in parts]
    for name in law.optional_categories:
        other = split_parts(law, rows, (*chosen, name))
        if len(other) == len(parts):
            continue
        others = [predict_held_out(law, part, facts) for _, part in other]
        if mean_log_error(others) < mean_log_error(predictions):
            chosen, parts, predictions = (*chosen, name), other, others
    return parts, predictions


def mean_log_error(predictions: Sequence[Prediction]) -> float:
    """Mean magnitude of the logarithm of predicted over measured."""
    errors = [np.abs(np.log(one.predicted_s / one.measured_s)) for one in predictions]
    return float(np.nanmean(np.concatenate(errors))) if errors else 0.0


def split_parts(law: Law, rows: pl.DataFrame, categories: Sequence[str] | None = None) -> Parts:
    """Split rows by categories (the law's own unless named); those with too few rows or shapes join the nearest."""
    names = law.categories if categories is None else categories
    if not names:
        return [({}, rows)]
    found = law.category_values(shape_of(rows, law.operation))
    values = {name: found[name] for name in names}
    marked = rows.with_columns(pl.Series(_MARK + name, column.astype(np.int64)) for name, column in values.items())
    marks = [_MARK + name for name in names]
    groups = sorted(marked.group_by(marks), key=lambda pair: pair[0])
    large: list[tuple[dict[str, int], list[pl.DataFrame]]] = []
    small: list[pl.DataFrame] = []
    for marked_by, part in groups:
        if is_enough(law, part):
            large.append(({name: int(value) for name, value in zip(names, marked_by, strict=True)}, [part]))
        else:
            small.append(part)
    if not large:
        return [({}, rows)]
    for part in small:
        shape = shape_of(part.head(1), law.operation)
        nearest = min(large, key=lambda pair: float(law.category_distance(pair[0], shape)[0]))
        nearest[1].append(part)
    return [(selector, pl.concat(parts).drop(marks)) for selector, parts in large]


def is_enough(law: Law, rows: pl.DataFrame) -> bool:
    """Whether rows can be fitted and some of their shapes held out."""
    return len(rows) >= MIN_ROWS and rows.select(HELD_OUT_BY[law.operation]).n_unique() >= MIN_SHAPES


def predict_held_out(law: Law, rows: pl.DataFrame, facts: DeviceFacts) -> Prediction:
    """Predict each row by a fit that has not seen its shape."""
    key = {name: str(rows[name][0]) for name in KEY_COLUMNS}
    cold = cold_share(law, shape_of(rows, law.operation), key, facts) >= 1.0
    return Prediction(rows["seconds"].to_numpy(), held_out_seconds(law, rows, facts), cold)


def errors_and_bands(predictions: Sequence[Prediction]) -> tuple[dict[str, HeldOut], dict[str, Band]]:
    """Summarise held-out errors and conformal bands, by domain."""
    measured = np.concatenate([one.measured_s for one in predictions])
    predicted = np.concatenate([one.predicted_s for one in predictions])
    cold = np.concatenate([one.is_cold for one in predictions])
    known = np.isfinite(predicted)
    held_out: dict[str, HeldOut] = {}
    bands: dict[str, Band] = {}
    for name, domain in (("cold", cold), ("cached", ~cold)):
        part = domain & known
        if not part.any():
            continue
        ratio = predicted[part] / measured[part] - 1.0
        held_out[name] = HeldOut(
            n=int(part.sum()),
            median_ape=_rounded(np.median(np.abs(ratio))),
            p90_ape=_rounded(np.quantile(np.abs(ratio), 0.9)),
            bias=_rounded(np.median(ratio)),
        )
        low, high = conformal_quantiles(np.log(measured[part] / predicted[part]), COVERAGE)
        bands[name] = Band(coverage=COVERAGE, log_low=_rounded(low), log_high=_rounded(high))
    return held_out, bands


def conformal_quantiles(log_ratios: FloatArray, coverage: float) -> tuple[float, float]:
    """Quantiles of held-out log ratios that hold `coverage` of new ones.

    Split conformal prediction: ranks are widened by (n + 1) / n, so that few rows give wider bands (Vovk et al. 2005;
    Romano, Patterson and Candes 2019).
    """
    n = len(log_ratios)
    tail = (1.0 - coverage) / 2.0
    reach = max(0.0, tail * (n + 1) / n - 1.0 / n) if n else 0.0
    return float(np.quantile(log_ratios, reach)), float(np.quantile(log_ratios, 1.0 - reach))


def _part(selector: dict[str, int], fitted: FittedLaw) -> Part:
    def stored(parameters: Mapping[str, float]) -> dict[str, float]:
        return {name: _rounded(value) for name, value in parameters.items()}

    return Part(
        selector=selector,
        cold=stored(fitted.parameters),
        cached=stored(fitted.cached) if fitted.cached is not None else None,
        correction=StoredTable.pack(fitted.correction) if fitted.correction else None,
    )


def software_versions() -> dict[str, str]:
    """Versions of kvsim and of what computed the fit."""
    versions = {"kvsim": __version__}
    for name in SOFTWARE:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
