"""From outcomes at the edges to a report."""

from __future__ import annotations

from typing import Literal

from kvsim import __version__
from kvsim.analysis import EdgeModels, capacity, effects, price_edges
from kvsim.cost.basis import pricings, weakest
from kvsim.deployment import Deployment
from kvsim.disaggregation import SplitDeployment
from kvsim.memory import waterfall
from kvsim.pool_summary import disaggregation
from kvsim.prepare import Prepared
from kvsim.quality import published_quality
from kvsim.report import Counts, KernelUsed, Provenance, Quality, Report
from kvsim.sim.run import RunResult
from kvsim.summary import (
    Outcome,
    band,
    cost,
    coverage,
    energy,
    latency,
    request_overhead,
    throughput,
    time_split,
    weakest_basis,
)


def assemble(
    prepared: Prepared,
    models: EdgeModels,
    outcomes: tuple[Outcome, ...],
    method: Literal["simulation", "estimate"],
    tally: Counts,
    peak_kv_utilization: float | None,
    batch: int,
) -> Report:
    """Put a report together from outcomes at the edges."""
    deployment, load = prepared.deployment, prepared.load
    shares = time_split(outcomes[0], deployment)
    basis = weakest_basis(shares)
    return Report(
        method=method,
        strategy=prepared.scenario.strategy,
        scenario=prepared.scenario,
        kv=capacity(models, prepared.plan, load, peak_kv_utilization),
        memory=waterfall(prepared.plan, deployment),
        duration_s=band(outcomes, lambda one: one.duration_s, basis),
        queue_delay_mean_s=band(outcomes, lambda one: one.queue_delay_mean_s, basis),
        request_overhead_s=request_overhead(deployment, tuple(one.edge for one in outcomes)),
        latency=latency(outcomes, basis),
        throughput=throughput(outcomes, basis),
        counts=tally,
        time_split=shares,
        bottleneck=_bottleneck(outcomes[0], peak_kv_utilization),
        effects=effects(models, load, batch),
        cost=cost(deployment, outcomes, basis),
        energy=energy(deployment, outcomes),
        quality=published_quality(deployment.compression) if deployment.adaptive is None else Quality(),
        coverage=coverage(shares),
        provenance=_provenance(prepared),
    )


_BOTTLENECKS = {
    ("prefill", "weights"): "compute of prompts",
    ("prefill", "attention"): "attention over prompts",
    ("decode", "weights"): "streaming of weights",
    ("decode", "attention"): "streaming of KV cache",
    ("prefill", "compression"): "compressing prompts",
    ("decode", "compression"): "unpacking of KV cache",
    ("prefill", "communication"): "collectives",
    ("decode", "communication"): "collectives",
    ("prefill", "overhead"): "kernel launches",
    ("decode", "overhead"): "kernel launches",
}
FULL_POOL = 0.98
IDLE_ENGINE = 0.6


def _bottleneck(one: Outcome, peak_kv_utilization: float | None) -> str:
    """What holds the run back: an empty queue, a full pool, or the largest part of the busy time."""
    times = {("prefill", c.value): s for c, s in one.prefill.items()}
    times |= {("decode", c.value): s for c, s in one.decode.items()}
    largest = _BOTTLENECKS[max(times, key=lambda key: times[key])]
    if peak_kv_utilization is not None and peak_kv_utilization > FULL_POOL:
        return f"KV capacity, then {largest}"
    busy = one.phases.busy_s / one.phases.total_s if one.phases.total_s else 0.0
    if busy < IDLE_ENGINE:
        return f"load (engine busy {busy:.0%}), then {largest}"
    return largest


def _provenance(prepared: Prepared) -> Provenance:
    deployment = prepared.deployment
    return Provenance(
        kvsim_version=__version__,
        scenario_sha256=prepared.scenario.fingerprint(),
        calibration=_calibration_name(deployment),
        kernels=_kernels(deployment),
        device=deployment.device.name,
        model=deployment.model.name,
        model_source=deployment.model.source,
        workload_source=prepared.requests.source,
        notes=prepared.notes,
    )


def _calibration_name(deployment: Deployment) -> str:
    if deployment.calibration is not None:
        return deployment.calibration.name
    if deployment.engine_fit is not None:
        return f"engine level, {deployment.engine_fit.device} {deployment.engine_fit.id}"
    return deployment.priors.name


def _kernels(deployment: Deployment) -> tuple[KernelUsed, ...]:
    used = (
        (pricing.operation, member)
        for pricing in pricings(deployment)
        if pricing.kernel is not None
        for member in pricing.kernel.members
    )
    return tuple(
        KernelUsed(
            operation=operation,
            kernel=kernel.artefact.kernel,
            version=kernel.artefact.version,
            artefact=kernel.artefact_id,
            basis=kernel.basis,
        )
        for operation, kernel in dict.fromkeys(used)
    )


def with_pools(
    report: Report,
    prepared: Prepared,
    split: SplitDeployment,
    central: RunResult | None,
    outcomes: tuple[Outcome, ...],
    batch: int,
) -> Report:
    """Add the section on both pools, and take from the prefill pool what the decode pool cannot tell."""
    shares = tuple(
        mine.model_copy(update={"basis": weakest([mine.basis, other.basis])})
        for mine, other in zip(report.time_split, time_split(outcomes[0], split.prefill), strict=True)
    )
    basis = weakest_basis(shares)
    tax = effects(price_edges(split.prefill, prepared.edges), prepared.load, batch).prefill_tax
    quality = report.quality if split.coding is None else published_quality(split.coding.compression)
    return report.model_copy(
        update={
            "time_split": shares,
            "coverage": coverage(shares),
            "effects": report.effects.model_copy(update={"prefill_tax": tax}),
            "cost": cost(split.decode, outcomes, basis, split.prefill),
            "energy": energy(split.decode, outcomes, split.prefill),
            "quality": quality,
            "provenance": _provenance_of_both(report, split),
            "disaggregation": disaggregation(split, central, outcomes, basis),
        }
    )


def _provenance_of_both(report: Report, split: SplitDeployment) -> Provenance:
    first, second = split.prefill.device.name, split.decode.device.name
    device = first if first == second else f"{first} (prefill) and {second} (decode)"
    kernels = tuple(dict.fromkeys((*_kernels(split.prefill), *report.provenance.kernels)))
    return report.provenance.model_copy(update={"device": device, "kernels": kernels})
