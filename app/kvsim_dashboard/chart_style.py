"""What all charts share: numbers, colours and symbols of the strategies, hatching of bars, axes and margins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import plotly.graph_objects as go  # type: ignore[import-untyped]

from kvsim.rendering.svg import PALETTE
from kvsim.report import Report
from kvsim.simulate import Comparison

SYMBOLS: Final = ("circle", "square", "triangle-up", "diamond", "triangle-down", "pentagon", "hexagon", "star")
PATTERNS: Final = ("", "/", "\\", "x", "-", "+")
GREY: Final = "#808080"
ROW_HEIGHT: Final = 26
TWO_LINE_ROW_HEIGHT: Final = 40
LEGEND_DROP: Final = 62
AXIS_AND_LEGEND: Final = 150
"""Pixels from the plot to its legend, and those that margins, axis and legend take of the height."""


@dataclass(frozen=True)
class Chart:
    """A figure and its text alternative."""

    figure: go.Figure
    alt: str


@dataclass(frozen=True)
class Strategy:
    """A strategy that ran; ``index`` is its place among all that were asked for."""

    index: int
    name: str
    report: Report

    @property
    def label(self) -> str:
        """Number and name, as in the legend."""
        return f"{self.index + 1} {self.name}"

    @property
    def marker(self) -> dict[str, Any]:
        """Colour and symbol; symbols go on differing when the palette starts again."""
        place = self.index + self.index // len(SYMBOLS)
        return {
            "color": PALETTE[self.index % len(PALETTE)],
            "symbol": SYMBOLS[place % len(SYMBOLS)],
            "size": 12,
            "line": {"color": GREY, "width": 1},
        }


def strategies_that_ran(comparisons: Sequence[Comparison]) -> list[Strategy]:
    """Only the rows with a report."""
    return [Strategy(i, c.strategy, c.report) for i, c in enumerate(comparisons) if c.report is not None]


def add_line(
    figure: go.Figure,
    x: Sequence[Any],
    y: Sequence[Any],
    name: str | None = None,
    row: int | None = None,
    col: int | None = None,
) -> None:
    """Thin grey line: a band where it has no name, else the front."""
    dash = "solid" if name is None else "dot"
    figure.add_scatter(
        x=x, y=y, mode="lines", line={"color": GREY, "width": 1, "dash": dash}, name=name or "band",
        showlegend=name is not None, hoverinfo="skip", opacity=0.4 if name is None else 1.0, row=row, col=col,
    )  # fmt: skip


def say_unknown(figure: go.Figure, column: int | None = None) -> None:
    """Write the word where a panel has no figure to show."""
    axis = "" if column in (None, 1) else str(column)
    figure.add_annotation(
        text="unknown", x=0.5, y=0.5, xref=f"x{axis} domain", yref=f"y{axis} domain", showarrow=False,
        font={"color": GREY},
    )  # fmt: skip


def frame(figure: go.Figure, x_title: str | None, y_title: str | None, height: int) -> None:
    """Margins, titled axes, and a legend that stays the same distance below them however low the plot is."""
    figure.update_layout(
        height=height, margin={"l": 10, "r": 10, "t": 40, "b": 10},
        legend={"orientation": "h", "yanchor": "top", "y": -LEGEND_DROP / (height - AXIS_AND_LEGEND), "x": 0},
    )  # fmt: skip
    figure.update_annotations(font={"size": 13})
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True, title_text=y_title)
    if x_title:
        figure.update_xaxes(title_text=x_title)


def strategy_axis(figure: go.Figure, strategies: Sequence[Strategy], labels: Sequence[str] | None = None) -> None:
    """Strategies from top to bottom in the order asked for."""
    order = list(labels or [s.label for s in strategies])
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1], type="category")


def segment_marker(place: int) -> dict[str, Any]:
    """Colour and hatching of the stacked segment at ``place``."""
    return {
        "color": PALETTE[place % len(PALETTE)],
        "pattern": {
            "shape": PATTERNS[place % len(PATTERNS)],
            "size": 7,
            "solidity": 0.2,
            "fillmode": "overlay",
            "fgcolor": "#ffffff",
        },
        "line": {"color": GREY, "width": 0.5},
    }


def rows_height(strategies: Sequence[Strategy], margin: int, row: int = ROW_HEIGHT) -> int:
    """Pixels for one row per strategy, and ``margin`` for axis and legend."""
    return max(300, margin + row * len(strategies))
