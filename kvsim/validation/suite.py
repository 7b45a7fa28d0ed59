"""What a validation suite is: measured figures, what kvsim predicts for each, and the errors between them.

All errors are fractions: ``ape`` is the magnitude of predicted over measured less one, ``bias`` the median with sign.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvsim.errors import InvalidSpec

FloatArray = npt.NDArray[np.float64]
Progress = Callable[[float], None]
NO_FIGURE = "no figure in the row"
DIRECTION = "direction"
"""Metric whose samples are ratios and whose score is the share of right signs."""


@dataclass(frozen=True)
class Skipped:
    """Rows that are not scored, and why."""

    reason: str
    """Short and constant; reports count by it."""
    count: int


@dataclass(frozen=True)
class Samples:
    """Measured and predicted values of one metric, in the metric's unit, that share their groups.

    ``groups`` names what the rows have in common, such as ``{"device": "h100-sxm", "domain": "cold"}``.
    """

    metric: str
    measured: FloatArray
    predicted: FloatArray
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """Errors over ``n`` figures; ``correct`` alone (the share of right directions) for the metric `DIRECTION`."""

    n: int
    median_ape: float | None
    p90_ape: float | None
    bias: float | None
    correct: float | None = None


@dataclass(frozen=True)
class Result:
    """What a suite found.

    ``rows`` counts the table rows (or log entries) that were scored; ``groups`` and ``overall`` map a metric to its
    score, ``groups`` by ``name=value``.
    """

    suite: str
    rows: int
    skipped: tuple[Skipped, ...]
    groups: Mapping[str, Mapping[str, Score]]
    overall: Mapping[str, Score]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How to validate.

    Attributes
    ----------
    as_unseen : str or None
        Name of a device (ours): everything measured on it is ignored when predicting, and it alone is scored.
    calibration : str
        Name or path of the calibration set.
    workers : int
        Processes.
    """

    as_unseen: str | None = None
    calibration: str = "default"
    workers: int = 1
    progress: Progress | None = None


class Suite(Protocol):
    """One kind of measurement."""

    @property
    def name(self) -> str:
        """Name on the command line."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it scores, in order."""
        ...

    def run(self, data: Path, options: Options) -> Result:
        """Score the data at `data`: the folder that holds all suites' data, the suite's own folder, or one file.

        Raises
        ------
        InvalidSpec
            The data is not there or not of the suite's format.
        """
        ...


class Tally:
    """Collects samples and skipped rows of a suite."""

    def __init__(self) -> None:
        self.samples: list[Samples] = []
        self._skipped: defaultdict[str, int] = defaultdict(int)
        self.rows = 0
        self.notes: list[str] = []

    def skip(self, reason: str, count: int = 1) -> None:
        """Leave rows out under a name."""
        if count:
            self._skipped[reason] += count

    def add(self, metric: str, measured: float, predicted: float, **groups: str) -> None:
        """Add one figure."""
        self.samples.append(Samples(metric, np.array([measured]), np.array([predicted]), groups))

    def extend(self, samples: Iterable[Samples]) -> None:
        """Add blocks of figures."""
        self.samples.extend(samples)

    def result(self, suite: Suite) -> Result:
        """Score what was collected; groups with one value over all samples are not shown."""
        skipped = tuple(Skipped(reason, count) for reason, count in sorted(self._skipped.items()))
        overall = score_by_metric(self.samples, suite.metrics)
        return Result(suite.name, self.rows, skipped, self._groups(suite.metrics), overall, tuple(self.notes))

    def _groups(self, metrics: Sequence[str]) -> dict[str, Mapping[str, Score]]:
        members: defaultdict[str, list[Samples]] = defaultdict(list)
        for one in self.samples:
            for name, value in one.groups.items():
                members[f"{name}={value}"].append(one)
        return {name: score_by_metric(members[name], metrics) for name in sorted(members)}


def score_by_metric(samples: Sequence[Samples], metrics: Sequence[str]) -> dict[str, Score]:
    """Score each metric that has samples, in the order of `metrics`."""
    found = {}
    for metric in metrics:
        mine = [one for one in samples if one.metric == metric]
        if mine:
            measured = np.concatenate([one.measured for one in mine])
            predicted = np.concatenate([one.predicted for one in mine])
            found[metric] = direction_score(measured, predicted) if metric == DIRECTION else score(measured, predicted)
    return found


def score(measured: FloatArray, predicted: FloatArray) -> Score:
    """Errors of predictions of positive figures."""
    error = predicted / measured - 1.0
    magnitude = np.abs(error)
    return Score(len(error), float(np.median(magnitude)), float(np.quantile(magnitude, 0.9)), float(np.median(error)))


def direction_score(measured: FloatArray, predicted: FloatArray) -> Score:
    """Share of ratios that lie on the same side of one as measured."""
    right = np.sign(measured - 1.0) == np.sign(predicted - 1.0)
    return Score(len(measured), None, None, None, correct=float(right.mean()))


def locate(data: Path, suite: str, subfolders: Sequence[str], markers: Sequence[str]) -> list[Path]:
    """Find a suite's files.

    Parameters
    ----------
    data : Path
        A file, the suite's folder, or a folder that holds it under one of `subfolders`; links are followed.
    markers : sequence of str
        Glob patterns of the suite's files, relative to its folder.

    Raises
    ------
    InvalidSpec
        There is nothing there, or no file of the suite.
    """
    if data.is_file():
        return [data]
    if not data.is_dir():
        msg = f"--data: {data}: no such file or folder"
        raise InvalidSpec(msg)
    folders = [folder for name in subfolders if (folder := data / name).is_dir()] or [data]
    found = sorted({path for folder in folders for pattern in markers for path in folder.glob(pattern)})
    if not found:
        places = ", ".join(f"{name}/" for name in subfolders)
        msg = f"--data: {data}: holds nothing for {suite}: wanted {', '.join(markers)}, there or in {places}"
        raise InvalidSpec(msg)
    return [path for path in found if path.is_file()]


def slug(text: str) -> str:
    """Lower case, with everything but letters, digits and dots as single hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
