"""Charts of an answer, as Plotly figures with the sentence that stands for them where they cannot be seen.

Each function is pure. A strategy keeps its number, colour and symbol in every chart; bars differ in hatching too.
Colours and symbols follow the picture that the CLI writes (Okabe and Ito's palette).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import plotly.graph_objects as go  # type: ignore[import-untyped]
from plotly.subplots import make_subplots  # type: ignore[import-untyped]

from kvsim.metrics import METRIC_BY_TAG, Metric, read
from kvsim.rendering.cells import format_number
from kvsim.rendering.svg import PALETTE, span
from kvsim.report import Report
from kvsim.simulate import Comparison
from kvsim.units import GIBI
from kvsim_dashboard.chart_style import (
    GREY,
    TWO_LINE_ROW_HEIGHT,
    Chart,
    Strategy,
    add_line,
    frame,
    rows_height,
    say_unknown,
    segment_marker,
    strategies_that_ran,
    strategy_axis,
)

LABEL_PLACES: Final = (
    "top right", "bottom right", "top left", "bottom left",
    "middle right", "middle left", "top center", "bottom center",
)  # fmt: skip
EFFECTS: Final = ("capacity_gain", "prefill_tax", "decode_gain", "queueing_effect")
SLO_GREEN: Final = "rgba(0, 158, 115, 0.12)"


def pareto_chart(comparisons: Sequence[Comparison], x_tag: str, y_tag: str) -> Chart:
    """Scatter of two metrics; the dotted line joins the strategies that no other beats in both."""
    x_metric, y_metric = METRIC_BY_TAG[x_tag], METRIC_BY_TAG[y_tag]
    points = []
    for strategy in strategies_that_ran(comparisons):
        x, y = _axis_value(strategy.report, x_metric), _axis_value(strategy.report, y_metric)
        if x is not None and y is not None:
            points.append((strategy, x, y))
    figure = go.Figure()
    front = pareto_front([(x, y) for _, x, y in points], x_metric, y_metric)
    line = sorted((points[i][1], points[i][2]) for i in front)
    add_line(figure, [x for x, _ in line], [y for _, y in line], "no other is better in both")
    for strategy, x, y in points:
        _add_band(figure, strategy, x_metric, y_metric, x, y)
    hover = f"{_title(x_metric)}: %{{x:.4g}}<br>{_title(y_metric)}: %{{y:.4g}}"
    for place, (strategy, x, y) in enumerate(points):
        figure.add_scatter(
            x=[x], y=[y], mode="markers+text", text=[str(strategy.index + 1)], name=strategy.label,
            textposition=LABEL_PLACES[place % len(LABEL_PLACES)], marker=strategy.marker,
            hovertemplate=f"{strategy.name}<br>{hover}<extra></extra>",
        )  # fmt: skip
    if not points:
        say_unknown(figure)
    frame(figure, _axis_title(x_metric), _axis_title(y_metric), 460)
    if points:
        x_range = span([x for _, x, _ in points])
        figure.update_xaxes(range=x_range)
        figure.update_yaxes(range=span([y for _, _, y in points]))
        _shade_slo(figure, points[0][0].report, x_metric, x_range)
    best = ", ".join(points[i][0].name for i in front) or "none"
    alt = f"Scatter of {_title(y_metric)} against {_title(x_metric)}, {len(points)} strategies; unbeaten: {best}."
    return Chart(figure, alt)


def pareto_front(points: Sequence[tuple[float, float]], x_metric: Metric, y_metric: Metric) -> list[int]:
    """Positions of the points that no other point equals or beats in both, beating it in one."""

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        pairs = ((one[0], other[0], x_metric), (one[1], other[1], y_metric))
        ahead = [a < b if metric.better == "lower" else a > b for a, b, metric in pairs]
        level = [a == b for a, b, _ in pairs]
        return any(ahead) and all(first or same for first, same in zip(ahead, level, strict=True))

    return [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]


def effects_chart(comparisons: Sequence[Comparison]) -> Chart:
    """The four effects against native, one panel each; the line at 1 is no change."""
    strategies = strategies_that_ran(comparisons)
    metrics = [METRIC_BY_TAG[tag] for tag in EFFECTS]
    titles = [f"{metric.header}, {metric.better} is better" for metric in metrics]
    figure = make_subplots(1, len(metrics), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.035)
    for column, metric in enumerate(metrics, start=1):
        known = False
        for strategy in strategies:
            reading = read(strategy.report, metric)
            if reading.low is not None and reading.high is not None:
                add_line(figure, [reading.low, reading.high], [strategy.label] * 2, row=1, col=column)
            known |= reading.value is not None
            figure.add_scatter(
                x=[reading.value], y=[strategy.label], mode="markers", marker=strategy.marker, showlegend=False,
                name=strategy.name, hovertemplate=f"{strategy.name}: %{{x:.4g}}x<extra></extra>", row=1, col=column,
            )  # fmt: skip
        figure.add_vline(x=1, line={"color": GREY, "dash": "dot", "width": 1}, row=1, col=column)
        if not known:
            say_unknown(figure, column)
        figure.update_xaxes(title_text="x native", row=1, col=column)
    frame(figure, None, None, rows_height(strategies, 130))
    strategy_axis(figure, strategies)
    alt = (
        f"Four panels, {', '.join(metric.header for metric in metrics)}, as ratios to native for {_names(strategies)}."
    )
    return Chart(figure, alt)


def memory_chart(comparisons: Sequence[Comparison]) -> Chart:
    """Memory of one device in stacked bars; beside each name, the tokens that its KV pool holds."""
    strategies = strategies_that_ran(comparisons)
    figure = go.Figure()
    names = _in_order([term.name for strategy in strategies for term in strategy.report.memory])
    for place, name in enumerate(names):
        terms = [(s, term) for s in strategies for term in s.report.memory if term.name == name]
        figure.add_bar(
            orientation="h", name=name, x=[term.size_bytes / GIBI for _, term in terms],
            y=[_with_tokens(s) for s, _ in terms], customdata=[term.formula for _, term in terms],
            marker=segment_marker(place), hovertemplate=f"{name}: %{{x:.4g}} GiB<br>%{{customdata}}<extra></extra>",
        )  # fmt: skip
    frame(figure, "Memory of one device [GiB]", None, rows_height(strategies, 150, TWO_LINE_ROW_HEIGHT))
    figure.update_layout(barmode="stack", legend_traceorder="normal")
    strategy_axis(figure, strategies, [_with_tokens(s) for s in strategies])
    alt = f"Stacked bars of device memory by {', '.join(names)}, and the tokens that fit, for {_names(strategies)}."
    return Chart(figure, alt)


def memory_waterfall(report: Report) -> Chart:
    """One device's memory, part by part, up to its size."""
    terms = report.memory
    sizes = [term.size_bytes / GIBI for term in terms]
    figure = go.Figure(
        go.Waterfall(
            measure=[*("relative" for _ in terms), "total"], x=[*(term.name for term in terms), "device"],
            y=[*sizes, None], text=[*(format_number(size) for size in sizes), "all"], textposition="outside",
            increasing={"marker": {"color": PALETTE[0]}}, totals={"marker": {"color": GREY}},
            connector={"line": {"color": GREY, "dash": "dot", "width": 1}}, cliponaxis=False, showlegend=False,
        )
    )  # fmt: skip
    frame(figure, None, "Memory [GiB]", 360)
    alt = f"Memory waterfall of {report.strategy} in GiB: " + ", ".join(
        f"{term.name} {format_number(size)}" for term, size in zip(terms, sizes, strict=True)
    )
    return Chart(figure, f"{alt}.")


def time_chart(comparisons: Sequence[Comparison]) -> Chart:
    """Busy engine seconds of prefill and of decode by component."""
    strategies = strategies_that_ran(comparisons)
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=("Prefill", "Decode"), horizontal_spacing=0.04)
    names = _in_order([part.component.value for s in strategies for part in s.report.time_split])
    for place, name in enumerate(names):
        parts = [(s, part) for s in strategies for part in s.report.time_split if part.component.value == name]
        for column, seconds in enumerate(
            ([part.prefill_s for _, part in parts], [part.decode_s for _, part in parts]), start=1
        ):
            figure.add_bar(
                orientation="h", name=name, legendgroup=name, showlegend=column == 1, x=seconds,
                y=[s.label for s, _ in parts], marker=segment_marker(place),
                hovertemplate=f"{name}: %{{x:.4g}} s<extra></extra>", row=1, col=column,
            )  # fmt: skip
    frame(figure, "Busy engine time [s]", None, rows_height(strategies, 150))
    figure.update_layout(barmode="stack", legend_traceorder="normal")
    strategy_axis(figure, strategies)
    alt = f"Stacked bars of busy seconds in prefill and decode by {', '.join(names)}, for {_names(strategies)}."
    return Chart(figure, alt)


def _axis_value(report: Report, metric: Metric) -> float | None:
    value = read(report, metric).value
    return None if value is None or isinstance(value, str) else value * metric.display_scale


def _add_band(figure: go.Figure, strategy: Strategy, x_metric: Metric, y_metric: Metric, x: float, y: float) -> None:
    """Lines from low to high through the point, where a model made a band."""
    x_band, y_band = _axis_band(strategy.report, x_metric), _axis_band(strategy.report, y_metric)
    if x_band is not None:
        add_line(figure, x_band, [y, y])
    if y_band is not None:
        add_line(figure, [x, x], y_band)


def _axis_band(report: Report, metric: Metric) -> list[float] | None:
    reading = read(report, metric)
    if reading.low is None or reading.high is None:
        return None
    return [reading.low * metric.display_scale, reading.high * metric.display_scale]


def _shade_slo(figure: go.Figure, report: Report, x_metric: Metric, x_range: tuple[float, float]) -> None:
    """Green ground where the horizontal axis meets the scenario's objective; a speed is an inverse TPOT."""
    slo = report.scenario.slo
    limits_s = {"tpot": slo.tpot_s, "ttft": slo.ttft_s}
    limit_s = next((limit for name, limit in limits_s.items() if name in x_metric.tag), None)
    ends = (x_range[0], limit_s * x_metric.scale) if limit_s is not None else None
    if x_metric.tag == "tokens_per_s_per_user" and slo.tpot_s:
        ends = (1 / slo.tpot_s, x_range[1])
    if ends is not None and ends[0] < ends[1]:
        figure.add_vrect(
            x0=ends[0], x1=min(ends[1], x_range[1]), fillcolor=SLO_GREEN, line_width=0, layer="below",
            annotation_text="meets the SLO", annotation_position="inside top right",
        )  # fmt: skip


def _with_tokens(strategy: Strategy) -> str:
    return f"{strategy.label}<br>{strategy.report.kv.capacity_tokens:,} tokens"


def _in_order(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _names(strategies: Sequence[Strategy]) -> str:
    return ", ".join(strategy.name for strategy in strategies) or "no strategy"


def _title(metric: Metric) -> str:
    return f"{metric.header} [{metric.shown_unit}]" if metric.shown_unit else metric.header


def _axis_title(metric: Metric) -> str:
    return f"{_title(metric)}, {metric.better} is better" if metric.better else _title(metric)
