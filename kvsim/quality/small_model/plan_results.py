"""The committed table of layer plans against uniform policies. No torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import Field

from kvsim.data_files import preset_dir
from kvsim.documents import load_json, validate, write_atomic
from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import DoubleArray
from kvsim.quality.plan_ensembles import EnsembleContest
from kvsim.specs.base import Spec
from kvsim.tensors import FloatArray

TABLE: Final = "layer_plans.csv"
ENSEMBLES: Final = "layer_plans_ensembles.csv"
RECORD: Final = "layer_plans_provenance.json"
ALL: Final = "all"
CALIBRATED: Final = "best on calibration data"
ORACLE: Final = "best on the test itself"
"""Names of the uniform policies that were best on either, one per model or cache."""
DRAWS: Final = 2000
_SEED: Final = 11


@dataclass(frozen=True, eq=False)
class Contest:
    """What one contender did on one model's held-out sequences.

    Attributes
    ----------
    kind : {'uniform', 'plan'}
    strategies : dict
        Per task, what was tested there; the same everywhere unless a task was left out.
    scores, kl_nats : dict of (B,)
        Per task and sequence.
    is_chosen : bool
        Whether calibration data named it the best uniform policy.
    """

    model: str
    question: str
    kind: str
    name: str
    strategies: Mapping[str, str]
    scores: Mapping[str, FloatArray]
    kl_nats: Mapping[str, FloatArray]
    bits_per_element: float
    is_chosen: bool = False


class PlanRow(Spec):
    """One contender at one total, on one model or on ``all``."""

    model: str
    question: str
    kind: str
    name: str
    is_chosen: bool
    """Whether calibration data named it the best uniform policy; on ``all``, that per model."""
    sequences: int
    bits_per_element: float
    score: float
    """Exact match, for language the share of unchanged most likely tokens; mean over tasks, on held-out sequences."""
    kl_nats: float
    gain: float
    """Score above the best uniform policy as calibration data name it."""
    gain_low: float
    """95 % interval, paired by sequence."""
    gain_high: float
    gain_over_oracle: float
    """Score above the uniform policy that is best on the test sequences themselves."""
    oracle_low: float
    oracle_high: float
    by_task: dict[str, float] = Field(default_factory=dict)
    """Score per task."""
    strategy: str
    """What was tested, spelled; empty where it differs between tasks or models."""


class EnsembleRow(Spec):
    """One contender at one total, on one ensemble or on ``all``; errors are of attention outputs."""

    ensemble: str
    question: str
    kind: str
    name: str
    is_chosen: bool
    sequences: int
    output_error: float
    """Root of the mean squared relative error on held-out sequences."""
    gain: float
    """Share of the squared error that the best uniform policy makes, as calibration data name it, and this does not."""
    gain_low: float
    """95 % interval, paired by sequence."""
    gain_high: float


class PlanResults(Spec):
    """All rows with where they come from."""

    rows: tuple[PlanRow, ...] = Field(min_length=1)
    ensembles: tuple[EnsembleRow, ...] = ()
    provenance: dict[str, Any]

    def over(self, model: str, question: str) -> tuple[PlanRow, ...]:
        """Rows of one model and total."""
        return tuple(row for row in self.rows if row.model == model and row.question == question)


def summarise(contests: Sequence[Contest]) -> Iterator[PlanRow]:
    """Give rows per model and over all models."""
    for question in dict.fromkeys(one.question for one in contests):
        asked = [one for one in contests if one.question == question]
        models = tuple(dict.fromkeys(one.model for one in asked))
        for group in (*((model,) for model in models), models):
            yield from _rows(question, group, [one for one in asked if one.model in group])


def _rows(question: str, models: tuple[str, ...], contests: Sequence[Contest]) -> Iterator[PlanRow]:
    chosen = [one for one in contests if one.is_chosen]
    oracle = [
        max((one for one in contests if one.model == model and one.kind == "uniform"), key=_score) for model in models
    ]
    by_name: dict[tuple[str, str], list[Contest]] = {}
    for one in contests:
        by_name.setdefault((one.kind, one.name), []).append(one)
    named = list(by_name.items())
    if len(models) > 1:
        named += [(("uniform", CALIBRATED), chosen), (("uniform", ORACLE), oracle)]
    for (kind, name), mine in named:
        spelled = {strategy for one in mine for strategy in one.strategies.values()}
        gain, beyond = _gain(mine, chosen), _gain(mine, oracle)
        yield PlanRow(
            model=models[0] if len(models) == 1 else ALL,
            question=question,
            kind=kind,
            name=name,
            is_chosen=all(one.is_chosen for one in mine),
            sequences=sum(len(scores) for one in mine for scores in one.scores.values()),
            bits_per_element=float(np.mean([one.bits_per_element for one in mine])),
            score=float(np.mean([_score(one) for one in mine])),
            kl_nats=float(np.mean([kl.mean() for one in mine for kl in one.kl_nats.values()])),
            gain=gain[0],
            gain_low=gain[1],
            gain_high=gain[2],
            gain_over_oracle=beyond[0],
            oracle_low=beyond[1],
            oracle_high=beyond[2],
            by_task={task: float(np.mean([one.scores[task].mean() for one in mine])) for task in mine[0].scores},
            strategy=spelled.pop() if len(spelled) == 1 else "",
        )


def _score(one: Contest) -> float:
    return float(np.mean([scores.mean() for scores in one.scores.values()]))


def _gain(mine: Sequence[Contest], theirs: Sequence[Contest]) -> tuple[float, float, float]:
    """Mean difference of scores with its 95 % interval: sequences are drawn again within each model and task."""
    pairs = [
        (one.scores[task].astype(np.float64) - other.scores[task])
        for one, other in zip(mine, theirs, strict=True)
        for task in one.scores
    ]
    return _interval(pairs)


def _interval(pairs: Sequence[DoubleArray]) -> tuple[float, float, float]:
    """Mean over parts of paired differences, each (B,), and its 95 % interval."""
    rng = np.random.default_rng(_SEED)
    drawn: DoubleArray = np.mean([_resampled(pair, rng) for pair in pairs], axis=0)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(np.mean([pair.mean() for pair in pairs])), float(low), float(high)


def _resampled(differences: DoubleArray, rng: np.random.Generator) -> DoubleArray:
    rows = rng.integers(0, len(differences), (DRAWS, len(differences)))
    return np.asarray(differences[rows].mean(axis=1))


def summarise_ensembles(contests: Sequence[EnsembleContest]) -> Iterator[EnsembleRow]:
    """Give rows per ensemble and over all of them; squared errors of an ensemble count beside its baseline's."""
    for question in dict.fromkeys(one.question for one in contests):
        asked = [one for one in contests if one.question == question]
        names = tuple(dict.fromkeys(one.ensemble for one in asked))
        for group in (*((name,) for name in names), names):
            mine = [one for one in asked if one.ensemble in group]
            yield from _ensemble_rows(group[0] if len(group) == 1 else ALL, question, mine)


def _ensemble_rows(ensemble: str, question: str, contests: Sequence[EnsembleContest]) -> Iterator[EnsembleRow]:
    chosen = {(one.ensemble, one.seed): one for one in contests if one.is_chosen}
    by_name: dict[tuple[str, str], list[EnsembleContest]] = {("uniform", CALIBRATED): list(chosen.values())}
    for one in contests:
        by_name.setdefault((one.kind, one.name), []).append(one)
    for (kind, name), mine in by_name.items():
        gain, low, high = _saved([(one.harms, chosen[one.ensemble, one.seed].harms) for one in mine])
        yield EnsembleRow(
            ensemble=ensemble,
            question=question,
            kind=kind,
            name=name,
            is_chosen=all(one.is_chosen for one in mine),
            sequences=sum(len(one.harms) for one in mine),
            output_error=float(np.sqrt(np.mean([one.harms.mean() for one in mine]))),
            gain=gain,
            gain_low=low,
            gain_high=high,
        )


def _saved(pairs: Sequence[tuple[DoubleArray, DoubleArray]]) -> tuple[float, float, float]:
    """Share of the others' squared error that is saved, mean over caches; sequences are drawn again in pairs."""
    rng = np.random.default_rng(_SEED)
    drawn = []
    for mine, theirs in pairs:
        rows = rng.integers(0, len(mine), (DRAWS, len(mine)))
        drawn.append(1.0 - mine[rows].mean(axis=1) / theirs[rows].mean(axis=1))
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return float(np.mean([1.0 - mine.mean() / theirs.mean() for mine, theirs in pairs])), float(low), float(high)


def write_plan_results(
    rows: Iterable[PlanRow],
    ensembles: Iterable[EnsembleRow],
    provenance: Mapping[str, Any],
    folder: Path | None = None,
) -> None:
    """Write the tables and their provenance."""
    folder = folder or preset_dir("small_model")
    for name, fields, found in ((TABLE, PlanRow.model_fields, rows), (ENSEMBLES, EnsembleRow.model_fields, ensembles)):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(fields)
        for row in found:
            writer.writerow([_cell(value) for value in row.model_dump().values()])
        write_atomic(folder / name, text.getvalue().encode())
    write_atomic(folder / RECORD, f"{json.dumps(provenance, indent=1, ensure_ascii=False)}\n".encode())


@lru_cache(maxsize=2)
def load_plan_results(folder: Path | None = None) -> PlanResults:
    """Read the table; raise InvalidSpec where there is none, or a row is not as it should be."""
    folder = folder or preset_dir("small_model")
    path = folder / TABLE
    if not path.exists():
        msg = f"{path}: no such file; write it with tools/write_layer_plans.py"
        raise InvalidSpec(msg)
    rows = [{**row, "by_task": json.loads(row["by_task"])} for row in _read(path)]
    data = {"rows": rows, "ensembles": _read(folder / ENSEMBLES), "provenance": load_json(folder / RECORD)}
    return validate(PlanResults, data, path.name)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _cell(value: object) -> object:
    if isinstance(value, dict):
        return json.dumps({name: round(number, 4) for name, number in value.items()})
    return f"{value:.4g}" if isinstance(value, float) else value
