"""Play a deployment under a list of requests: build the replicas, run the clock, check the invariants."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import simpy

from kvsim.cost.priors import Edge
from kvsim.deployment import Deployment
from kvsim.memory import MemoryPlan
from kvsim.requests import RequestTable
from kvsim.sim.arrivals import ArrivalSource
from kvsim.sim.build import build_router, open_log, pool_parts
from kvsim.sim.engine import ReplicaEngine
from kvsim.sim.handover import TransferRecord
from kvsim.sim.observer import RunObserver
from kvsim.sim.parts import ReplicaParts
from kvsim.sim.recorder import ReplicaRecord, RequestLog
from kvsim.sim.resources import SharedDevice
from kvsim.sim.settle import check_requests, settle_replica
from kvsim.sim.sharing import Sharing, level_builder, tier_builder
from kvsim.sim.tiers.build import TiersResult
from kvsim.specs.routing import RouterThresholds, Routing

PROGRESS_SLICES = 50


@dataclass(frozen=True)
class RunResult:
    """Everything a report needs of one run. Times in ticks."""

    log: RequestLog
    records: tuple[ReplicaRecord, ...]
    end_ticks: int
    pool_bytes: int
    """Of one replica; of the decode pool where there are two."""
    tiers: TiersResult | None = None
    """None without tiers, or where no prefix can be shared."""
    prefill_replicas: int = 0
    """How many of ``records``, the first ones, are of a prefill pool."""
    prefill_pool_bytes: int = 0
    transfers: TransferRecord | None = None


def run_requests(
    deployment: Deployment,
    requests: RequestTable,
    plan: MemoryPlan,
    max_model_len: int,
    *,
    routing: Routing = "round_robin",
    thresholds: RouterThresholds | None = None,
    edge: Edge = Edge.CENTRAL,
    seed: int = 0,
    coalesce: bool = True,
    progress: Callable[[float], None] | None = None,
    observer: RunObserver | None = None,
) -> RunResult:
    """Simulate every request to its end; raise InvariantViolation if anything is lost on the way."""
    env = simpy.Environment(initial_time=0)
    source, log = open_log(env, deployment, requests, build_router(requests, routing, thresholds), edge)
    pool = pool_parts(deployment, plan, requests, log, max_model_len, edge=edge, seed=seed)
    foreseeable = coalesce and _foreseeable(deployment, source, routing)
    sharing = Sharing.of(deployment, requests, pool.limits)
    tiers = tier_builder(env, deployment, sharing, pool, edge)
    levels = level_builder(deployment, requests, pool, edge)
    replicas: list[ReplicaEngine] = []
    for _ in range(deployment.replicas):
        device = SharedDevice(env)
        if levels is not None:
            replica: ReplicaEngine = levels.engine(ReplicaParts(env, pool, device, source, None, foreseeable))
        else:
            shared = sharing.build(device, tiers) if sharing is not None else None
            replica = ReplicaEngine(ReplicaParts(env, pool, device, source, shared, foreseeable))
        replicas.append(replica)
        if observer is not None:
            observer.watch(replica)
        env.process(replica.run())
    source.replicas.extend(replicas)
    play_clock(env, requests, progress)
    for replica in replicas:
        settle_replica(replica)
    check_requests(log, requests)
    # Copies may outlast the last token.
    end_ticks = int(env.now) if tiers is None else max(max(log.finished, default=0), max(log.arrived, default=0))
    used = tiers.result() if tiers is not None else None
    records = tuple(replica.record for replica in replicas)
    result = RunResult(log, records, end_ticks, pool.limits.pool_bytes, tiers=used)
    if observer is not None:
        observer.finish(replicas, result, requests)
    return result


def _foreseeable(deployment: Deployment, source: ArrivalSource, routing: Routing) -> bool:
    """Whether a replica's run of steps looks the same from outside whenever the next request comes.

    Not where another replica's completions release requests, nor where the router reads the prefix caches, from which
    a replica evicts step by step.
    """
    return deployment.replicas == 1 or not (source.is_dynamic or routing == "prefix_aware")


def play_clock(env: simpy.Environment, requests: RequestTable, progress: Callable[[float], None] | None) -> None:
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
