"""The report's tiers for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from kvsim.rendering.numbers import UNKNOWN, format_share
from kvsim.report import Report, TiersUse, TierUse
from kvsim.units import format_bytes, format_seconds

UNBOUNDED = "unbounded"


def tier_tables(report: Report) -> Iterator[Table]:
    """Where prompt tokens came from, and what each tier did; nothing without tiers."""
    use = report.tiers
    if use is None:
        return
    yield _hits(use)
    if use.tiers:
        yield _traffic(use)
    if use.reload != "always":
        yield _choices(use)


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 else "right")
    return table


def _hits(use: TiersUse) -> Table:
    table = _table(
        f"KV tiers: {use.looked_up_tokens:,} reusable prompt tokens looked up",
        "", "tokens", "hit rate", "loads", "mean wait", "encoding", "lossy",
    )  # fmt: skip
    table.add_row("device", f"{use.device_hit_tokens:,}", format_share(use.device_hit_rate), "", "", "", "")
    for tier in use.tiers:
        wait = format_seconds(tier.wait_mean_s) if tier.loads else ""
        lossy = "yes" if tier.is_lossy else "no"
        rate = format_share(tier.hit_rate)
        table.add_row(tier.name, f"{tier.hit_tokens:,}", rate, f"{tier.loads:,}", wait, tier.encoding, lossy)
    if use.recompute_tokens is not None:
        share = use.recompute_tokens / use.looked_up_tokens if use.looked_up_tokens else None
        spent = f"{format_seconds(use.recompute_s)} of prefill"
        table.add_row("recompute", f"{use.recompute_tokens:,}", format_share(share), "", "", spent, "no")
    return table


def _traffic(use: TiersUse) -> Table:
    headers = (
        "size",
        "peak",
        "stored",
        "demoted here",
        "promoted here",
        "evicted",
        "refused",
        "loaded",
        "copying",
    )
    table = _table("KV tiers: bytes over all replicas and ranks", "", *headers)
    for tier in use.tiers:
        table.add_row(f"{tier.name}, {tier.store}", *_traffic_cells(tier))
    return table


def _traffic_cells(tier: TierUse) -> tuple[str, ...]:
    sizes = (
        tier.peak_bytes, tier.stored_bytes, tier.demoted_bytes, tier.promoted_bytes, tier.evicted_bytes,
        tier.refused_bytes, tier.loaded_bytes,
    )  # fmt: skip
    capacity = UNBOUNDED if tier.capacity_bytes is None else format_bytes(tier.capacity_bytes)
    return (capacity, *map(format_bytes, sizes), format_seconds(tier.copy_s))


def _choices(use: TiersUse) -> Table:
    table = _table(f"Load or compute, {use.reload}", "", "prompts")
    rows = (("load all that is found", use.chose_load), ("load a part", use.chose_cut), ("compute", use.chose_compute))
    for name, count in rows:
        table.add_row(name, UNKNOWN if count is None else f"{count:,}")
    table.add_row("saved against always loading", format_seconds(use.saved_against_load_s))
    table.add_row("saved against never loading", format_seconds(use.saved_against_compute_s))
    return table
