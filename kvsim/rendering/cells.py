"""Numbers as text, and the columns of a comparison; every medium shows the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsim.metrics import METRIC_BY_TAG, Metric, Reading, read
from kvsim.rendering.numbers import EN_DASH, UNKNOWN, format_number, format_share
from kvsim.rendering.published import headline_text
from kvsim.report import Report

if TYPE_CHECKING:
    from kvsim.report import Figure
    from kvsim.simulate import Comparison


@dataclass(frozen=True, slots=True)
class Cell:
    """Text of a table cell, and its band where the number has one."""

    text: str
    band: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the comparison table."""

    header: str
    unit: str
    cell: Callable[[Report], Cell]
    is_number: bool = True


def reading_cell(reading: Reading, metric: Metric) -> Cell:
    """Show a reading in the metric's display unit."""
    if isinstance(reading.value, str):
        return Cell(reading.value)
    scale = metric.display_scale
    show = _shower(metric)
    if reading.value is None:
        return Cell(UNKNOWN)
    text = show(reading.value * scale)
    if metric.kind == "int" and scale == 1.0:
        return Cell(f"{reading.value:,}")
    if reading.low is None or reading.high is None or reading.low == reading.high:
        return Cell(text)
    return Cell(text, f"{show(reading.low * scale)}{EN_DASH}{show(reading.high * scale)}")


def _shower(metric: Metric) -> Callable[[float | None], str]:
    is_share = metric.unit == "" and metric.tag != "compression_ratio"
    return format_share if is_share else format_number


def metric_cell(report: Report, tag: str) -> Cell:
    """Show one metric of a report."""
    metric = METRIC_BY_TAG[tag]
    return reading_cell(read(report, metric), metric)


def _median_and_p99(name: str) -> Callable[[Report], Cell]:
    """Median and p99 of a latency; the mean where that is all an estimate knows."""

    def cell(report: Report) -> Cell:
        median, p99 = metric_cell(report, f"median_{name}_ms"), metric_cell(report, f"p99_{name}_ms")
        mean = metric_cell(report, f"mean_{name}_ms")
        if median.text == p99.text == UNKNOWN and mean.text != UNKNOWN:
            return Cell(f"mean {mean.text}", mean.band)
        band = f"{median.band or '-'} / {p99.band or '-'}" if median.band or p99.band else ""
        return Cell(f"{median.text} / {p99.text}", band)

    return cell


def _single(tag: str) -> Callable[[Report], Cell]:
    return lambda report: metric_cell(report, tag)


def basis_cell(report: Report) -> Cell:
    """Say what most of the busy time rests on."""
    if not report.coverage:
        return Cell(UNKNOWN)
    main = max(report.coverage, key=lambda part: part.share)
    return Cell(f"{main.basis} {format_share(main.share)}")


def quality_cell(report: Report) -> Cell:
    """Say what is known of quality: one published score, or the status."""
    return Cell(headline_text(report.quality))


PREFILL_GROWS = 1.05
"""Input cost beside native's from which a lower output cost is no saving by itself."""
COMPARISON_COLUMNS: tuple[Column, ...] = (
    Column("KV fold", "x", _single("kv_fold")),
    Column("Capacity", "tokens", _single("capacity_tokens")),
    Column("TTFT p50 / p99", "ms", _median_and_p99("ttft")),
    Column("TPOT p50 / p99", "ms", _median_and_p99("tpot")),
    Column("Output", "tok/s", _single("output_throughput")),
    Column("1M output", "USD", _single("usd_per_million_output_tokens")),
    Column("Energy", "J/token", _single("joules_per_output_token")),
    Column("Prefill tax", "x", _single("prefill_tax")),
    Column("Decode gain", "x", _single("decode_gain")),
    Column("Basis", "", basis_cell, is_number=False),
    Column("Quality", "", quality_cell, is_number=False),
)


def comparison_headers() -> list[str]:
    """Headers with units, the strategy first."""
    return ["Strategy", *(f"{c.header} [{c.unit}]" if c.unit else c.header for c in COMPARISON_COLUMNS)]


def comparison_cells(report: Report) -> list[Cell]:
    """Cells of one strategy, in the order of COMPARISON_COLUMNS."""
    return [column.cell(report) for column in COMPARISON_COLUMNS]


def failures(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Strategies that gave no report, each with its reason."""
    return [(c.strategy, c.reason or "no reason given") for c in comparisons if c.report is None]


def moved_cost_note(comparisons: Sequence[Comparison]) -> str | None:
    """Say whose output tokens look cheaper than native's only because a longer prefill takes more of the bill."""
    priced = {c.strategy: c.report.cost for c in comparisons if c.report}
    native = priced.get("native")
    if native is None:
        return None
    moved = [
        f"{name} {format_number(cost.usd_per_million_total_tokens.value or 0.0)}"
        for name, cost in priced.items()
        if (_usd(cost.usd_per_million_output_tokens) or math.inf) < (_usd(native.usd_per_million_output_tokens) or 0.0)
        and (_usd(cost.usd_per_million_input_tokens) or 0.0)
        > PREFILL_GROWS * (_usd(native.usd_per_million_input_tokens) or math.inf)
    ]
    if not moved:
        return None
    return (
        f"1M output is decode's share of the bill, and falls where prefill takes more of it: {', '.join(moved)} USD "
        f"per 1M tokens of both kinds, native {format_number(native.usd_per_million_total_tokens.value or 0.0)}"
    )


def _usd(figure: Figure) -> float | None:
    return figure.value


def shared_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Provenance notes of all reports, each once, in order of appearance."""
    return list(dict.fromkeys(note for c in comparisons if c.report for note in c.report.provenance.notes))
