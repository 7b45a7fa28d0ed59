"""Layer plans on the seeded ensembles: made by local deviation on some sequences, judged by it on others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvsim.numerics.arrays import DoubleArray
from kvsim.quality.layer_plans import Option, Sensitivity, best_plan, local_harms, planned, uniform
from kvsim.tensors import KvTensors
from kvsim.tensors.ensemble import PRESETS, draw

CALIBRATION_SEQUENCES: Final = 2
TEST_SEQUENCES: Final = 3


@dataclass(frozen=True, eq=False)
class EnsembleContest:
    """One contender on one ensemble.

    Attributes
    ----------
    kind : {'uniform', 'plan'}
    strategy : str
        Spelled.
    harms : (S,)
        Squared relative error of outputs per held-out sequence, mean over layers and heads.
    is_chosen : bool
        Whether calibration data named it the best uniform policy.
    """

    ensemble: str
    seed: int
    question: str
    kind: str
    name: str
    strategy: str
    harms: DoubleArray
    is_chosen: bool = False


@dataclass(frozen=True, eq=False)
class EnsembleHarms:
    """Local harm of every option in each layer of calibration and held-out sequences.

    Attributes
    ----------
    options : tuple of Option
    calibrated : (L, O)
        Mean over calibration sequences.
    held_out : (S, L, O)
    """

    ensemble: str
    seed: int
    options: tuple[Option, ...]
    calibrated: DoubleArray
    held_out: DoubleArray

    def alike(self, option: Option) -> DoubleArray:
        """Harm of one option in all layers, per held-out sequence, (S,)."""
        return np.asarray(self.held_out[:, :, self.options.index(option)].mean(axis=1))

    def of_plan(self, plan: Sequence[Option]) -> DoubleArray:
        """Harm of a plan, (S,): local harm is each layer's own, so single layers' are put together."""
        columns = [self.options.index(one) for one in plan]
        return np.asarray(self.held_out[:, range(len(plan)), columns].mean(axis=1))

    def calibrated_alike(self, option: Option) -> float:
        """Harm of one option in all layers, on calibration sequences."""
        return float(self.calibrated[:, self.options.index(option)].mean())


def ensemble_harms(ensemble: str, seed: int, options: Iterable[Option]) -> EnsembleHarms:
    """Measure options on sequences of an ensemble."""
    every = tuple(sorted(set(options), key=lambda one: (one.policy, one.cost, one.name)))
    drawn = [draw(PRESETS[ensemble], seed, sequence=index) for index in range(CALIBRATION_SEQUENCES + TEST_SEQUENCES)]
    harms = np.stack([_harms(every, kv) for kv in drawn])
    calibrated = np.asarray(harms[:CALIBRATION_SEQUENCES].mean(axis=0))
    return EnsembleHarms(ensemble, seed, every, calibrated, harms[CALIBRATION_SEQUENCES:])


def ensemble_contests(
    found: EnsembleHarms, question: str, options: Sequence[Option], units_per_layer: int, extra: Sequence[Option] = ()
) -> tuple[EnsembleContest, ...]:
    """Make plans of ``options``, and put them beside every uniform policy of the same total.

    ``extra`` are uniform policies that no plan may use.
    """
    sized = sorted((one for one in options if one.cost == units_per_layer), key=lambda one: one.name)
    best = min((*sized, *extra), key=found.calibrated_alike)
    moved = min(sized, key=found.calibrated_alike).policy
    columns = [found.options.index(one) for one in options]
    sensitivity = Sensitivity(tuple(options), found.calibrated[:, columns])
    plans = {
        "local": best_plan(sensitivity, units_per_layer),
        "local, policy only": best_plan(sensitivity, units_per_layer, "policy"),
        "local, budget only": best_plan(sensitivity, units_per_layer, "budget", moved),
    }
    who = (found.ensemble, found.seed, question)
    uniforms = [
        EnsembleContest(*who, "uniform", one.policy, uniform(one).name, found.alike(one), is_chosen=one == best)
        for one in (*sized, *extra)
    ]
    made = [
        EnsembleContest(*who, "plan", name, planned(plan).name, found.of_plan(plan)) for name, plan in plans.items()
    ]
    return (*uniforms, *made)


def _harms(options: Sequence[Option], kv: KvTensors) -> DoubleArray:
    """(L, O)."""
    columns = [np.zeros(kv.num_layers) if one.is_free_of_harm else local_harms(uniform(one), [kv]) for one in options]
    return np.stack(columns, axis=1)
