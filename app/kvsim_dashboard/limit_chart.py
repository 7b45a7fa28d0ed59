"""The rate-distortion plane: what no code can beat, and where encodings lie. Pure, as the other charts are."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, log10
from typing import Any, Final

import plotly.graph_objects as go  # type: ignore[import-untyped]

from kvsim.limit import EncodingPoint, LimitAnswer
from kvsim.rendering.svg import PALETTE
from kvsim_dashboard.chart_style import GREY, SYMBOLS, Chart

HEIGHT: Final = 620
NO_BREAK_SPACE: Final = "\N{NO-BREAK SPACE}"
MAX_BITS: Final = 9.5
ERROR_RANGE: Final = (1e-5, 1.3)
LINES: Final = (
    ("isotropic", "4^-R: isotropic or rotated vectors", "solid", 2.5),
    ("head", "reverse water-filling: each head's covariance", "dash", 2.5),
    ("layer", "reverse water-filling: all heads of a layer", "dot", 1.5),
)
"""(curve, legend, dash, width)."""


def rate_distortion_chart(answer: LimitAnswer) -> Chart:
    """Relative error over bits per value; read across, the distance of an encoding to a line is its gap in bits."""
    figure = go.Figure()
    for name, legend, dash, width in LINES:
        figure.add_scatter(
            x=answer.curve.bits_per_value, y=getattr(answer.curve, name), mode="lines", name=legend,
            line={"color": GREY, "dash": dash, "width": width}, hovertemplate=f"{legend}: %{{y:.3g}}<extra></extra>",
        )  # fmt: skip
    _shade_unreachable(figure, answer)
    shown = [point for point in answer.points if _is_shown(point)]
    for place, family in enumerate(dict.fromkeys(point.family for point in shown)):
        _add_family(figure, place, family, [point for point in shown if point.family == family])
    _name_front(figure, shown)
    figure.update_xaxes(title_text="bits per K and V value, all that is stored", range=[0, MAX_BITS], automargin=True)
    figure.update_yaxes(
        title_text="relative error of K and V", type="log", range=[log10(error) for error in ERROR_RANGE],
        exponentformat="power", dtick=1, automargin=True,
    )  # fmt: skip
    figure.update_layout(
        height=HEIGHT, margin={"l": 10, "r": 10, "t": 20, "b": 10},
        legend={"orientation": "h", "yanchor": "top", "y": -0.13, "x": 0},
    )  # fmt: skip
    return Chart(figure, _alt(answer, shown))


def outside(answer: LimitAnswer) -> list[EncodingPoint]:
    """Points that the axes leave out: lossless, or too large."""
    return [point for point in answer.points if not _is_shown(point)]


def _is_shown(point: EncodingPoint) -> bool:
    low, high = ERROR_RANGE
    return isfinite(point.relative_mse) and low <= point.relative_mse <= high and point.bits_per_value <= MAX_BITS


def _shade_unreachable(figure: go.Figure, answer: LimitAnswer) -> None:
    """Fill what lies below the lower limit of a head's covariance."""
    bits = answer.curve.bits_per_value
    figure.add_scatter(
        x=[*bits, bits[-1], bits[0]], y=[*answer.curve.head, ERROR_RANGE[0] / 10, ERROR_RANGE[0] / 10], mode="lines",
        fill="toself", fillcolor="rgba(128, 128, 128, 0.13)", line={"width": 0}, hoverinfo="skip",
        name="below: no code of Gaussian vectors, one by one",
    )  # fmt: skip


def _add_family(figure: go.Figure, place: int, family: str, points: Sequence[EncodingPoint]) -> None:
    marker: dict[str, Any] = {
        "color": PALETTE[place % len(PALETTE)],
        "symbol": SYMBOLS[(place + place // len(SYMBOLS)) % len(SYMBOLS)],
        "size": 11,
        "line": {"color": GREY, "width": 1},
    }
    words = [[point.strategy, _gap(point.gap_isotropic_bits), _gap(point.gap_head_bits)] for point in points]
    figure.add_scatter(
        x=[point.bits_per_value for point in points], y=[point.relative_mse for point in points], mode="markers",
        marker=marker, name=family, customdata=words,
        hovertemplate="<b>%{customdata[0]}</b><br>%{x:.3g} bits, error %{y:.3g}<br>%{customdata[1]} bits above 4^-R, "
        "%{customdata[2]} above the covariance's<extra></extra>",
    )  # fmt: skip


def _name_front(figure: go.Figure, points: Sequence[EncodingPoint]) -> None:
    """Write the names of the encodings nearest to the lines: corners of the lower hull in bits and log error."""
    front: list[EncodingPoint] = []
    for point in sorted(points, key=lambda one: (one.bits_per_value, one.relative_mse)):
        while len(front) > 1 and _slope(front[-2], point) < _slope(front[-2], front[-1]):
            front.pop()
        if not front or point.relative_mse < front[-1].relative_mse:
            front.append(point)
    figure.add_scatter(
        x=[point.bits_per_value for point in front], y=[point.relative_mse for point in front], mode="text",
        text=[f"{point.strategy}{3 * NO_BREAK_SPACE}" for point in front], textposition="middle left",
        textfont={"size": 10}, showlegend=False, hoverinfo="skip",
    )  # fmt: skip


def _slope(one: EncodingPoint, other: EncodingPoint) -> float:
    across = other.bits_per_value - one.bits_per_value
    return log10(other.relative_mse / one.relative_mse) / across if across else 0.0


def _gap(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:+.2f}"


def _alt(answer: LimitAnswer, shown: Sequence[EncodingPoint]) -> str:
    gaps = [(point.gap_isotropic_bits, point.strategy) for point in shown if point.gap_isotropic_bits is not None]
    nearest = f"; nearest to 4^-R: {min(gaps)[1]}, {min(gaps)[0]:+.2f} bits per value" if gaps else ""
    return f"Relative error against bits per value of {len(shown)} encodings, with three limits{nearest}."
