"""A vLLM log beside its prediction, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvsim.rendering.numbers import UNKNOWN

if TYPE_CHECKING:
    from kvsim.log_check import LogCheck


def log_check_view(check: LogCheck, name: str) -> RenderableType:
    """One row per figure, and the verdict."""
    scenario = check.scenario
    title = f"{name}: {scenario.model} on {scenario.tensor_parallel_size} x {scenario.device}"
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("")
    for header in ("predicted", "logged", "error"):
        table.add_column(header, justify="right")
    table.add_column("unit")
    for figure in check.figures:
        error = UNKNOWN if figure.error is None else f"{figure.error:+.2%}"
        cells = (_shown(figure.predicted, figure.unit), _shown(figure.logged, figure.unit), error, figure.unit)
        table.add_row(figure.name, *cells, style="bold" if figure.name == check.decisive else "")
    verdict = "within" if check.passed else "outside"
    return Group(table, Text(f"{check.decisive}: {check.error:+.2%}, {verdict} the tolerance of {check.tolerance:.2%}"))


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if unit in ("blocks", "tokens") else f"{value:,.2f}"
