"""Many scenarios, one row each: in this process, or spread over worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvsim.batch.grid import Sweep, SweepSpec, check_sweep
from kvsim.batch.rows import Row, failure_row, report_row, to_frame, with_overrides
from kvsim.errors import ScenarioError
from kvsim.scenario import Scenario
from kvsim.scenario_file import build_scenario
from kvsim.workers import worker_pool

if TYPE_CHECKING:
    import polars as pl

Method = Literal["simulation", "estimate"]
CHUNKS_PER_WORKER = 16
MAX_CHUNK_POINTS = 128


@dataclass(frozen=True, slots=True)
class Point:
    """One scenario to evaluate and its place in the result."""

    index: int
    scenario: Scenario
    overrides: dict[str, Any]


@dataclass(slots=True)
class _Results:
    """Rows by index as they come in, whatever the order."""

    total: int
    on_progress: Callable[[int, int], None] | None
    rows: dict[int, Row] = field(default_factory=dict)
    first_with: dict[str, int] = field(default_factory=dict)
    repeats: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)

    def add(self, rows: Iterable[tuple[int, Row]]) -> None:
        self.rows.update(rows)
        if self.on_progress is not None:
            self.on_progress(len(self.rows) + len(self.repeats), self.total)

    def in_order(self) -> list[Row]:
        for index, first, overrides in self.repeats:
            self.rows[index] = with_overrides(self.rows[first], overrides)
        return [self.rows[index] for index in range(self.total)]


def sweep(
    source: Sweep | SweepSpec | Sequence[Scenario],
    *,
    method: Method = "simulation",
    workers: int = 1,
    base_dir: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Evaluate every point and return one row each, in the order of the grid.

    Points that cannot run are rows too, with ``status`` infeasible or error and the ``reason``. Equal scenarios are
    evaluated once.

    Parameters
    ----------
    source
        A sweep (from :func:`load_sweep`), its specification, or scenarios.
    method
        ``simulation``, or the closed-form ``estimate``.
    workers
        Processes. More than one starts them by *spawn*, so a script that calls this needs
        ``if __name__ == "__main__":``.
    base_dir
        Folder that relative paths start from; a loaded sweep has its own.
    on_progress
        Called with (points done, points in all).

    Raises
    ------
    InvalidSpec
        If a sweep's specification itself is wrong.
    """
    if isinstance(source, SweepSpec):
        source = check_sweep(source, base_dir or Path())
    if isinstance(source, Sweep):
        base_dir = source.base_dir
    results = _Results(source.num_points if isinstance(source, Sweep) else len(source), on_progress)
    points = _distinct_points(source, method, results)
    if workers <= 1 or results.total <= 1:
        for point in points:
            results.add(_evaluate([point], method, base_dir))
    else:
        chunk_size = 1
        if method == "estimate":
            chunk_size = max(1, min(MAX_CHUNK_POINTS, results.total // (workers * CHUNKS_PER_WORKER)))
        _evaluate_in_processes(_chunks(points, chunk_size), method, base_dir, workers, results)
    return to_frame(results.in_order())


def _distinct_points(source: Sweep | Sequence[Scenario], method: Method, results: _Results) -> Iterator[Point]:
    """Yield each different scenario once; note repeats, and points whose scenario is wrong, in ``results``."""
    for index, (scenario, overrides) in enumerate(_scenarios(source)):
        if isinstance(scenario, ScenarioError):
            document = {**source.document, **overrides} if isinstance(source, Sweep) else {}
            results.add([(index, failure_row(scenario, method, None, document, overrides))])
            continue
        first = results.first_with.setdefault(scenario.fingerprint(), index)
        if first == index:
            yield Point(index, scenario, overrides)
        else:
            results.repeats.append((index, first, overrides))


def _scenarios(source: Sweep | Sequence[Scenario]) -> Iterator[tuple[Scenario | ScenarioError, dict[str, Any]]]:
    if not isinstance(source, Sweep):
        for scenario in source:
            yield scenario, {}
        return
    document = dict(source.document)
    for overrides in source.points():
        try:
            built = build_scenario(document, overrides.items(), source.where, require_units=source.require_units)
        except ScenarioError as error:
            yield error, overrides
        else:
            yield built, overrides


def _chunks(points: Iterator[Point], size: int) -> Iterator[list[Point]]:
    while chunk := list(islice(points, size)):
        yield chunk


def _evaluate(points: Sequence[Point], method: Method, base_dir: Path | None) -> list[tuple[int, Row]]:
    return [(point.index, _evaluate_point(point, method, base_dir)) for point in points]


def _evaluate_point(point: Point, method: Method, base_dir: Path | None) -> Row:
    from kvsim.simulate import estimate, simulate

    try:
        evaluate = simulate if method == "simulation" else estimate
        report = evaluate(point.scenario, base_dir=base_dir)
    except Exception as error:  # one bad point must not cost the others; the row names the error's type
        return failure_row(error, method, point.scenario, {}, point.overrides)
    return report_row(report, point.scenario, point.overrides)


def _evaluate_in_processes(
    chunks: Iterator[list[Point]], method: Method, base_dir: Path | None, workers: int, results: _Results
) -> None:
    """Hand chunks out while they are still being built; a worker's death becomes rows of its chunk."""
    pending: dict[Future[list[tuple[int, Row]]], list[Point]] = {}
    with worker_pool(workers) as pool:
        for chunk in chunks:
            try:
                pending[pool.submit(_evaluate, chunk, method, base_dir)] = chunk
            except RuntimeError as error:  # BrokenProcessPool: a worker has died already
                results.add(_lost(chunk, error, method))
        for future in as_completed(pending):
            death = future.exception()
            results.add(future.result() if death is None else _lost(pending[future], death, method))


def _lost(chunk: Sequence[Point], error: BaseException, method: Method) -> list[tuple[int, Row]]:
    return [(p.index, failure_row(error, method, p.scenario, {}, p.overrides)) for p in chunk]
