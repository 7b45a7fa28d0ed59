"""Play a deployment under a list of requests: build the replicas, run the clock, check the invariants."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import simpy

from kvsim.cost.front_end import front_end
from kvsim.cost.host import host_seconds
from kvsim.cost.priors import Edge, look_up
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.cost.tables import StepTables, build_tables
from kvsim.deployment import Deployment
from kvsim.errors import InvariantViolation
from kvsim.memory import MemoryPlan
from kvsim.pool import prefill_growths
from kvsim.requests import IntArray, RequestTable
from kvsim.sim.adaptive.engine import AdaptiveEngine
from kvsim.sim.adaptive.prices import LevelPrices, level_prices
from kvsim.sim.adaptive.scheduler import LevelSharing, level_sharing
from kvsim.sim.arrivals import ArrivalSource, front_end_ticks
from kvsim.sim.engine import ReplicaEngine
from kvsim.sim.host_tier import HostTier, HostTierLimits
from kvsim.sim.prefix_cache import PrefixCache
from kvsim.sim.recorder import PhaseTicks, ReplicaRecord, RequestLog
from kvsim.sim.resources import SharedDevice
from kvsim.sim.scheduler import PrefixSharing, SchedulerLimits
from kvsim.units import TICKS_PER_SECOND

PROGRESS_SLICES = 50


@dataclass(frozen=True)
class RunResult:
    """Everything a report needs of one run. Times in ticks."""

    log: RequestLog
    records: tuple[ReplicaRecord, ...]
    end_ticks: int
    pool_bytes: int


def run_requests(
    deployment: Deployment,
    requests: RequestTable,
    plan: MemoryPlan,
    max_model_len: int,
    *,
    routing: Literal["round_robin", "least_loaded"] = "round_robin",
    edge: Edge = Edge.CENTRAL,
    coalesce: bool = True,
    progress: Callable[[float], None] | None = None,
) -> RunResult:
    """Simulate every request to its end; raise InvariantViolation if anything is lost on the way."""
    env = simpy.Environment(initial_time=0)
    step = StepModel(deployment, build_rates(deployment.device, deployment.priors, edge))
    engine = deployment.engine
    tables = build_tables(step, engine.max_num_batched_tokens, engine.max_num_seqs)
    front = front_end_ticks(front_end(deployment, edge))
    source = ArrivalSource(env, requests, routing, front)
    count = len(requests)
    log = RequestLog(
        source.sent_ticks, source.arrived_ticks, [-1] * count, [-1] * count, [-1] * count, [False] * count, front.egress
    )
    lengths = (requests.prompt_tokens.tolist(), requests.output_tokens.tolist())
    limits = _limits(deployment, plan, max_model_len)
    replicas: list[ReplicaEngine] = []
    prices = level_prices(deployment, edge, (step, tables)) if deployment.adaptive is not None else None
    foreseeable = coalesce and _foreseeable(deployment, source)
    host_work = host_work_ticks(step)
    for _ in range(deployment.replicas):
        device = SharedDevice(env)
        if deployment.adaptive is not None and prices is not None:
            adaptive = AdaptiveEngine(
                env,
                device,
                source,
                lengths,
                log,
                step,
                tables,
                limits,
                sharing=_level_sharing(deployment, requests, limits, prices),
                adaptive=deployment.adaptive,
                prices=prices,
                classes=(requests.class_names, _listed(requests.request_class)),
                coalesce=foreseeable,
                host_work=host_work,
            )
            replicas.append(adaptive)
            env.process(adaptive.run())
            continue
        replica = ReplicaEngine(
            env,
            device,
            source,
            lengths,
            log,
            step,
            tables,
            limits,
            _prefix_sharing(deployment, requests, limits, device, edge),
            token_ticks=step.sequences.token_ticks if step.sequences.is_affine else 0,
            coalesce=foreseeable,
            host_work=host_work,
        )
        replicas.append(replica)
        env.process(replica.run())
    source.replicas.extend(replicas)
    _play(env, requests, progress)
    for replica in replicas:
        _split_prompt_time(replica.record, tables)
        _split_decode_time(replica, tables)
        _check_replica(replica)
    _check_requests(log, requests)
    return RunResult(log, tuple(replica.record for replica in replicas), int(env.now), limits.pool_bytes)


def _listed(values: IntArray | None) -> list[int] | None:
    return None if values is None else values.tolist()


def host_work_ticks(step: StepModel) -> list[int]:
    """Ticks of host work of a step, by its sequences."""
    sequences = np.arange(step.deployment.engine.max_num_seqs + 1, dtype=np.float64)
    ticks: list[int] = np.rint(np.asarray(host_seconds(step, sequences)) * TICKS_PER_SECOND).astype(np.int64).tolist()
    return ticks


def _foreseeable(deployment: Deployment, source: ArrivalSource) -> bool:
    """Whether a replica can know the next arrival: not when another replica's completions release requests."""
    return deployment.replicas == 1 or not source.is_dynamic


def _play(env: simpy.Environment, requests: RequestTable, progress: Callable[[float], None] | None) -> None:
    """Run the clock. The cycle collector is paused: the loop makes no cycles, and its scans cost a tenth of the run."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        if progress is None or not len(requests):
            env.run()
            return
        last = int(requests.arrival_ticks.max())
        for part in range(1, PROGRESS_SLICES):
            until = last * part // PROGRESS_SLICES
            if until > env.now:
                env.run(until=until)
            progress(part / PROGRESS_SLICES)
        env.run()
        progress(1.0)
    finally:
        if collecting:
            gc.enable()


def _limits(deployment: Deployment, plan: MemoryPlan, max_model_len: int) -> SchedulerLimits:
    engine = deployment.engine
    growths, fixed_bytes = prefill_growths(deployment)
    return SchedulerLimits(
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_model_len=max_model_len,
        block_size=engine.block_size,
        pool_bytes=plan.num_blocks * plan.block_bytes,
        chunked_prefill=engine.enable_chunked_prefill,
        prefill_growths=growths,
        fixed_bytes=fixed_bytes,
    )


def _prefix_sharing(
    deployment: Deployment, requests: RequestTable, limits: SchedulerLimits, device: SharedDevice, edge: Edge
) -> PrefixSharing | None:
    """A prefix cache, where the workload shares prefixes and the deployment can reuse them."""
    unit_bytes = _unit_bytes(requests, limits.block_size, limits.prefill_growths)
    if not deployment.prefix_caching or not unit_bytes:
        return None
    host = _host_tier(deployment, unit_bytes, device, edge)
    return PrefixSharing(PrefixCache(unit_bytes), _hashes(requests), requests.hash_block_tokens, host)


def _level_sharing(
    deployment: Deployment, requests: RequestTable, limits: SchedulerLimits, prices: LevelPrices
) -> LevelSharing | None:
    """The same for a deployment of several levels."""
    unit_bytes = [_unit_bytes(requests, limits.block_size, prompt.growths) for prompt in prices.prompts]
    if not deployment.prefix_caching or not all(unit_bytes):
        return None
    return level_sharing(unit_bytes, _hashes(requests), requests.hash_block_tokens)


def _unit_bytes(requests: RequestTable, block_size: int, growths: tuple[tuple[int | None, int], ...]) -> int:
    """Bytes of one hashed unit; 0 where the workload has no hashes, or blocks cannot be shared by them."""
    if requests.prefix_hashes is None or requests.hash_block_tokens % block_size:
        return 0
    # Windowed layers keep their own blocks: only what grows with the prompt can be shared.
    growing = sum(block_bytes for cap, block_bytes in growths if cap is None)
    return requests.hash_block_tokens // block_size * growing


def _hashes(requests: RequestTable) -> tuple[tuple[int, ...], ...]:
    """Per request, hashes of its prompt's units and of those that its answer completes."""
    prompts = requests.prefix_hashes or ()
    if requests.output_hashes is None:
        return prompts
    return tuple(a + b for a, b in zip(prompts, requests.output_hashes, strict=True))


def _host_tier(deployment: Deployment, unit_bytes: int, device: SharedDevice, edge: Edge) -> HostTier | None:
    """The host tier of one rank, where the engine offloads."""
    size_bytes, link = deployment.engine.kv_offloading_size, deployment.device.host_link
    if size_bytes is None or link is None:
        return None
    limits = HostTierLimits(
        capacity_bytes=size_bytes // deployment.tensor_parallel_size,
        link_bytes_per_s=link.value
        * look_up(deployment.priors.host_copy_efficiency, deployment.device).efficiency(edge),
        hbm_bytes_per_s=deployment.device.bandwidth_bytes_per_s,
    )
    return HostTier(device, limits, unit_bytes)


def _split_prompt_time(record: ReplicaRecord, tables: StepTables) -> None:
    """Divide what prompts added to steps by component: differences of the tables the steps were priced from."""
    if not record.prompts:
        return
    size, tokens, ending, attention, compression = record.prompts.table().T

    def added(table: list[int], extra: npt.NDArray[np.int64]) -> int:
        values = np.array(table, dtype=np.int64)
        return int((values[size + extra] - values[size]).sum())

    record.prefill = PhaseTicks(
        weights=added(tables.weights, tokens) + added(tables.head, ending),
        attention=int(attention.sum()),
        compression=int(compression.sum()) + record.aside_ticks,
        communication=added(tables.communication, tokens),
        overhead=added(tables.overhead, tokens),
    )


def _split_decode_time(replica: ReplicaEngine, tables: StepTables) -> None:
    """Divide the decode steps' time by component from the counts per batch size."""
    decode = PhaseTicks()
    for sequences, steps in enumerate(replica.decode_steps):
        if steps:
            decode.weights += steps * (tables.weights[sequences] + tables.head[sequences])
            decode.communication += steps * tables.communication[sequences]
            decode.overhead += steps * tables.overhead[sequences]
            decode.attention += steps * tables.attention_fixed[sequences]
            decode.compression += steps * tables.compression_fixed[sequences]
    unpack = replica.compression_ticks()
    decode.compression += unpack
    decode.attention += replica.variable_total - unpack
    decode.overhead += replica.record.host_ticks
    replica.record.decode = decode


def _check_replica(replica: ReplicaEngine) -> None:
    """Blocks and sequences are conserved: an idle replica has every byte back and nothing left to do."""
    scheduler, batch = replica.scheduler, replica.batch
    left = {
        "sequences": batch.size,
        "waiting requests": len(scheduler.waiting),
        "sequences that wait beside the steps": len(replica.waits) + len(scheduler.loaded),
        "missing pool bytes": scheduler.limits.pool_bytes - scheduler.free,
        "ticks of decode work": batch.variable,
        "bytes of pending growth": batch.growth_total,
    }
    wrong = {name: amount for name, amount in left.items() if amount}
    if wrong:
        msg = f"a replica ended with {wrong}"
        raise InvariantViolation(msg)


def _check_requests(log: RequestLog, requests: RequestTable) -> None:
    """Every request ended exactly one way, and its life ran forward."""
    for index in range(len(requests)):
        arrived, scheduled = log.arrived[index], log.scheduled[index]
        first, finished = log.first_token[index], log.finished[index]
        if log.rejected[index]:
            if finished >= 0:
                msg = f"request {index} was rejected and finished"
                raise InvariantViolation(msg)
        elif not 0 <= arrived <= scheduled <= first <= finished:
            msg = f"request {index} ran backwards: {arrived=} {scheduled=} {first=} {finished=}"
            raise InvariantViolation(msg)
