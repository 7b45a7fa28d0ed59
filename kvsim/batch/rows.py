"""A point's outcome as one flat row, and the schema of all rows, derived from :mod:`kvsim.metrics`."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from kvsim.errors import InfeasibleScenario, KvsimError
from kvsim.metrics import METRICS, read
from kvsim.report import SCHEMA_VERSION, Report
from kvsim.scenario import Scenario
from kvsim.specs.workload import TraceWorkload

if TYPE_CHECKING:
    import polars as pl

    from kvsim.simulate import Comparison

Row = tuple[Any, ...]
IDENTITY_COLUMNS: dict[str, type] = {
    "status": str,  # ok, infeasible or error
    "reason": str,
    "error_type": str,
    "method": str,
    "strategy": str,
    "model": str,
    "device": str,
    "tensor_parallel_size": int,
    "pipeline_parallel_size": int,
    "data_parallel_size": int,
    "enable_expert_parallel": bool,
    "replicas": int,
    "workload": str,
    "seed": int,
    "overrides_json": str,
    "scenario_sha256": str,
    "scenario_json": str,
}
_TYPE_OF_KIND: dict[str, type] = {"figure": float, "float": float, "int": int, "str": str}


def columns() -> Iterator[tuple[str, type]]:
    """Yield every column's name and Python type, in order; Figures also have _low, _high and _basis."""
    yield from IDENTITY_COLUMNS.items()
    for metric in METRICS:
        yield metric.tag, _TYPE_OF_KIND[metric.kind]
        if metric.kind == "figure":
            yield from ((f"{metric.tag}_low", float), (f"{metric.tag}_high", float), (f"{metric.tag}_basis", str))


def schema() -> dict[str, pl.DataType]:
    """Polars schema of a result file."""
    import polars as pl

    dtypes: dict[type, pl.DataType] = {
        str: pl.String(), int: pl.Int64(), float: pl.Float64(), bool: pl.Boolean(),
    }  # fmt: skip
    return {name: dtypes[python_type] for name, python_type in columns()}


def to_frame(rows: Iterable[Row]) -> pl.DataFrame:
    """Rows as a frame with the full schema, whatever is unknown in them."""
    import polars as pl

    return pl.DataFrame(list(rows), schema=schema(), orient="row")


def report_row(report: Report, scenario: Scenario, overrides: dict[str, Any]) -> Row:
    """Flatten a report; ``overrides`` are the point's own values by dotted key."""
    identity = _identity("ok", None, None, report.method, report.strategy, scenario, overrides)
    return (*identity, *_metric_cells(report))


def failure_row(
    error: BaseException, method: str, scenario: Scenario | None, document: dict[str, Any], overrides: dict[str, Any]
) -> Row:
    """Keep a point that gave no report: infeasible, refused, or a bug with the place where it happened."""
    status = "infeasible" if isinstance(error, InfeasibleScenario) else "error"
    reason = str(error)
    if not isinstance(error, KvsimError):
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({PurePath(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        reason = f"{error or type(error).__name__}{place}"
    strategy = scenario.strategy if scenario else None
    identity = _identity(status, reason, type(error).__name__, method, strategy, scenario, overrides, document)
    return (*identity, *_UNKNOWN_METRICS)


def comparison_rows(comparisons: Iterable[Comparison], scenario: Scenario, method: str) -> Iterator[Row]:
    """Flatten a comparison: one row per strategy, those that cannot run included."""
    for comparison in comparisons:
        overrides = {"compression": comparison.strategy}
        variant = scenario.with_strategy(comparison.strategy)
        if comparison.report is not None:
            yield report_row(comparison.report, variant, overrides)
        else:
            error = comparison.error or InfeasibleScenario(comparison.reason or "no reason given")
            yield failure_row(error, method, variant, {}, overrides)


def with_overrides(row: Row, overrides: dict[str, Any]) -> Row:
    """Give the same row for another point whose scenario came out equal."""
    place = list(IDENTITY_COLUMNS).index("overrides_json")
    return (*row[:place], _overrides_json(overrides), *row[place + 1 :])


def _overrides_json(overrides: dict[str, Any]) -> str:
    return json.dumps(overrides, sort_keys=True, default=str)


def _identity(
    status: str,
    reason: str | None,
    error_type: str | None,
    method: str,
    strategy: str | None,
    scenario: Scenario | None,
    overrides: dict[str, Any],
    document: dict[str, Any] | None = None,
) -> Row:
    overrides_json = _overrides_json(overrides)
    head = (status, reason, error_type, method, strategy)
    if scenario is None:
        raw = document or {}
        names = tuple(value if isinstance(value := raw.get(key), str) else None for key in ("model", "device"))
        return (*head, *names, *(None,) * 7, overrides_json, None, json.dumps(raw, default=str))
    return (
        *head, scenario.model, scenario.device, scenario.tensor_parallel_size, scenario.pipeline_parallel_size,
        scenario.data_parallel_size, scenario.enable_expert_parallel, scenario.replicas, workload_label(scenario),
        scenario.seed, overrides_json, scenario.fingerprint(), scenario.model_dump_json(),
    )  # fmt: skip


def workload_label(scenario: Scenario) -> str:
    """Short name of a workload: the preset's, or the trace's format and file, or ``synthetic``."""
    workload = scenario.workload
    if isinstance(workload, str):
        return workload
    if isinstance(workload, TraceWorkload):
        return f"{workload.format}:{PurePath(workload.path).name}"
    return workload.kind


def _metric_cells(report: Report) -> Iterator[Any]:
    for metric in METRICS:
        reading = read(report, metric)
        if metric.kind == "figure":
            yield from reading
        else:
            yield reading.value


_UNKNOWN_METRICS = (None,) * sum(4 if metric.kind == "figure" else 1 for metric in METRICS)
FILE_METADATA_SCHEMA_KEY = "kvsim.schema_version"
FILE_METADATA_VERSION_KEY = "kvsim.version"


def file_metadata() -> dict[str, str]:
    """Footer of a result file: which schema, and which kvsim wrote it."""
    from kvsim import __version__

    return {FILE_METADATA_SCHEMA_KEY: str(SCHEMA_VERSION), FILE_METADATA_VERSION_KEY: __version__}
