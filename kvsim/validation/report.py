"""Results as JSON and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvsim.validation.suite import DIRECTION, Result, Score

if TYPE_CHECKING:
    from rich.table import Table

SIGNIFICANT_DIGITS = 6


def result_document(result: Result) -> dict[str, Any]:
    """Give the result as JSON types; errors are fractions, ``correct`` stands with the metric ``direction`` alone."""
    return {
        "suite": result.suite,
        "rows": result.rows,
        "skipped": [{"reason": one.reason, "count": one.count} for one in result.skipped],
        "groups": {name: _scores(scores) for name, scores in result.groups.items()},
        "overall": _scores(result.overall),
        "notes": list(result.notes),
    }


def _scores(scores: Mapping[str, Score]) -> dict[str, dict[str, float | int | None]]:
    return {metric: _score(metric, one) for metric, one in scores.items()}


def _score(metric: str, one: Score) -> dict[str, float | int | None]:
    values: dict[str, float | int | None] = {
        "n": one.n, "median_ape": _rounded(one.median_ape), "p90_ape": _rounded(one.p90_ape),
        "bias": _rounded(one.bias),
    }  # fmt: skip
    return values | ({"correct": _rounded(one.correct)} if metric == DIRECTION else {})


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def result_table(result: Result) -> Table:
    """Lay out a result for the terminal: all rows together, then by group."""
    from rich.table import Table

    table = Table(title=f"{result.suite}: {result.rows} rows scored", title_justify="left")
    table.add_column("group")
    table.add_column("metric")
    for name in ("n", "median", "p90", "bias"):
        table.add_column(name, justify="right")
    for name, scores in (("all", result.overall), *result.groups.items()):
        for metric, one in scores.items():
            table.add_row(name, metric, *score_cells(one))
    return table


def score_cells(one: Score) -> tuple[str, str, str, str]:
    """Count, median, 90th percentile and bias as text; a direction shows its share of right signs as median."""
    if one.correct is not None:
        return (f"{one.n}", f"{one.correct:.0%} right", "", "")
    return (f"{one.n}", _percent(one.median_ape), _percent(one.p90_ape), _percent(one.bias, sign="+"))


def _percent(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.1%}"
