"""What every strategy does to the seeded ensembles, as points of a ranking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from kvsim.compression import parse_compression
from kvsim.errors import KvsimError, NotRunnable
from kvsim.quality.compare import Point
from kvsim.quality.measure import MeasuredRisk, measure, pooled
from kvsim.quality.small_model.grid import measured_strategies
from kvsim.quality.store import fit_strategy
from kvsim.tensors import KvTensors
from kvsim.tensors.ensemble import PRESETS, draw

SEQUENCES: Final = 1
CALIBRATION_SEQUENCES: Final = 2
LEAST_ERROR: Final = 1e-6
"""What an exact read-back counts as in a geometric mean."""


def ensemble_points(
    names: Sequence[str] | None = None, report: Callable[[str], None] | None = None, *, seed: int = 0
) -> tuple[Point, ...]:
    """Measure strategies, those of the small model unless given, on all ensembles; ranked by the relative output error.

    The error of a strategy is the geometric mean over ensembles, so that none outweighs the others. What does not run,
    or not on these shapes, is reported and left out.
    """
    ensembles = {name: _draw(name, seed) for name in PRESETS}
    points = []
    for name in names or measured_strategies():
        try:
            risks = {of: _measure(name, caches, samples) for of, (caches, samples) in ensembles.items()}
        except NotRunnable as error:
            _say(report, f"{name}: left out: {error.reason}")
        except KvsimError as error:
            _say(report, f"{name}: left out: {error}")
        else:
            points.append(_point(parse_compression(name).name, risks))
    return tuple(points)


def _draw(name: str, seed: int) -> tuple[tuple[KvTensors, ...], tuple[KvTensors, ...]]:
    """Caches to be measured, and other sequences of the same heads to calibrate with."""
    count = SEQUENCES + CALIBRATION_SEQUENCES
    drawn = tuple(draw(PRESETS[name], seed, sequence=index) for index in range(count))
    return drawn[:SEQUENCES], drawn[SEQUENCES:]


def _measure(name: str, caches: Sequence[KvTensors], samples: Sequence[KvTensors]) -> MeasuredRisk:
    strategy = fit_strategy(parse_compression(name), samples)
    return pooled(measure(strategy, kv) for kv in caches)


def _point(name: str, risks: dict[str, MeasuredRisk]) -> Point:
    error = float(np.exp(np.mean([np.log(max(risk.output_error, LEAST_ERROR)) for risk in risks.values()])))
    bits = float(np.mean([risk.bits_per_element for risk in risks.values()]))
    columns = [("output error, %", f"{100 * error:.3g}")]
    columns += [(of, f"{100 * risk.output_error:.3g}") for of, risk in risks.items()]
    return Point(name, bits, error, None, tuple(columns))


def _say(report: Callable[[str], None] | None, line: str) -> None:
    if report is not None:
        report(line)
