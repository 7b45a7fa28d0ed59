"""Layer plans on the seeded ensembles: made by local deviation on some sequences, judged by it on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvsim.numerics.arrays import DoubleArray
from kvsim.quality.layer_plans import Option, Sensitivity, best_plan, local_harms, planned, uniform
from kvsim.tensors import KvTensors
from kvsim.tensors.ensemble import PRESETS, draw

CALIBRATION_SEQUENCES: Final = 3
TEST_SEQUENCES: Final = 4


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
    kind: str
    name: str
    strategy: str
    harms: DoubleArray
    is_chosen: bool = False


def ensemble_contests(
    ensemble: str, seed: int, options: Sequence[Option], units_per_layer: int, extra: Sequence[Option] = ()
) -> tuple[EnsembleContest, ...]:
    """Make plans on some sequences of an ensemble, and judge them beside every uniform policy on others.

    Harm is local, so that of a plan is put together from single layers'. ``extra`` are uniform policies of the same
    cost that no plan may use.
    """
    drawn = [draw(PRESETS[ensemble], seed, sequence=index) for index in range(CALIBRATION_SEQUENCES + TEST_SEQUENCES)]
    every = tuple(sorted({*options, *extra}, key=lambda one: (one.policy, one.cost, one.name)))
    harms = np.stack([_harms(every, kv) for kv in drawn])
    calibrated, held_out = harms[:CALIBRATION_SEQUENCES].mean(axis=0), harms[CALIBRATION_SEQUENCES:]
    allowed = [index for index, one in enumerate(every) if one not in extra]
    found = Sensitivity(tuple(every[index] for index in allowed), calibrated[:, allowed])
    alike = [one for one in every if one.cost == units_per_layer]
    best = min(alike, key=lambda one: (calibrated[:, every.index(one)].mean(), one.name))
    best_sized = min((one for one in alike if one in options), key=lambda one: calibrated[:, every.index(one)].mean())
    made: list[EnsembleContest] = []
    for one in alike:
        mine = held_out[:, :, every.index(one)].mean(axis=1)
        made.append(
            EnsembleContest(ensemble, seed, "uniform", one.policy, uniform(one).name, mine, is_chosen=one == best)
        )
    plans = {
        "local": best_plan(found, units_per_layer),
        "local, policy only": best_plan(found, units_per_layer, "policy"),
        "local, budget only": best_plan(found, units_per_layer, "budget", best_sized.policy),
    }
    for name, plan in plans.items():
        columns = [every.index(one) for one in plan]
        mine = held_out[:, range(len(plan)), columns].mean(axis=1)
        made.append(EnsembleContest(ensemble, seed, "plan", name, planned(plan).name, mine))
    return tuple(made)


def _harms(options: Sequence[Option], kv: KvTensors) -> DoubleArray:
    """(L, O)."""
    columns = [np.zeros(kv.num_layers) if one.is_free_of_harm else local_harms(uniform(one), [kv]) for one in options]
    return np.stack(columns, axis=1)
