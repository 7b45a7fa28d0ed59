"""Tables of an answer, as columns of text for Streamlit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvsim.metrics import LATENCY_NAMES, METRIC_BY_TAG, METRICS, STATISTIC_NAMES, Metric, read
from kvsim.rendering.cells import EN_DASH, UNKNOWN, format_number, format_share, metric_cell, quality_cell
from kvsim.rendering.published import QUALITY_HEADERS, quality_rows
from kvsim.report import Report
from kvsim.simulate import Comparison
from kvsim.units import format_bytes
from kvsim_dashboard.plain_text import literal

Table = dict[str, list[str]]
WORD_JOINER: Final = "\N{WORD JOINER}"
SIMULATION_TAGS: Final = (
    "kv_max_concurrency", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms",
    "output_throughput", "usd_per_million_total_tokens", "joules_per_output_token",
)  # fmt: skip
ESTIMATE_TAGS: Final = (
    "kv_max_concurrency", "mean_ttft_ms", "mean_tpot_ms", "output_throughput",
    "usd_per_million_total_tokens", "joules_per_output_token",
)  # fmt: skip
BASIS_COLOURS: Final = {
    "measured": "green",
    "fitted": "green",
    "compiled": "violet",
    "transferred": "orange",
    "datasheet": "blue",
    "literature": "gray",
}
"""Badge colours; the badge says the word as well."""


def comparison_table(comparisons: Sequence[Comparison], *, show_bands: bool) -> Table:
    """One row per strategy that ran: value, band and basis of each figure, as Markdown."""
    ran = [(c.strategy, c.report) for c in comparisons if c.report is not None]
    table: Table = {"Strategy and quality": [_name_and_quality(name, report) for name, report in ran]}
    for metric in _known(comparisons):
        table[heading(metric)] = [_markdown(report, metric, show_bands=show_bands) for _, report in ran]
    return table


def _name_and_quality(name: str, report: Report) -> str:
    quality = quality_cell(report).text
    known = f"quality {quality}" if report.quality.status == UNKNOWN else quality
    return f"**{literal(name)}** :small[:gray[{literal(known)}]]"


def unknown_to_all(comparisons: Sequence[Comparison]) -> list[Metric]:
    """Metrics of the comparison that no strategy has; they are named below the table instead of filling a column."""
    known = _known(comparisons)
    return [metric for metric in _metrics(_reports(comparisons)) if metric not in known]


def _known(comparisons: Sequence[Comparison]) -> list[Metric]:
    reports = _reports(comparisons)
    return [metric for metric in _metrics(reports) if any(read(r, metric).value is not None for r in reports)]


def _reports(comparisons: Sequence[Comparison]) -> list[Report]:
    return [c.report for c in comparisons if c.report is not None]


def _metrics(reports: Sequence[Report]) -> list[Metric]:
    """Columns: the fold, or the goodput where objectives are set, then what the method can tell."""
    is_estimate = any(report.method == "estimate" for report in reports)
    has_slo = any(report.scenario.slo.is_set for report in reports) and not is_estimate
    first = "request_goodput" if has_slo else "kv_fold"
    return [METRIC_BY_TAG[tag] for tag in (first, *(ESTIMATE_TAGS if is_estimate else SIMULATION_TAGS))]


def heading(metric: Metric) -> str:
    """Header with the unit."""
    return literal(f"{metric.header} [{metric.shown_unit}]" if metric.shown_unit else metric.header)


def basis_of(report: Report, metric: Metric) -> str | None:
    """What a figure rests on; the KV section states one basis for all its plain numbers."""
    basis = read(report, metric).basis
    if basis is None and isinstance(metric.source, str) and metric.source.startswith("kv."):
        return str(report.kv.basis)
    return basis


def _markdown(report: Report, metric: Metric, *, show_bands: bool) -> str:
    cell = metric_cell(report, metric.tag)
    if cell.text == UNKNOWN:
        return f":gray[{UNKNOWN}]"
    if not show_bands:
        return literal(cell.text)
    parts = [literal(cell.text)]
    if cell.band:
        parts.append(f":small[:gray[{literal(_unbroken(cell.band))}]]")
    basis = basis_of(report, metric)
    if basis is not None:
        parts.append(f":{BASIS_COLOURS[basis]}-badge[:small[{basis}]]")
    return " ".join(parts)


def _unbroken(band: str) -> str:
    """Keep a band on one line."""
    return band.replace(EN_DASH, f"{WORD_JOINER}{EN_DASH}{WORD_JOINER}")


def metric_table(comparisons: Sequence[Comparison]) -> Table:
    """Every metric of kvsim, one per row, one column per strategy that ran."""
    table: Table = {
        "Metric": [metric.header for metric in METRICS],
        "Unit": [metric.shown_unit for metric in METRICS],
        "Meaning": [metric.doc for metric in METRICS],
    }
    for comparison in comparisons:
        if comparison.report is not None:
            cells = [metric_cell(comparison.report, metric.tag) for metric in METRICS]
            table[comparison.strategy] = [f"{cell.text} ({cell.band})" if cell.band else cell.text for cell in cells]
    return table


def memory_table(report: Report) -> Table:
    """Parts of one device's memory with their formulas."""
    return {
        "Part": [literal(term.name) for term in report.memory],
        "Size": [format_bytes(term.size_bytes) for term in report.memory],
        "Formula": [literal(term.formula) for term in report.memory],
        "Basis": [str(term.basis) for term in report.memory],
    }


def quality_table(report: Report) -> Table:
    """Published scores, one per row, the source below its evidence."""
    rows = quality_rows(report.quality)
    shown = {name: [literal(row[place]) for row in rows] for place, name in enumerate(QUALITY_HEADERS)}
    sources = shown.pop("Source")
    shown["Evidence"] = [
        f"{evidence} :small[:gray[{source}]]" for evidence, source in zip(shown["Evidence"], sources, strict=True)
    ]
    return shown


def latency_table(report: Report) -> Table:
    """The four latencies in milliseconds; a statistic that none of them has is left out."""
    table: Table = {"\\[ms\\]": [name.upper() for name in LATENCY_NAMES]}
    for statistic, title in STATISTIC_NAMES.items():
        cells = [metric_cell(report, f"{statistic}_{name}_ms").text for name in LATENCY_NAMES]
        if any(cell != UNKNOWN for cell in cells):
            table[title] = cells
    return table


def time_table(report: Report) -> Table:
    """Busy engine time by component."""
    return {
        "Component": [literal(part.component.value) for part in report.time_split],
        "Prefill \\[s\\]": [format_number(part.prefill_s) for part in report.time_split],
        "Decode \\[s\\]": [format_number(part.decode_s) for part in report.time_split],
        "Share of busy time": [format_share(part.share) for part in report.time_split],
        "Basis": [str(part.basis) for part in report.time_split],
    }
