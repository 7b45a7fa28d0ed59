"""Three panels per device: Pareto scatter, memory bars, time bars. Each is an SVG fragment at the origin."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvsim.metrics import METRIC_BY_TAG, Reading, read
from kvsim.rendering.numbers import format_number
from kvsim.rendering.svg import (
    FAINT,
    FONT_SIZE,
    GRID,
    INK,
    element,
    line,
    marker,
    nice_ticks,
    segment_fill,
    shortened,
    span,
    text,
    text_width,
)
from kvsim.report import Report
from kvsim.units import GIBI, KILO, MEGA

PANEL_WIDTH = 520.0
PLOT_LEFT = 70.0
PLOT_TOP = 44.0
PLOT_WIDTH = 420.0
PLOT_HEIGHT = 300.0
BAR_LEFT = 172.0
BAR_WIDTH = 200.0
BAR_HEIGHT = 17.0
BAR_PITCH = 24.0
SMALL = 11.0
LABEL_OFFSETS = ((9, -7), (9, 15), (-9, -7), (-9, 15), (16, 4), (-16, 4), (18, -18), (-18, -18), (18, 26), (-18, 26))


@dataclass(frozen=True, slots=True)
class Strategy:
    """A strategy as the panels show it; ``index`` fixes symbol, colour and number in all of them."""

    index: int
    name: str
    report: Report

    @property
    def number(self) -> str:
        """Number beside the symbol."""
        return str(self.index + 1)


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def panel_height(num_strategies: int) -> float:
    """Height that every panel of one row needs, in pixels."""
    legend = PLOT_TOP + PLOT_HEIGHT + 52 + 18 * ((num_strategies + 1) // 2)
    bars = PLOT_TOP + BAR_PITCH * num_strategies + 70
    return max(legend, bars)


def pareto_panel(strategies: Sequence[Strategy]) -> str:
    """Plot speed per user against throughput per device."""
    x_metric, y_metric = METRIC_BY_TAG["tokens_per_s_per_user"], METRIC_BY_TAG["output_throughput_per_device"]
    points = [(s, read(s.report, x_metric), read(s.report, y_metric)) for s in strategies]
    known = [(s, x, y) for s, x, y in points if _value(x) is not None and _value(y) is not None]
    parts = [_panel_title("Speed per user against throughput per device (up and right is better)")]
    if not known:
        return "".join([*parts, text(PLOT_LEFT, PLOT_TOP + 40, "unknown for every strategy", {"fill": FAINT})])
    bottom = PLOT_TOP + PLOT_HEIGHT
    x_scale = _Scale(*span([_value(x) or 0.0 for _, x, _ in known]), PLOT_LEFT, PLOT_LEFT + PLOT_WIDTH)
    y_scale = _Scale(*span([_value(y) or 0.0 for _, _, y in known]), bottom, PLOT_TOP)
    parts.append(_band_caption(known) + _axes(x_scale, y_scale))
    placed: list[tuple[float, float]] = [(x_scale(_value(x) or 0.0), y_scale(_value(y) or 0.0)) for _, x, y in known]
    symbols = []
    for (strategy, _, _), (px, py) in zip(known, tuple(placed), strict=True):
        symbols.append(marker(strategy.index, px, py))
        symbols.append(_number_label(strategy.number, px, py, placed))
    return "".join([*parts, *symbols, _legend(strategies, bottom + 58)])


def _value(reading: Reading) -> float | None:
    return None if reading.value is None or isinstance(reading.value, str) else float(reading.value)


def _panel_title(words: str) -> str:
    return text(8, 16, words, {"font-weight": "bold"})


def _axes(x_scale: _Scale, y_scale: _Scale) -> str:
    bottom, right = PLOT_TOP + PLOT_HEIGHT, PLOT_LEFT + PLOT_WIDTH
    parts = []
    for tick, label in nice_ticks(x_scale.low, x_scale.high):
        x = x_scale(tick)
        parts.append(line(x, PLOT_TOP, x, bottom, GRID))
        parts.append(text(x, bottom + 16, label, {"font-size": SMALL, "text-anchor": "middle"}))
    for tick, label in nice_ticks(y_scale.low, y_scale.high):
        y = y_scale(tick)
        parts.append(line(PLOT_LEFT, y, right, y, GRID))
        parts.append(text(PLOT_LEFT - 6, y + 4, label, {"font-size": SMALL, "text-anchor": "end"}))
    parts.append(line(PLOT_LEFT, bottom, right, bottom, INK))
    parts.append(line(PLOT_LEFT, PLOT_TOP, PLOT_LEFT, bottom, INK))
    centre = {"text-anchor": "middle"}
    parts.append(
        text((PLOT_LEFT + right) / 2, bottom + 34, "output tokens/s per user (1 / median or mean TPOT)", centre)
    )
    turned = {**centre, "transform": f"rotate(-90 14 {(PLOT_TOP + bottom) / 2:g})"}
    parts.append(text(14, (PLOT_TOP + bottom) / 2, "output tokens/s per device", turned))
    return "".join(parts)


def _band_caption(known: Sequence[tuple[Strategy, Reading, Reading]]) -> str:
    """State the bands of the first strategy; drawn for every point they would cover the plot."""
    strategy, x, y = known[0]
    ranges = [
        f"{format_number(reading.low)}\N{EN DASH}{format_number(reading.high)} {unit}"
        for reading, unit in ((x, "tokens/s/user"), (y, "tokens/s/device"))
        if reading.low is not None and reading.high is not None
    ]
    if not ranges:
        return ""
    words = f"Bands, for example of {strategy.number} {strategy.name}: {', '.join(ranges)}"
    return text(8, 31, shortened(words, PANEL_WIDTH - 20, SMALL), {"font-size": SMALL, "fill": FAINT})


def _number_label(number: str, px: float, py: float, placed: list[tuple[float, float]]) -> str:
    """Put the number where it is farthest from what is drawn already; remember the place."""

    def clearance(offset: tuple[float, float]) -> float:
        x, y = px + offset[0], py + offset[1] - 4
        return min(math.hypot(x - qx, y - qy) for qx, qy in placed)

    roomy = [offset for offset in LABEL_OFFSETS if clearance(offset) >= 11]
    dx, dy = roomy[0] if roomy else max(LABEL_OFFSETS, key=clearance)
    placed.append((px + dx, py + dy - 4))
    anchor = "start" if dx > 0 else "end"
    return text(px + dx - (3 if dx > 0 else -3), py + dy, number, {"font-size": SMALL, "text-anchor": anchor})


def _legend(strategies: Sequence[Strategy], top: float) -> str:
    parts = []
    rows = (len(strategies) + 1) // 2
    for place, strategy in enumerate(strategies):
        x, y = PLOT_LEFT - 40 + 235 * (place // rows), top + 18 * (place % rows)
        parts.append(marker(strategy.index, x, y - 4, 5.0))
        parts.append(text(x + 11, y, shortened(f"{strategy.number} {strategy.name}", 215)))
    return "".join(parts)


def memory_panel(strategies: Sequence[Strategy]) -> str:
    """Memory of one device, stacked to its size; at the right, the tokens that the KV pool then holds."""
    names = _ordered_names([[term.name for term in s.report.memory] for s in strategies])
    bars = []
    largest = 0.0
    for strategy in strategies:
        sizes = {term.name: term.size_bytes / GIBI for term in strategy.report.memory}
        largest = max(largest, sum(sizes.values()))
        note = f"{_compact(strategy.report.kv.capacity_tokens)} tokens"
        bars.append((strategy, [max(0.0, sizes.get(name, 0.0)) for name in names], note))
    title = "Memory per device, and tokens that its KV pool holds"
    return _stacked_bars(title, "GiB", names, bars, largest)


def time_panel(strategies: Sequence[Strategy]) -> str:
    """Busy engine time by component, stacked to 100 %; at the right, the bottleneck."""
    names = _ordered_names([[part.component.value for part in s.report.time_split] for s in strategies])
    bars = []
    for strategy in strategies:
        shares = dict.fromkeys(names, 0.0)
        for part in strategy.report.time_split:
            shares[part.component.value] += 100 * part.share
        bars.append((strategy, list(shares.values()), strategy.report.bottleneck))
    return _stacked_bars("Busy engine time by component, and the bottleneck", "% of busy time", names, bars, 100.0)


def _ordered_names(lists: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))


def _compact(tokens: float) -> str:
    for factor, unit in ((MEGA, "M"), (KILO, "k")):
        if tokens >= factor:
            return f"{tokens / factor:.3g}{unit}"
    return f"{tokens:.0f}"


def _stacked_bars(
    title: str, unit: str, names: Sequence[str], bars: Sequence[tuple[Strategy, list[float], str]], largest: float
) -> str:
    """Horizontal stacked bars with a labelled axis and a legend; segments differ in colour and hatching."""
    parts = [_panel_title(title)]
    scale = _Scale(0.0, largest or 1.0, BAR_LEFT, BAR_LEFT + BAR_WIDTH)
    bottom = PLOT_TOP + BAR_PITCH * len(bars)
    for tick, label in nice_ticks(0.0, scale.high, 4):
        parts.append(line(scale(tick), PLOT_TOP - 4, scale(tick), bottom, GRID))
        parts.append(text(scale(tick), bottom + 14, label, {"font-size": SMALL, "text-anchor": "middle"}))
    parts.append(text(BAR_LEFT + BAR_WIDTH + 18, bottom + 14, unit, {"font-size": SMALL}))
    for row, (strategy, values, note) in enumerate(bars):
        parts.append(_bar(scale, PLOT_TOP + BAR_PITCH * row, strategy, values, note, names))
    return "".join([*parts, _segment_legend(names, bottom + 38)])


def _bar(
    scale: _Scale, top: float, strategy: Strategy, values: Sequence[float], note: str, names: Sequence[str]
) -> str:
    baseline = top + BAR_HEIGHT - 4
    label = shortened(f"{strategy.number} {strategy.name}", BAR_LEFT - 30)
    parts = [marker(strategy.index, 14, top + BAR_HEIGHT / 2, 5.0), text(26, baseline, label)]
    reached = 0.0
    for index, value in enumerate(values):
        x, width = scale(reached), scale(reached + value) - scale(reached)
        reached += value
        if width <= 0.2:
            continue
        hover = element("title", {}, html.escape(f"{names[index]}: {format_number(value)}"))
        style: dict[str, str | float] = {"fill": segment_fill(index), "stroke": INK, "stroke-width": 0.5}
        parts.append(element("rect", {"x": x, "y": top, "width": width, "height": BAR_HEIGHT, **style}, hover))
    end = scale(reached) + 6
    parts.append(text(end, baseline, shortened(note, PANEL_WIDTH - end, SMALL), {"font-size": SMALL}))
    return "".join(parts)


def _segment_legend(names: Sequence[str], top: float) -> str:
    parts = []
    x = 14.0
    for index, name in enumerate(names):
        box: dict[str, str | float] = {
            "x": x,
            "y": top - 11,
            "width": 18,
            "height": 12,
            "fill": segment_fill(index),
            "stroke": INK,
        }
        parts.append(element("rect", {**box, "stroke-width": 0.5}))
        parts.append(text(x + 23, top, name))
        x += 36 + text_width(name, FONT_SIZE + 1)
        if x > PANEL_WIDTH - 90 and index + 1 < len(names):
            x, top = 14.0, top + 18
    return "".join(parts)
