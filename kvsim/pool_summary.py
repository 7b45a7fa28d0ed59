"""The report's section on two pools: what each did, and what crossed between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

from kvsim.cost.priors import EDGES
from kvsim.deployment import Deployment
from kvsim.disaggregation import SplitDeployment
from kvsim.memory import MemoryPlan, waterfall
from kvsim.report import DisaggregationReport, Figure, PoolReport, TransferReport
from kvsim.sim.handover import TransferRecord
from kvsim.sim.recorder import ReplicaRecord
from kvsim.sim.run import RunResult
from kvsim.specs.base import Basis
from kvsim.statistics import spread
from kvsim.summary import Outcome, band, hourly_usd
from kvsim.units import TICKS_PER_SECOND


def disaggregation(
    split: SplitDeployment, result: RunResult | None, outcomes: tuple[Outcome, ...], basis: Basis
) -> DisaggregationReport:
    """Summarise the central run, or an estimate where ``result`` is None, with bands over the edges."""
    first: Sequence[ReplicaRecord] = ()
    second: Sequence[ReplicaRecord] = ()
    sizes = (1, 1)
    if result is not None:
        first, second = result.records[: result.prefill_replicas], result.records[result.prefill_replicas :]
        sizes = (result.prefill_pool_bytes, result.pool_bytes)
    return DisaggregationReport(
        pools=(
            _pool("prefill", split.prefill, split.prefill_plan, first, sizes[0], _utilization(outcomes, 0, basis)),
            _pool("decode", split.decode, split.decode_plan, second, sizes[1], _utilization(outcomes, 1, basis)),
        ),
        transfer=_transfer(split, outcomes, basis, is_estimate=result is None),
    )


def _utilization(outcomes: tuple[Outcome, ...], position: int, basis: Basis) -> Figure:
    def busy(one: Outcome) -> float | None:
        phases = one.pools[position]
        return phases.busy_s / phases.total_s if phases.total_s else None

    return band(outcomes, busy, basis)


def _pool(
    role: Literal["prefill", "decode"],
    deployment: Deployment,
    plan: MemoryPlan,
    records: Sequence[ReplicaRecord],
    pool_bytes: int,
    utilization: Figure,
) -> PoolReport:
    usd = hourly_usd(deployment)
    tallies = _tallies(records, pool_bytes) if records else _Tallies(*[None] * len(fields(_Tallies)))
    return PoolReport(
        role=role,
        device=deployment.device.name,
        num_replicas=deployment.replicas,
        tensor_parallel_size=deployment.tensor_parallel_size,
        memory=waterfall(plan, deployment),
        num_blocks=plan.num_blocks,
        utilization=utilization,
        usd_per_hour=Figure(value=usd, basis=Basis.LITERATURE if usd is not None else None),
        **asdict(tallies),
    )


@dataclass(frozen=True)
class _Tallies:
    peak_kv_utilization: float | None
    engine_steps: int | None
    preemptions: int | None
    recomputed_tokens: int | None
    cached_prompt_tokens: int | None
    max_running: int | None
    max_waiting: int | None


def _tallies(records: Sequence[ReplicaRecord], pool_bytes: int) -> _Tallies:
    return _Tallies(
        peak_kv_utilization=1.0 - min(record.min_free_bytes for record in records) / pool_bytes,
        engine_steps=sum(record.steps for record in records),
        preemptions=sum(record.preemptions for record in records),
        recomputed_tokens=sum(record.recomputed_tokens for record in records),
        cached_prompt_tokens=sum(record.cached_prompt_tokens for record in records),
        max_running=max(record.max_running for record in records),
        max_waiting=max(record.max_waiting for record in records),
    )


def _transfer(
    split: SplitDeployment, outcomes: tuple[Outcome, ...], basis: Basis, *, is_estimate: bool
) -> TransferReport:
    links = [split.link(edge) for edge in EDGES[: len(outcomes)]]
    moved = _record(outcomes[0])

    def mean(field: str) -> Figure:
        def seconds(one: Outcome) -> float | None:
            record = _record(one)
            return getattr(record, field) / record.count / TICKS_PER_SECOND if record.count else None

        return band(outcomes, seconds, basis)

    def link_use(one: Outcome) -> float | None:
        crossing = split.crossing(one.edge)
        rate = min(
            crossing.send_bytes_per_s * split.prefill.replicas, crossing.receive_bytes_per_s * split.decode.replicas
        )
        return _record(one).size_bytes / rate / one.duration_s if one.duration_s else None

    return TransferReport(
        link=links[0].name,
        link_bytes_per_s=spread([link.bytes_per_s for link in links], links[0].basis),
        setup_s=spread([link.setup_s for link in links], links[0].basis),
        transfer=split.spec.transfer,
        encoding=split.coding.name if split.coding else None,
        is_lossy=split.coding is not None and not split.coding.compression.stored.is_exact,
        transfers=moved.count,
        wire_bytes=moved.size_bytes,
        bytes_per_transfer=moved.size_bytes / moved.count if moved.count else None,
        transfer_mean_s=mean("moving_ticks"),
        room_wait_mean_s=Figure(value=None) if is_estimate else mean("room_ticks"),
        exposed_mean_s=mean("exposed_ticks"),
        link_utilization=band(outcomes, link_use, basis),
        max_in_flight=None if is_estimate else moved.max_in_flight,
        source=links[0].source,
    )


def _record(one: Outcome) -> TransferRecord:
    return one.transfers or TransferRecord()
