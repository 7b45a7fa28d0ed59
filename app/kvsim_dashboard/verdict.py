"""Which strategy comes first by one metric, and how sure that is. Values are compared, never combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvsim.metrics import METRIC_BY_TAG, Metric, Reading, read
from kvsim.rendering.cells import metric_cell, quality_cell
from kvsim.report import Report
from kvsim.simulate import Comparison
from kvsim_dashboard.plain_text import literal

CRITERIA: Final = (
    "usd_per_million_total_tokens",
    "output_throughput_per_device",
    "mean_tpot_ms",
    "p99_tpot_ms",
    "mean_ttft_ms",
    "p99_ttft_ms",
    "request_goodput",
    "kv_max_concurrency",
    "joules_per_output_token",
)
"""Metrics that a verdict may be given by; the first is the default."""
CARD_TAGS: Final = (
    "kv_max_concurrency",
    "mean_ttft_ms",
    "mean_tpot_ms",
    "output_throughput",
    "usd_per_million_total_tokens",
    "joules_per_output_token",
)
NATIVE: Final = "native"


@dataclass(frozen=True)
class Card:
    """One figure of the best strategy beside native's."""

    label: str
    value: str
    native: str
    doc: str


@dataclass(frozen=True)
class Verdict:
    """The sentence, and the cards below it; ``best`` is None where nothing can be ranked."""

    best: str | None
    sentence: str
    cards: tuple[Card, ...] = ()


def give_verdict(comparisons: Sequence[Comparison], tag: str) -> Verdict:
    """Rank the strategies that ran by one metric.

    The first listed wins a tie; native wins where the best shows the same digits.
    """
    metric = METRIC_BY_TAG[tag]
    ran = [(c.strategy, c.report) for c in comparisons if c.report is not None]
    ranked = [(name, report, _number(read(report, metric))) for name, report in ran]
    known = [(name, report, value) for name, report, value in ranked if value is not None]
    if not known:
        return Verdict(
            None, f"{literal(metric.header)} is unknown for every strategy that ran; judge by another metric."
        )
    pick = min if metric.better == "lower" else max
    name, report, _ = pick(known, key=lambda row: row[2])
    native = next((report for strategy, report in ran if strategy == NATIVE), None)
    if native is not None and metric_cell(native, tag).text == metric_cell(report, tag).text:
        name, report = NATIVE, native
    cards = tuple(_card(report, native, card_tag) for card_tag in CARD_TAGS)
    return Verdict(name, f"{_sentence(name, report, native, metric)} {_quality(name, report)}", cards)


def _number(reading: Reading) -> float | None:
    return None if reading.value is None or isinstance(reading.value, str) else reading.value


def _sentence(name: str, report: Report, native: Report | None, metric: Metric) -> str:
    shown = f"{literal(metric.header)} {_spoken(report, metric)}"
    if native is None:
        return f"**{literal(name)}** comes first: {shown}. Native was not compared or cannot run."
    if name == NATIVE:
        return f"No strategy beats **native**: {shown}."
    first, base = read(report, metric), read(native, metric)
    sentence = f"**{literal(name)}** comes first: {shown}, against {_spoken(native, metric)} for native."
    if _bands_overlap(first, base):
        return f"{sentence} The bands overlap, so the order may be the other way round."
    return sentence


def _spoken(report: Report, metric: Metric) -> str:
    cell = metric_cell(report, metric.tag)
    band = f" ({cell.band})" if cell.band else ""
    return literal(f"{cell.text}{band} {metric.shown_unit}".strip())


def _bands_overlap(one: Reading, other: Reading) -> bool:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low <= other.high and other.low <= one.high


def _quality(name: str, report: Report) -> str:
    if name == NATIVE:
        return ""
    if report.quality.status == "unknown":
        return "Its quality risk is **unknown**."
    return f"Published quality: {literal(quality_cell(report).text)}."


def _card(report: Report, native: Report | None, tag: str) -> Card:
    metric = METRIC_BY_TAG[tag]
    unit = f" [{metric.shown_unit}]" if metric.shown_unit else ""
    base = f"native {metric_cell(native, tag).text}" if native is not None else "native not compared"
    return Card(f"{metric.header}{unit}", metric_cell(report, tag).text, base, metric.doc)
