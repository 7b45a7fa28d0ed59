"""What every strategy does to the seeded ensembles, as points of a ranking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from kvsim.compression import parse_compression
from kvsim.errors import KvsimError, NotRunnable
from kvsim.quality.amid import exempt_note, fit_amid, outer_layers, store_amid
from kvsim.quality.compare import Point
from kvsim.quality.measure import MeasuredRisk, compare_caches, pooled
from kvsim.quality.small_model.grid import measured_strategies
from kvsim.quality.store import needs_calibration
from kvsim.tensors import KvTensors
from kvsim.tensors.ensemble import PRESETS, draw

SEQUENCES: Final = 1
CALIBRATION_SEQUENCES: Final = 2
LEAST_ERROR: Final = 1e-6
"""What an exact read-back counts as in a geometric mean."""


def ensemble_points(
    names: Sequence[str] | None = None,
    report: Callable[[str], None] | None = None,
    *,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> tuple[Point, ...]:
    """Measure strategies, those of the small model unless given, on all ensembles; ranked by the relative output error.

    The error of a strategy is the geometric mean over ensembles, so that none outweighs the others. What does not run,
    or not on these shapes, is reported and left out. Layers that a format exempts at either end of a model are not
    among an ensemble's (`kvsim.quality.amid`), which is reported too.
    """
    ensembles = {name: _Ensemble(name, seed) for name in PRESETS}
    names = tuple(names or measured_strategies())
    points = []
    for position, name in enumerate(names):
        if progress is not None:
            progress(position / len(names))
        try:
            risks = {of: _measure(name, ensemble) for of, ensemble in ensembles.items()}
        except NotRunnable as error:
            _say(report, f"{name}: left out: {error.reason}")
        except KvsimError as error:
            _say(report, f"{name}: left out: {error}")
        else:
            compression = parse_compression(name)
            points.append(_point(compression.name, risks))
            outer = outer_layers(compression, ensembles["llama-like"].caches[0])
            if outer:
                _say(report, f"{name}: {exempt_note(outer)}")
    return tuple(points)


@dataclass(frozen=True)
class _Ensemble:
    """Caches to be measured, and other sequences of the same heads, drawn once a method calibrates."""

    name: str
    seed: int

    @cached_property
    def caches(self) -> tuple[KvTensors, ...]:
        return self._draw(range(SEQUENCES))

    @cached_property
    def samples(self) -> tuple[KvTensors, ...]:
        return self._draw(range(SEQUENCES, SEQUENCES + CALIBRATION_SEQUENCES))

    def _draw(self, sequences: Iterable[int]) -> tuple[KvTensors, ...]:
        return tuple(draw(PRESETS[self.name], self.seed, sequence=index) for index in sequences)


def _measure(name: str, ensemble: _Ensemble) -> MeasuredRisk:
    compression = parse_compression(name)
    outer = outer_layers(compression, ensemble.caches[0])
    strategy = fit_amid(compression, ensemble.samples if needs_calibration(compression) else (), outer)
    return pooled(compare_caches(kv, store_amid(strategy, kv, outer)) for kv in ensemble.caches)


def _point(name: str, risks: dict[str, MeasuredRisk]) -> Point:
    error = float(np.exp(np.mean([np.log(max(risk.output_error, LEAST_ERROR)) for risk in risks.values()])))
    bits = float(np.mean([risk.bits_per_element for risk in risks.values()]))
    columns = [("output error, %", f"{100 * error:.3g}")]
    columns += [(of, f"{100 * risk.output_error:.3g}") for of, risk in risks.items()]
    return Point(name, bits, error, None, tuple(columns))


def _say(report: Callable[[str], None] | None, line: str) -> None:
    if report is not None:
        report(line)
