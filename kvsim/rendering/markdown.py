"""Comparisons as a GitHub Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvsim.rendering.cells import COMPARISON_COLUMNS, comparison_cells, comparison_headers, failures
from kvsim.rendering.published import QUALITY_HEADERS, quality_rows

if TYPE_CHECKING:
    from kvsim.simulate import Comparison


def comparison_markdown(comparisons: Sequence[Comparison]) -> str:
    """Render strategies side by side; those that cannot run follow with their reason."""
    aligned = ["---", *("---:" if column.is_number else "---" for column in COMPARISON_COLUMNS)]
    lines = [_row(comparison_headers()), _row(aligned)]
    for comparison in comparisons:
        if comparison.report is not None:
            cells = comparison_cells(comparison.report)
            lines.append(_row([comparison.strategy, *(f"{c.text} ({c.band})" if c.band else c.text for c in cells)]))
    lines += [f"\n- {_escape(strategy)}: {_escape(reason)}" for strategy, reason in failures(comparisons)]
    return "\n".join(lines) + "\n"


def quality_markdown(comparisons: Sequence[Comparison]) -> str:
    """Render every published score of the strategies that ran, one row each; empty where none is known."""
    rows = [
        (comparison.strategy, *row)
        for comparison in comparisons
        if comparison.report is not None
        for row in quality_rows(comparison.report.quality)
    ]
    warnings = [
        f"- {_escape(comparison.strategy)}: {_escape(warning)}"
        for comparison in comparisons
        if comparison.report is not None
        for warning in comparison.report.quality.warnings
    ]
    if not rows:
        return ""
    headers = ("Strategy", *QUALITY_HEADERS)
    table = [_row(headers), _row(["---"] * len(headers)), *(_row(row) for row in rows)]
    return "\n".join([*table, *(["", *warnings] if warnings else [])]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ").replace("<", "&lt;")
