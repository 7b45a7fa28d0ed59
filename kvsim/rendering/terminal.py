"""Comparisons, reports and explanations for a terminal, as rich renderables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvsim.metrics import LATENCY_NAMES, METRIC_BY_TAG, STATISTIC_NAMES
from kvsim.rendering.adaptive import adaptive_view
from kvsim.rendering.cells import COMPARISON_COLUMNS, Cell, comparison_cells, comparison_headers, failures, metric_cell
from kvsim.rendering.numbers import UNKNOWN, format_number, format_share
from kvsim.rendering.pools import pools_view
from kvsim.rendering.published import QUALITY_HEADERS, quality_rows
from kvsim.rendering.tiers import tier_tables
from kvsim.report import Report
from kvsim.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from kvsim.explain import Explanation
    from kvsim.simulate import Comparison

BAR_CELLS = 30
SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "KV cache",
        ("kv_bytes_per_token", "kv_fold", "capacity_tokens", "sequence_tokens", "sequence_kv_bytes",
         "kv_max_concurrency", "peak_kv_utilization"),
    ),
    (
        "Throughput",
        ("request_throughput", "output_throughput", "total_token_throughput", "output_throughput_per_device",
         "tokens_per_s_per_user", "request_goodput", "slo_attainment", "mean_queue_delay_ms"),
    ),
    (
        "Requests",
        ("completed", "failed", "cached_prompt_tokens", "recomputed_tokens", "preemptions",
         "max_concurrent_requests"),
    ),
    ("Effects against native", ("prefill_tax", "decode_gain", "capacity_gain", "queueing_effect")),
    (
        "Cost",
        ("usd_per_hour", "usd_per_million_input_tokens", "usd_per_million_output_tokens",
         "usd_per_million_total_tokens", "engine_utilization"),
    ),
    ("Energy", ("joules_per_output_token", "joules_per_total_token", "mean_power_w")),
)  # fmt: skip


def comparison_table(
    comparisons: Sequence[Comparison], title: str | None = None, *, show_bands: bool = True
) -> RenderableType:
    """Strategies side by side; what cannot run follows with its reason.

    Bands stand under their number, except of the paired latencies, whose bands the report and the page show.
    """
    table = Table(title=escape(title) if title else None, box=box.SIMPLE_HEAD, title_justify="left")
    headers = comparison_headers()
    table.add_column(headers[0], no_wrap=True)
    for header, column in zip(headers[1:], COMPARISON_COLUMNS, strict=True):
        table.add_column(escape(header), justify="right" if column.is_number else "left", overflow="fold")
    for comparison in comparisons:
        if comparison.report is not None:
            cells = comparison_cells(comparison.report)
            shown = [_stacked(cell, show_band=show_bands and " / " not in cell.text) for cell in cells]
            table.add_row(escape(comparison.strategy), *shown)
    parts: list[RenderableType] = [table] if table.row_count else []
    parts += [Text(f"{strategy} cannot run: {reason}", style="yellow") for strategy, reason in failures(comparisons)]
    return Group(*parts)


def _stacked(cell: Cell, *, show_band: bool = True) -> Text:
    text = Text(cell.text, style="dim" if cell.text == UNKNOWN else "")
    return text.append(f"\n{cell.band}", style="dim") if cell.band and show_band else text


def report_view(report: Report) -> RenderableType:
    """One report, section by section."""
    scenario = report.scenario
    devices = scenario.num_devices
    head = Text(
        f"{report.strategy}: {report.provenance.model} on {devices} x {report.provenance.device} ({report.method}); "
        f"workload {report.provenance.workload_source}",
        style="bold",
    )
    kv, *others = SECTIONS
    if report.speculation is not None:
        others.insert(2, ("Speculative decoding", ("acceptance_length", "drafting_share")))
    return Group(
        head,
        _section(report, *kv),
        _memory(report),
        _latency(report),
        *(_section(report, title, tags) for title, tags in others),
        *(adaptive_view(report.adaptive) if report.adaptive is not None else ()),
        *tier_tables(report),
        *(pools_view(report.disaggregation) if report.disaggregation is not None else ()),
        _time_split(report),
        *([_quality(report)] if report.quality.notes else []),
        _foot(report),
    )


def _section(report: Report, title: str, tags: Iterable[str]) -> Table:
    table = _table(title, "", "value", "unit", "band", "")
    for tag in tags:
        metric, cell = METRIC_BY_TAG[tag], metric_cell(report, tag)
        unit = "" if cell.text == UNKNOWN else metric.shown_unit
        table.add_row(metric.header, cell.text, unit, cell.band, f"[dim]{escape(metric.doc)}[/dim]")
    return table


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", show_header=True)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index in (1, 3) else "left")
    return table


def _memory(report: Report) -> Table:
    total = sum(term.size_bytes for term in report.memory)
    table = _table("Memory per device", "", "size", "", "share", "basis", "formula")
    for term in report.memory:
        share = term.size_bytes / total if total else None
        formula = f"[dim]{escape(term.formula)}[/dim]"
        table.add_row(
            escape(term.name), format_bytes(term.size_bytes), _bar(share), format_share(share), term.basis, formula
        )
    return table


def _latency(report: Report) -> Table:
    table = Table(title=escape("Latency [ms]"), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("")
    for header in (*STATISTIC_NAMES.values(), "samples"):
        table.add_column(header, justify="right")
    for name in LATENCY_NAMES:
        cells = [_stacked(metric_cell(report, f"{statistic}_{name}_ms")) for statistic in STATISTIC_NAMES]
        table.add_row(name.upper(), *cells, f"{getattr(report.latency, name).count:,}")
    return table


def _time_split(report: Report) -> Table:
    table = _table(f"Busy time (bottleneck: {escape(report.bottleneck)})", "", "share", "", "prefill s", "decode s", "")
    for part in report.time_split:
        table.add_row(
            part.component,
            format_share(part.share),
            _bar(part.share),
            format_number(part.prefill_s),
            format_number(part.decode_s),
            part.basis,
        )
    return table


def _quality(report: Report) -> Table:
    """Published scores; on a narrow terminal every cell wraps."""
    title = "Published quality, on the publication's model and task"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for header in QUALITY_HEADERS:
        table.add_column(header, justify="right" if header in ("Score", "Native") else "left", overflow="fold")
    for row in quality_rows(report.quality):
        table.add_row(*map(escape, row))
    return table


def _bar(share: float | None) -> str:
    return "█" * round(BAR_CELLS * min(1.0, max(0.0, share or 0.0)))


def _foot(report: Report) -> Text:
    price = report.cost.price
    priced = "unknown"
    if price is not None:
        priced = (
            f"${price.usd_per_device_hour:g} per device-hour, {price.provider} {price.commitment}, {price.as_of}"
            f" ({price.source})"
        )
    provenance = report.provenance
    lines = [
        f"Quality: {report.quality.status}",
        *(f"Quality warning: {warning}" for warning in report.quality.warnings),
        f"Price: {priced}",
        f"Basis of busy time: {', '.join(f'{p.basis} {format_share(p.share)}' for p in report.coverage) or UNKNOWN}",
        f"kvsim {provenance.kvsim_version}, calibration {provenance.calibration}, "
        f"scenario {provenance.scenario_sha256[:12]}, model from {provenance.model_source}",
        *(f"Note: {note}" for note in provenance.notes),
    ]
    return Text("\n".join(lines))


def explanation_view(explanation: Explanation) -> RenderableType:
    """Every term of one step with its formula, value, band, basis and source."""
    table = Table(title=escape(explanation.title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for header in ("Phase", "Term", "Formula", "Value", "Band", "Basis", "Source"):
        table.add_column(header, justify="right" if header in ("Value", "Band") else "left")
    previous = ""
    for term in explanation.terms:
        if previous and term.phase != previous:
            table.add_section()
        show = format_bytes if term.unit == "bytes" else format_seconds
        has_band = term.low is not None and term.high is not None and term.low != term.high
        band = f"{show(term.low)} - {show(term.high)}" if has_band else ""
        cells = (term.name, term.formula, show(term.value), band, str(term.basis), term.source)
        table.add_row(term.phase if term.phase != previous else "", *map(escape, cells))
        previous = term.phase
    return Group(table, *(Text(f"Note: {note}") for note in explanation.notes))
