"""Two pools and what crossed between them, for a terminal."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from kvsim.rendering.numbers import UNKNOWN, format_number, format_share
from kvsim.report import DisaggregationReport, Figure, PoolReport, TransferReport
from kvsim.units import format_bytes, format_rate, format_seconds


def pools_view(report: DisaggregationReport) -> tuple[Table, Table]:
    """One column per pool, and one row per fact of the transfers."""
    return _pools(report.pools), _transfer(report.transfer)


def _pools(pools: tuple[PoolReport, ...]) -> Table:
    table = _table("Pools")
    table.add_column("")
    for pool in pools:
        table.add_column(pool.role, justify="right")
    rows = (
        ("devices", [f"{p.num_replicas} x {p.tensor_parallel_size} x {escape(p.device)}" for p in pools]),
        ("engines busy", [_share(p.utilization) for p in pools]),
        ("peak KV use", [format_share(p.peak_kv_utilization) for p in pools]),
        ("blocks per replica", [f"{p.num_blocks:,}" for p in pools]),
        ("most running", [_count(p.max_running) for p in pools]),
        ("longest queue", [_count(p.max_waiting) for p in pools]),
        ("preemptions", [_count(p.preemptions) for p in pools]),
        ("cached prompt tokens", [_count(p.cached_prompt_tokens) for p in pools]),
        ("USD/h", [UNKNOWN if p.usd_per_hour.value is None else format_number(p.usd_per_hour.value) for p in pools]),
    )
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def _transfer(transfer: TransferReport) -> Table:
    table = _table(f"KV transfer over {escape(transfer.link)}, {transfer.transfer}")
    for header in ("", "value", "band", ""):
        table.add_column(header, justify="right" if header in ("value", "band") else "left")
    encoding = f"{transfer.encoding} in transit (lossy)" if transfer.encoding else "as stored"
    table.add_row("format", encoding, "", "")
    most = "" if transfer.max_in_flight is None else f"at most {transfer.max_in_flight:,} at once"
    table.add_row("transfers", f"{transfer.transfers:,}", "", f"[dim]{most}[/dim]")
    table.add_row("KV moved", format_bytes(transfer.wire_bytes), "", "[dim]on the wire, all ranks[/dim]")
    table.add_row("KV per transfer", format_bytes(transfer.bytes_per_transfer), "", "")
    rows = (
        ("port", transfer.link_bytes_per_s, "one direction, efficiency applied"),
        ("set-up", transfer.setup_s, "before the first byte"),
        ("wait for room", transfer.room_wait_mean_s, "mean, after the prompt's end"),
        ("transfer", transfer.transfer_mean_s, "mean, start to end"),
        ("exposed", transfer.exposed_mean_s, "mean, from the prompt's end to the arrival of its KV"),
        ("link use", transfer.link_utilization, "of the busier side's ports"),
    )
    for name, figure, doc in rows:
        table.add_row(name, *_cells(name, figure), f"[dim]{doc}[/dim]")
    return table


def _cells(name: str, figure: Figure) -> tuple[str, str]:
    show = {"port": lambda v: format_rate(v, "B/s"), "link use": format_share}.get(name, format_seconds)
    has_band = figure.low is not None and figure.high is not None and figure.low != figure.high
    return show(figure.value), f"{show(figure.low)} - {show(figure.high)}" if has_band else ""


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _share(figure: Figure) -> str:
    return format_share(figure.value)


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
