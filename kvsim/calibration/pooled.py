"""One set of a law's parameters for several devices at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvsim.calibration.facts import DeviceFacts
from kvsim.calibration.fit import OUTLIER_LOG
from kvsim.calibration.laws.base import FloatArray, Law, Shape

PRIOR_LOG_WIDTH = 1.5
"""Width (natural logarithm) of the prior of each parameter around its start."""
PRIOR_WEIGHT = 1e-3
"""Loss of a parameter one width from its start, against a mean loss of rows that is about the square of their error:
enough to hold parameters that no device shows, too little to move those that one does."""
ROUNDS = 60
STEP_LOG = 1e-4
SMALLEST_GAIN = 1e-10


@dataclass(frozen=True)
class DeviceRows:
    """Shapes and seconds on one device, and how much they count: weights of all devices sum to 1."""

    shape: Shape
    seconds: FloatArray
    facts: DeviceFacts
    key: Mapping[str, str]
    weight: float


def fit_pooled(law: Law, devices: Sequence[DeviceRows], known: Mapping[str, float] | None = None) -> dict[str, float]:
    """Minimise the soft-L1 loss of log errors over all devices plus a weak prior; those in `known` stay as they are.

    A parameter fitted on one device alone is arbitrary where its term does not bind there, and wrong on a device where
    it does. Levenberg-Marquardt on logarithms: deterministic, and without scipy, as it runs when a device is asked for.
    """
    fixed = dict(known or {})
    free = [parameter for parameter in law.parameters if parameter.name not in fixed]
    low, start, high = (np.log([getattr(one, side) for one in free]) for side in ("low", "start", "high"))
    features = [law.feature_values(rows.shape, rows.facts) for rows in devices]
    log_seconds = [np.log(rows.seconds) for rows in devices]
    weights = np.concatenate([np.full(len(rows.seconds), rows.weight / len(rows.seconds)) for rows in devices])

    def named(values: FloatArray) -> dict[str, float]:
        return fixed | {one.name: float(np.exp(value)) for one, value in zip(free, values, strict=True)}

    def errors(values: FloatArray) -> FloatArray:
        parameters = named(values)
        parts = []
        for rows, feature, measured in zip(devices, features, log_seconds, strict=True):
            core_s = law.core_seconds(feature, parameters, rows.facts, rows.key)
            parts.append(np.log(core_s + law.per_item_seconds(rows.shape, parameters)) - measured)
        return np.concatenate(parts)

    def loss(error: FloatArray, values: FloatArray) -> float:
        rows = 2.0 * OUTLIER_LOG**2 * (np.sqrt(1.0 + (error / OUTLIER_LOG) ** 2) - 1.0)
        return float((weights * rows).sum() + PRIOR_WEIGHT * (((values - start) / PRIOR_LOG_WIDTH) ** 2).sum())

    values, damping = start.copy(), 1e-3
    error = errors(values)
    best = loss(error, values)
    for _ in range(ROUNDS):
        slopes = np.stack([(errors(values + STEP_LOG * unit) - error) / STEP_LOG for unit in np.eye(len(values))], 1)
        row_weights = weights / np.sqrt(1.0 + (error / OUTLIER_LOG) ** 2)
        curvature = slopes.T @ (row_weights[:, None] * slopes)
        prior = PRIOR_WEIGHT / PRIOR_LOG_WIDTH**2
        gradient = slopes.T @ (row_weights * error) + prior * (values - start)
        curvature += prior * np.eye(len(values))
        gain = 0.0
        while damping < 1e6:
            step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), gradient)
            trial = np.clip(values - step, low, high)
            trial_error = errors(trial)
            gain = best - loss(trial_error, trial)
            if gain > 0.0:
                values, error, best, damping = trial, trial_error, best - gain, damping / 5.0
                break
            damping *= 4.0
        if gain < SMALLEST_GAIN:
            break
    return named(values)
