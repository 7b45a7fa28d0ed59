"""Comparisons as a GitHub Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvsim.rendering.cells import COMPARISON_COLUMNS, comparison_cells, comparison_headers, failures

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


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ").replace("<", "&lt;")
