"""From what tiers did during a run to the report's section on them: bytes of all ranks, tokens, seconds."""

from __future__ import annotations

from kvsim.deployment import Deployment
from kvsim.report import Report, TiersUse, TierUse
from kvsim.sim.tiers.build import TierResult, TiersResult
from kvsim.tiers import holders
from kvsim.units import TICKS_PER_SECOND


def tiers_use(result: TiersResult, deployment: Deployment) -> TiersUse:
    """Reduce a run's tiers to the report's numbers."""
    reloads, unit = result.reloads, result.unit_tokens
    looked, by_cost = reloads.looked_units, result.reload != "always"
    tiers = tuple(_tier_use(one, looked, unit, holders(deployment)) for one in result.tiers)
    chosen = reloads.chosen if by_cost else dict.fromkeys(reloads.chosen)
    return TiersUse(
        looked_up_tokens=looked * unit,
        device_hit_tokens=reloads.device_units * unit,
        device_hit_rate=reloads.device_units / looked if looked else None,
        tiers=tiers,
        recompute_tokens=reloads.recomputed_units * unit if result.remembers else None,
        recompute_s=reloads.recompute_ticks / TICKS_PER_SECOND if result.remembers else None,
        lossy_tokens=sum(tier.hit_tokens for tier in tiers if tier.is_lossy),
        reload=result.reload,
        chose_load=chosen["load"],
        chose_cut=chosen["cut"],
        chose_compute=chosen["compute"],
        saved_against_load_s=reloads.against_load_ticks / TICKS_PER_SECOND if by_cost else None,
        saved_against_compute_s=reloads.against_compute_ticks / TICKS_PER_SECOND if by_cost else None,
    )


def _tier_use(one: TierResult, looked_units: int, unit_tokens: int, ranks: int) -> TierUse:
    plan, tally = one.plan, one.tally
    unit_bytes = plan.coding.unit_bytes * ranks
    capacity = None if plan.capacity_bytes is None else float(plan.capacity_bytes) * ranks * one.stores
    return TierUse(
        name=plan.name,
        kind=plan.kind,
        encoding=plan.coding.name,
        store=plan.store,
        is_lossy=plan.coding.lossy,
        capacity_bytes=capacity,
        peak_bytes=one.peak_units * unit_bytes,
        stored_bytes=tally.stored_bytes * ranks,
        demoted_bytes=tally.demoted_units * unit_bytes,
        promoted_bytes=tally.promoted_units * unit_bytes,
        evicted_bytes=one.evicted_units * unit_bytes,
        refused_bytes=one.refused_units * unit_bytes,
        loaded_bytes=tally.loaded_bytes * ranks,
        hit_units=tally.hit_units,
        hit_tokens=tally.hit_units * unit_tokens,
        hit_rate=tally.hit_units / looked_units if looked_units else None,
        copy_s=tally.link_ticks / TICKS_PER_SECOND,
        loads=tally.loads,
        wait_mean_s=tally.wait_ticks / tally.loads / TICKS_PER_SECOND if tally.loads else None,
    )


def with_tiers(report: Report, use: TiersUse) -> Report:
    """Add the section to a report, and say how much was served from lossy tiers."""
    notes = report.provenance.notes
    if use.lossy_tokens:
        names = ", ".join(f"{tier.name} ({tier.encoding})" for tier in use.tiers if tier.is_lossy and tier.hit_tokens)
        notes = (*notes, f"{use.lossy_tokens:,} prompt tokens were served from lossy reloads: {names}")
    provenance = report.provenance.model_copy(update={"notes": notes})
    return report.model_copy(update={"tiers": use, "provenance": provenance})
