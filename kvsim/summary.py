"""From what a run left behind to a report: three runs (central, optimistic, pessimistic) become figures with bands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvsim.cost.basis import component_basis
from kvsim.cost.front_end import front_end, overhead_prior
from kvsim.cost.priors import Edge
from kvsim.deployment import Deployment
from kvsim.energy import PhaseSeconds, energy_joules
from kvsim.ops import Component
from kvsim.report import (
    BasisShare,
    Cost,
    Counts,
    Energy,
    Figure,
    Latency,
    LatencyStats,
    SpeculationOutcome,
    Throughput,
    TimeShare,
)
from kvsim.requests import RequestTable
from kvsim.scenario import Slo
from kvsim.sim.handover import TransferRecord
from kvsim.sim.recorder import PhaseTicks, ReplicaRecord
from kvsim.sim.run import RunResult
from kvsim.specs.base import Basis
from kvsim.specs.speculation import SpeculativeConfig
from kvsim.statistics import Distribution, of_gaps, of_samples, spread
from kvsim.units import MEGA, SECONDS_PER_HOUR, TICKS_PER_SECOND


@dataclass(frozen=True)
class Outcome:
    """Numbers of one run at one edge, in seconds and tokens."""

    edge: Edge
    duration_s: float
    queue_delay_mean_s: float | None
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2el: Distribution
    completed: int
    good: int | None
    input_tokens: int
    output_tokens: int
    phases: PhaseSeconds
    prefill: Mapping[Component, float]
    decode: Mapping[Component, float]
    pools: tuple[PhaseSeconds, ...] = ()
    """Engine time of the prefill pool and of the decode pool, where there are two."""
    transfers: TransferRecord | None = None


def outcome(result: RunResult, requests: RequestTable, slo: Slo, edge: Edge) -> Outcome:
    """Reduce one run to its numbers."""
    sent_s, first_s, last_s = result.log.client_seconds()
    done = last_s >= 0
    ttft_s, e2el_s = (first_s - sent_s)[done], (last_s - sent_s)[done]
    queued = np.asarray(result.log.scheduled, dtype=np.float64) - np.asarray(result.log.arrived, dtype=np.float64)
    generated = requests.output_tokens[done]
    several = generated > 1
    tpot_s = np.zeros_like(ttft_s)
    tpot_s[several] = (e2el_s - ttft_s)[several] / (generated[several] - 1)
    held_back = [(1, count, ticks, 0) for record in result.records for ticks, count in record.held_back]
    runs = np.concatenate(
        [*(record.runs.table() for record in result.records), np.array(held_back, dtype=np.int64).reshape(-1, 4)]
    )
    gaps = [gap for record in result.records for gap in record.gaps]
    duration_s = (result.end_ticks + result.log.egress_ticks) / TICKS_PER_SECOND
    split = result.prefill_replicas
    halves = (result.records[:split], result.records[split:]) if split else ()
    return Outcome(
        edge=edge,
        duration_s=duration_s,
        queue_delay_mean_s=float(queued[done].mean() / TICKS_PER_SECOND) if done.any() else None,
        ttft=of_samples(ttft_s),
        tpot=of_samples(tpot_s[several]),
        itl=of_gaps(runs, gaps, TICKS_PER_SECOND),
        e2el=of_samples(e2el_s),
        completed=int(done.sum()),
        good=_good(slo, ttft_s, tpot_s, e2el_s),
        input_tokens=int(requests.prompt_tokens[done].sum()),
        output_tokens=int(generated.sum()),
        phases=_phases(result.records, duration_s),
        prefill=_components([record.prefill for record in result.records]),
        decode=_components([record.decode for record in result.records]),
        pools=tuple(_phases(records, duration_s) for records in halves),
        transfers=result.transfers,
    )


def _phases(records: Sequence[ReplicaRecord], duration_s: float) -> PhaseSeconds:
    """Engine time of some replicas over a run."""
    contention_s = sum(record.contention_ticks for record in records) / TICKS_PER_SECOND
    # Compaction on a side stream overlaps steps, and what it costs them is their contention already.
    aside_s = sum(record.aside_ticks for record in records) / TICKS_PER_SECOND
    prefill_s = sum(_components([record.prefill for record in records]).values()) - aside_s
    decode_s = sum(_components([record.decode for record in records]).values()) + contention_s
    return PhaseSeconds(prefill_s, decode_s, max(0.0, duration_s * len(records) - prefill_s - decode_s))


def _good(slo: Slo, ttft_s: np.ndarray, tpot_s: np.ndarray, e2el_s: np.ndarray) -> int | None:
    """Requests that meet every objective set; a one-token request has a TPOT of 0 (vLLM bench)."""
    if not slo.is_set:
        return None
    met = np.ones(len(ttft_s), dtype=bool)
    for limit_s, values_s in ((slo.ttft_s, ttft_s), (slo.tpot_s, tpot_s), (slo.e2el_s, e2el_s)):
        if limit_s is not None:
            met &= values_s <= limit_s
    return int(met.sum())


def _components(phases: list[PhaseTicks]) -> dict[Component, float]:
    return {
        component: sum(getattr(phase, component.value) for phase in phases) / TICKS_PER_SECOND
        for component in Component
    }


def band(outcomes: tuple[Outcome, ...], read: Callable[[Outcome], float | None], basis: Basis | None) -> Figure:
    """Figure of one number over the edges: the central value, and the span of all of them."""
    if read(outcomes[0]) is None:
        return Figure(value=None)
    return spread([value for value in map(read, outcomes) if value is not None], basis)


def latency(outcomes: tuple[Outcome, ...], basis: Basis) -> Latency:
    """The four latencies of vLLM bench."""

    def stats(read: Callable[[Outcome], Distribution]) -> LatencyStats:
        def figure(field: str) -> Figure:
            return band(outcomes, lambda one: getattr(read(one), field), basis)

        return LatencyStats(
            count=read(outcomes[0]).count,
            mean_s=figure("mean_s"),
            median_s=figure("median_s"),
            std_s=figure("std_s"),
            p90_s=figure("p90_s"),
            p95_s=figure("p95_s"),
            p99_s=figure("p99_s"),
        )

    return Latency(
        ttft=stats(lambda one: one.ttft),
        tpot=stats(lambda one: one.tpot),
        itl=stats(lambda one: one.itl),
        e2el=stats(lambda one: one.e2el),
    )


def request_overhead(deployment: Deployment, edges: tuple[Edge, ...]) -> Figure:
    """Time of a request outside the engine: the scenario's own figure, or the engine's prior."""
    given = deployment.engine.request_overhead_s
    if given is not None or overhead_prior(deployment) is None:
        return Figure(value=given or 0.0)
    return spread([front_end(deployment, edge).overhead_s for edge in edges], Basis.LITERATURE)


def throughput(outcomes: tuple[Outcome, ...], basis: Basis) -> Throughput:
    """Rates over the run."""

    def rate(read: Callable[[Outcome], float | None]) -> Figure:
        return band(outcomes, lambda one: _ratio(read(one), one.duration_s), basis)

    return Throughput(
        request_throughput=rate(lambda one: one.completed),
        output_throughput=rate(lambda one: one.output_tokens),
        total_token_throughput=rate(lambda one: one.input_tokens + one.output_tokens),
        request_goodput=rate(lambda one: one.good),
        slo_attainment=band(outcomes, lambda one: _ratio(one.good, one.completed), basis),
    )


def _ratio(value: float | None, over: float) -> float | None:
    return value / over if value is not None and over > 0 else None


def counts(result: RunResult, requests: RequestTable) -> Counts:
    """What happened, summed over replicas."""
    records = result.records
    rejected = sum(result.log.rejected)
    done = np.asarray(result.log.finished) >= 0
    return Counts(
        num_prompts=len(requests),
        completed=len(requests) - rejected,
        rejected=rejected,
        total_input_tokens=int(requests.prompt_tokens[done].sum()),
        total_output_tokens=int(requests.output_tokens[done].sum()),
        cached_prompt_tokens=sum(record.cached_prompt_tokens for record in records),
        recomputed_tokens=sum(record.recomputed_tokens for record in records),
        preemptions=sum(record.preemptions for record in records),
        engine_steps=sum(record.steps for record in records),
        max_concurrent_requests=max(record.max_running for record in records),
        max_waiting_requests=max(record.max_waiting for record in records),
    )


def speculation(result: RunResult, config: SpeculativeConfig | None) -> SpeculationOutcome | None:
    """How far drafts carried, and what they cost; None without drafts."""
    if config is None:
        return None
    verified = sum(record.verifications for record in result.records)
    tokens = sum(record.verified_tokens for record in result.records)
    decode = sum(record.decode.total for record in result.records)
    drafting = sum(record.drafting_ticks for record in result.records)
    return SpeculationOutcome(
        acceptance_length=_ratio(tokens, verified),
        expected_acceptance_length=config.mean_length,
        verifications=verified,
        drafting_share=_ratio(drafting, decode),
    )


def time_split(one: Outcome, deployment: Deployment) -> tuple[TimeShare, ...]:
    """Busy time by component."""
    bases = component_basis(deployment)
    total_s = sum(one.prefill.values()) + sum(one.decode.values())
    return tuple(
        TimeShare(
            component=component,
            prefill_s=one.prefill[component],
            decode_s=one.decode[component],
            share=(one.prefill[component] + one.decode[component]) / total_s if total_s else 0.0,
            basis=bases[component],
        )
        for component in Component
    )


def coverage(shares: tuple[TimeShare, ...]) -> tuple[BasisShare, ...]:
    """Share of busy time by basis."""
    present = {share.basis for share in shares}
    return tuple(
        BasisShare(basis=basis, share=sum(share.share for share in shares if share.basis is basis))
        for basis in Basis
        if basis in present
    )


def weakest_basis(shares: tuple[TimeShare, ...]) -> Basis:
    """The least certain basis that any of the time rests on."""
    order = list(Basis)
    return max((share.basis for share in shares if share.share > 0), key=order.index, default=Basis.DATASHEET)


def hourly_usd(deployment: Deployment) -> float | None:
    """Price of a deployment's devices for an hour; None where it is unknown."""
    return deployment.price.usd_per_device_hour * deployment.num_devices if deployment.price else None


def cost(
    deployment: Deployment, outcomes: tuple[Outcome, ...], basis: Basis, prefill_pool: Deployment | None = None
) -> Cost:
    """Dollars of the run. Input and output tokens share the bill by the engine time of their phase.

    With a pool for each, prompts pay for theirs and output for its own.
    """
    usd_per_hour = decode_usd = hourly_usd(deployment)
    prefill_usd = hourly_usd(prefill_pool) if prefill_pool is not None else None
    if prefill_pool is not None:
        usd_per_hour = decode_usd + prefill_usd if decode_usd is not None and prefill_usd is not None else None

    def usd(one: Outcome) -> float | None:
        return usd_per_hour * one.duration_s / SECONDS_PER_HOUR if usd_per_hour is not None else None

    def per_million(one: Outcome, share: float, tokens: int) -> float | None:
        bill = usd(one)
        return bill * share / tokens * MEGA if bill is not None and tokens else None

    def prefill_share(one: Outcome) -> float:
        if prefill_usd is not None and usd_per_hour:
            return prefill_usd / usd_per_hour
        return one.phases.prefill_s / one.phases.busy_s if one.phases.busy_s else 0.0

    def figure(read: Callable[[Outcome], float | None]) -> Figure:
        return band(outcomes, read, basis)

    first = outcomes[0]
    return Cost(
        price=deployment.price,
        usd_per_hour=Figure(value=usd_per_hour, basis=Basis.LITERATURE if usd_per_hour is not None else None),
        usd_per_million_input_tokens=figure(lambda one: per_million(one, prefill_share(one), one.input_tokens)),
        usd_per_million_output_tokens=figure(lambda one: per_million(one, 1 - prefill_share(one), one.output_tokens)),
        usd_per_million_total_tokens=figure(lambda one: per_million(one, 1.0, one.input_tokens + one.output_tokens)),
        tokens_per_usd=figure(lambda one: _inverse(per_million(one, 1.0, one.input_tokens + one.output_tokens))),
        engine_utilization=first.phases.busy_s / first.phases.total_s if first.phases.total_s else None,
    )


def _inverse(usd_per_million: float | None) -> float | None:
    return MEGA / usd_per_million if usd_per_million else None


def energy(deployment: Deployment, outcomes: tuple[Outcome, ...], prefill_pool: Deployment | None = None) -> Energy:
    """Joules per token of the devices alone, those of both pools where there are two."""

    def joules(one: Outcome) -> float | None:
        if prefill_pool is not None:
            parts = [
                energy_joules(pool, phases, one.edge)
                for pool, phases in zip((prefill_pool, deployment), one.pools, strict=True)
            ]
            return None if None in parts else sum(part for part in parts if part is not None)
        return energy_joules(deployment, one.phases, one.edge)

    def figure(read: Callable[[Outcome], float | None]) -> Figure:
        return band(outcomes, read, Basis.LITERATURE)

    return Energy(
        joules_per_output_token=figure(lambda one: _ratio(joules(one), one.output_tokens)),
        joules_per_total_token=figure(lambda one: _ratio(joules(one), one.input_tokens + one.output_tokens)),
        mean_power_w=figure(lambda one: _ratio(joules(one), one.duration_s)),
    )
