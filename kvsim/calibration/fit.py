"""Find a law's parameters and its correction table from timings, and say how wrong it is on shapes it has not seen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvsim.calibration.facts import DeviceFacts
from kvsim.calibration.laws.base import FloatArray, Law, Shape
from kvsim.calibration.table import CorrectionTable, Surface, fit_table
from kvsim.calibration.timings import HELD_OUT_BY, KEY_COLUMNS, ONE_SHAPE_HELD_OUT_BY, SHAPE_COLUMNS

if TYPE_CHECKING:
    import polars as pl

FOLDS = 5
MIN_ROWS = 24
"""Fewer rows than this do not make a fit: six parameters want four rows each."""
OUTLIER_LOG = 0.05
"""Residual (natural logarithm) beyond which a row pulls on the parameters with constant force: soft-L1 loss."""
MAX_PARAMETER_ROWS = 2000
"""Rows that parameters are searched on; the correction table sees all."""


@dataclass(frozen=True)
class FittedLaw:
    """A law with parameters and a correction, for one device and key.

    ``parameters`` are those of cold calls; ``cached`` those of calls whose working set fits the cache, where they
    differ. Between the cache's size and twice it the two blend; the correction covers both.
    """

    law: Law
    key: Mapping[str, str]
    facts: DeviceFacts
    parameters: Mapping[str, float]
    correction: CorrectionTable | None
    cached: Mapping[str, float] | None = None

    def seconds(self, shape: Shape) -> FloatArray:
        """Predict rows of `shape` (arrays by name)."""
        features = self.law.feature_values(shape, self.facts)
        return self._core(features) + self.law.per_item_seconds(shape, self.parameters)

    def law_log_seconds(self, features: FloatArray) -> FloatArray:
        """Natural logarithm of the core without correction."""
        cold_s = self.law.core_seconds(features, self.parameters, self.facts, self.key)
        if self.cached is None:
            return np.log(cold_s)
        cached_s = self.law.core_seconds(features, self.cached, self.facts, self.key)
        share = _cold_share(self.law, features, self.key, self.facts)
        return np.asarray(share * np.log(cold_s) + (1.0 - share) * np.log(cached_s))

    @cached_property
    def _core(self) -> Callable[[FloatArray], FloatArray]:
        # A law fitted in two domains needs nodes to be kept from falling where one takes over from the other.
        surface = Surface(self.correction, self.law_log_seconds) if self.correction else self.law_log_seconds
        return lambda features: np.exp(surface(features))


def cold_share(law: Law, shape: Shape, key: Mapping[str, str], facts: DeviceFacts) -> FloatArray:
    """Weight of the cold domain: 0 up to the cache's size, 1 from twice it, rising in the logarithm between."""
    return _cold_share(law, law.feature_values(shape, facts), key, facts)


def _cold_share(law: Law, features: FloatArray, key: Mapping[str, str], facts: DeviceFacts) -> FloatArray:
    working_set = law.working_set_bytes(features, key)
    if working_set is None or not facts.cache_bytes:
        return np.ones(len(features))
    return np.asarray(np.clip(np.log2(np.maximum(working_set, 1.0) / facts.cache_bytes), 0.0, 1.0))


def shape_of(frame: pl.DataFrame, operation: str) -> dict[str, FloatArray]:
    """Shape columns of rows as float arrays."""
    return {name: frame[name].to_numpy().astype(np.float64) for name in SHAPE_COLUMNS[operation]}


def held_out_columns(frame: pl.DataFrame, operation: str) -> tuple[str, ...]:
    """Columns whose equal rows are held out together; coarser sizes where the table has one shape only."""
    columns = HELD_OUT_BY[operation]
    return columns if frame.select(columns).n_unique() > 1 else ONE_SHAPE_HELD_OUT_BY[operation]


def fold_of(frame: pl.DataFrame, operation: str) -> npt.NDArray[np.int64]:
    """Fold of each row by its held-out shape: stable over runs, machines and what else is in the table."""
    import polars as pl

    names = list(held_out_columns(frame, operation))
    shapes = frame.select(names).unique(maintain_order=True)
    digests = [
        int.from_bytes(hashlib.sha256(repr((operation, *row)).encode()).digest()[:8], "big") for row in shapes.rows()
    ]
    # Shapes in the order of their digests are dealt out in turn, so that folds are equally large.
    order = np.argsort(np.asarray(digests, dtype=np.uint64))
    fold = np.empty(len(digests), dtype=np.int64)
    fold[order] = np.arange(len(digests)) % FOLDS
    return frame.join(shapes.with_columns(pl.Series("fold", fold)), on=names, how="left")["fold"].to_numpy()


def fit_law(law: Law, frame: pl.DataFrame, facts: DeviceFacts) -> FittedLaw:
    """Fit one key's rows; a domain (cold or cached) with too few rows of its own is left to the other."""
    key = {name: str(frame[name][0]) for name in KEY_COLUMNS}
    shape, seconds = shape_of(frame, law.operation), frame["seconds"].to_numpy()
    cold = cold_share(law, shape, key, facts) >= 1.0
    if min(cold.sum(), (~cold).sum()) < MIN_ROWS:
        fitted = FittedLaw(law, key, facts, fit_parameters(law, shape, seconds, facts, key), None)
    else:
        parameters = fit_parameters(law, _rows(shape, cold), seconds[cold], facts, key)
        shared = {name: parameters[name] for name in law.per_item_parameters}
        cached = fit_parameters(law, _rows(shape, ~cold), seconds[~cold], facts, key, shared)
        fitted = FittedLaw(law, key, facts, parameters, None, cached)
    # The table corrects the core alone: take off what grows with the batch first, but never all of a row.
    rest_s = np.maximum(seconds - law.per_item_seconds(shape, fitted.parameters), 0.1 * seconds)
    features = law.feature_values(shape, facts)
    return replace(fitted, correction=fit_table(features, np.log(rest_s), law.spacing, fitted.law_log_seconds))


def held_out_seconds(law: Law, frame: pl.DataFrame, facts: DeviceFacts) -> FloatArray:
    """Predict every row by a fit that has not seen its shape; NaN where too few shapes are left to fit."""
    fold = fold_of(frame, law.operation)
    predicted = np.full(len(frame), np.nan)
    for held_out in range(FOLDS):
        test = fold == held_out
        if not test.any() or (~test).sum() < MIN_ROWS:
            continue
        fitted = fit_law(law, frame.filter(~test), facts)
        predicted[test] = fitted.seconds(shape_of(frame.filter(test), law.operation))
    return predicted


def _rows(shape: Shape, part: npt.NDArray[np.bool_]) -> dict[str, FloatArray]:
    return {name: column[part] for name, column in shape.items()}


def fit_parameters(
    law: Law, shape: Shape, seconds: FloatArray, facts: DeviceFacts, key: Mapping[str, str],
    known: Mapping[str, float] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Minimise the soft-L1 loss of log errors within the parameters' bounds; those in `known` stay as they are."""
    from scipy.optimize import least_squares

    if len(seconds) > MAX_PARAMETER_ROWS:
        chosen = np.random.default_rng(0).permutation(len(seconds))[:MAX_PARAMETER_ROWS]
        shape, seconds = {name: column[chosen] for name, column in shape.items()}, seconds[chosen]
    features, log_seconds = law.feature_values(shape, facts), np.log(seconds)
    fixed = dict(known or {})
    free = [parameter for parameter in law.parameters if parameter.name not in fixed]
    low, start, high = (np.log([getattr(p, side) for p in free]) for side in ("low", "start", "high"))

    def named(values: FloatArray) -> dict[str, float]:
        return fixed | {p.name: float(v) for p, v in zip(free, np.exp(values), strict=True)}

    def errors(values: FloatArray) -> FloatArray:
        parameters = named(values)
        predicted = law.core_seconds(features, parameters, facts, key) + law.per_item_seconds(shape, parameters)
        return np.asarray(np.log(predicted) - log_seconds)

    inside = np.clip(start, low + 1e-9, high - 1e-9)
    found = least_squares(errors, inside, loss="soft_l1", f_scale=OUTLIER_LOG, bounds=(low, high))
    return named(found.x)
