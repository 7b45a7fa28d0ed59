"""Play a deployment under a list of requests: build the replicas, run the clock, check the invariants."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import simpy

from kvsim.cost.front_end import front_end
from kvsim.cost.host import host_seconds
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.cost.tables import StepTables, build_tables, in_parts
from kvsim.deployment import Deployment
from kvsim.errors import InvariantViolation
from kvsim.memory import MemoryPlan
from kvsim.pool import prefill_growths
from kvsim.requests import RequestTable
from kvsim.sim.adaptive.build import LevelBuilder, SharedUnits
from kvsim.sim.adaptive.prices import level_prices
from kvsim.sim.arrivals import ArrivalSource, front_end_ticks
from kvsim.sim.engine import ReplicaEngine
from kvsim.sim.handover import TransferRecord
from kvsim.sim.observer import RunObserver
from kvsim.sim.prefix_cache import PrefixCache
from kvsim.sim.recorder import PhaseTicks, ReplicaRecord, RequestLog
from kvsim.sim.resources import SharedDevice
from kvsim.sim.routing import Router
from kvsim.sim.scheduling import PrefixSharing, SchedulerLimits
from kvsim.sim.speculation import build_speculation
from kvsim.sim.speculative_batch import SpeculativeBatch
from kvsim.sim.tiers.build import TierBuilder, TiersResult
from kvsim.sim.tiers.reload import PrefillEstimate
from kvsim.specs.routing import RouterThresholds, Routing
from kvsim.tiers import plan_tiers
from kvsim.units import TICKS_PER_SECOND

PROGRESS_SLICES = 50


@dataclass(frozen=True)
class RunResult:
    """Everything a report needs of one run. Times in ticks."""

    log: RequestLog
    records: tuple[ReplicaRecord, ...]
    end_ticks: int
    pool_bytes: int
    tiers: TiersResult | None = None
    """None without tiers, or where no prefix can be shared."""
    """Of one replica; of the decode pool where there are two."""
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
    step = StepModel(deployment, build_rates(deployment.device, deployment.priors, edge))
    engine = deployment.engine
    tables = build_tables(step, max(most_lane_tokens(deployment), engine.max_num_seqs), engine.max_num_seqs)
    if engine.kind == "llamacpp":
        tables = in_parts(tables, engine.n_ubatch)
    speculation = None
    if engine.speculative_config is not None:
        tables, speculation = build_speculation(
            step, engine.speculative_config, edge, seed=seed, max_model_len=max_model_len
        )
    front = front_end_ticks(front_end(deployment, edge))
    source = ArrivalSource(env, requests, build_router(requests, routing, thresholds), front)
    count = len(requests)
    log = RequestLog(
        source.sent_ticks, source.arrived_ticks, [-1] * count, [-1] * count, [-1] * count, [False] * count, front.egress
    )
    lengths = (requests.prompt_tokens.tolist(), requests.output_tokens.tolist())
    limits = scheduler_limits(deployment, plan, max_model_len)
    foreseeable = coalesce and _foreseeable(deployment, source, routing)
    host_work = host_work_ticks(step)
    sharing = Sharing.of(deployment, requests, limits)
    tiers = _tier_builder(env, deployment, sharing, PrefillEstimate(step, tables, engine.max_num_batched_tokens), edge)
    levels = _level_builder(deployment, requests, limits, edge, (step, tables))
    replicas: list[ReplicaEngine] = []
    for _ in range(deployment.replicas):
        device = SharedDevice(env)
        replica = (
            levels.engine(env, device, source, lengths, log, limits, coalesce=foreseeable, host_work=host_work)
            if levels is not None
            else ReplicaEngine(
                env,
                device,
                source,
                lengths,
                log,
                step,
                tables,
                limits,
                sharing.build(device, tiers) if sharing is not None else None,
                token_ticks=step.sequences.token_ticks if step.sequences.is_affine else 0,
                coalesce=foreseeable,
                speculation=speculation,
                priority=requests.priority.tolist() if requests.priority is not None else None,
                host_work=host_work,
            )
        )
        replicas.append(replica)
        if observer is not None:
            observer.watch(replica)
        env.process(replica.run())
    source.replicas.extend(replicas)
    play_clock(env, requests, progress)
    for replica in replicas:
        settle_replica(replica, tables)
    check_requests(log, requests)
    # Copies may outlast the last token.
    end_ticks = int(env.now) if tiers is None else max(max(log.finished, default=0), max(log.arrived, default=0))
    used = tiers.result() if tiers is not None else None
    records = tuple(replica.record for replica in replicas)
    result = RunResult(log, records, end_ticks, limits.pool_bytes, tiers=used)
    if observer is not None:
        observer.finish(replicas, result, requests)
    return result


def build_router(requests: RequestTable, routing: Routing, thresholds: RouterThresholds | None) -> Router:
    """A router that knows the requests' prefixes."""
    units = (requests.prompt_tokens / requests.hash_block_tokens).tolist() if routing == "prefix_aware" else ()
    return Router(routing, thresholds or RouterThresholds(), requests.prefix_hashes, units)


def most_lane_tokens(deployment: Deployment) -> int:
    """Most tokens that one lane may process in a step: a data parallel rank may get all prompts of its group."""
    budget, parallel = deployment.engine.max_num_batched_tokens, deployment.parallelism
    if parallel.lanes == 1:
        return budget
    return budget * parallel.data + deployment.engine.max_num_seqs + parallel.lanes


def host_work_ticks(step: StepModel) -> list[int]:
    """Ticks of host work of a step, by its sequences; the host of each lane works beside the others."""
    deployment = step.deployment
    sequences = np.ceil(np.arange(deployment.max_running + 1) / deployment.lanes)
    ticks: list[int] = np.rint(np.asarray(host_seconds(step, sequences)) * TICKS_PER_SECOND).astype(np.int64).tolist()
    return ticks


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


def scheduler_limits(deployment: Deployment, plan: MemoryPlan, max_model_len: int) -> SchedulerLimits:
    """Limits of one replica of a deployment."""
    engine = deployment.engine
    growths, fixed_bytes = prefill_growths(deployment)
    by_level = [prefill_growths(variant)[0] for variant in deployment.variants]
    return SchedulerLimits(
        max_num_seqs=deployment.max_running,
        max_num_batched_tokens=deployment.step_tokens,
        max_model_len=max_model_len,
        block_size=engine.block_size,
        pool_bytes=plan.num_blocks * plan.block_bytes * deployment.parallelism.data,
        chunked_prefill=engine.enable_chunked_prefill,
        prefill_growths=growths,
        fixed_bytes=fixed_bytes,
        decode_tokens=1 + (engine.speculative_config.num_speculative_tokens if engine.speculative_config else 0),
        # SGLang forgets what it retracts; of TensorRT-LLM it is not known.
        keeps_preempted=engine.kind == "vllm"
        and deployment.prefix_caching
        and all(len(growths) == 1 and growths[0][0] is None for growths in by_level),
        plans_ahead=engine.schedules_ahead,
    )


@dataclass(frozen=True)
class Sharing:
    """What replicas need to share prefixes."""

    unit_bytes: int
    unit_tokens: int
    hashes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, deployment: Deployment, requests: RequestTable, limits: SchedulerLimits) -> Sharing | None:
        """None where the workload shares no prefixes or the deployment cannot reuse them."""
        if requests.prefix_hashes is None or not deployment.prefix_caching:
            return None
        unit_tokens = requests.hash_block_tokens
        # Windowed layers keep their own blocks: only what grows with the prompt can be shared.
        growing = sum(block_bytes for cap, block_bytes in limits.prefill_growths if cap is None)
        unit_bytes = unit_tokens // limits.block_size * growing
        if unit_tokens % limits.block_size or not unit_bytes:
            return None
        hashes = requests.prefix_hashes
        if requests.output_hashes is not None:
            hashes = tuple(a + b for a, b in zip(hashes, requests.output_hashes, strict=True))
        return cls(unit_bytes, unit_tokens, hashes)

    def build(self, device: SharedDevice, tiers: TierBuilder | None = None) -> PrefixSharing:
        """Give a replica its own prefix cache, and its tiers."""
        cache = PrefixCache(self.unit_bytes)
        if tiers is None:
            return PrefixSharing(cache, self.hashes, self.unit_tokens)
        built = tiers.build(device)
        if built.writes_back:
            cache.on_evict = built.evicted
        return PrefixSharing(cache, self.hashes, self.unit_tokens, built)


def _level_builder(
    deployment: Deployment,
    requests: RequestTable,
    limits: SchedulerLimits,
    edge: Edge,
    first: tuple[StepModel, StepTables],
) -> LevelBuilder | None:
    """What builds engines of several levels; None where one compression serves every request."""
    if deployment.adaptive is None:
        return None
    prices = level_prices(deployment, edge, first)
    found = [
        Sharing.of(deployment, requests, replace(limits, prefill_growths=prompt.growths)) for prompt in prices.prompts
    ]
    sharings = [sharing for sharing in found if sharing is not None]
    shared = None
    if len(sharings) == prices.count:
        sizes = tuple(sharing.unit_bytes for sharing in sharings)
        shared = SharedUnits(sizes, sharings[0].hashes, sharings[0].unit_tokens)
    return LevelBuilder(deployment.adaptive, prices, requests, shared)


def _tier_builder(
    env: simpy.Environment, deployment: Deployment, sharing: Sharing | None, prefill: PrefillEstimate, edge: Edge
) -> TierBuilder | None:
    if sharing is None:
        return None
    plan = plan_tiers(deployment, sharing.unit_bytes, sharing.unit_tokens, edge)
    return TierBuilder(env, plan, sharing.unit_tokens, prefill) if plan is not None else None


def settle_replica(replica: ReplicaEngine, tables: StepTables) -> None:
    """Divide a replica's busy time by component, and check that it has nothing left."""
    _split_prompt_time(replica.record, tables)
    _split_decode_time(replica, tables)
    _check_replica(replica)


def _split_prompt_time(record: ReplicaRecord, tables: StepTables) -> None:
    """Divide what prompts added to steps by component: differences of the tables the steps were priced from."""
    if not record.prompts:
        return
    size, tokens, ending, attention, compression = record.prompts.table().T

    rows = size * tables.rows

    def added(table: list[int], extra: npt.NDArray[np.int64]) -> int:
        values = np.array(table, dtype=np.int64)
        return int((values[rows + extra] - values[rows]).sum())

    record.prefill = PhaseTicks(
        weights=added(tables.weights, tokens)
        + added(tables.head, ending)
        - added(tables.gather, ending)
        - added(tables.sampling, ending),
        attention=int(attention.sum()),
        compression=int(compression.sum()) + record.aside_ticks,
        communication=added(tables.communication, tokens) + added(tables.gather, ending),
        overhead=added(tables.overhead, tokens) + added(tables.sampling, ending),
    )


def _split_decode_time(replica: ReplicaEngine, tables: StepTables) -> None:
    """Divide the decode steps' time by component from the counts per batch size."""
    decode = PhaseTicks()
    parallel = replica.step.deployment.parallelism
    for batch, steps in enumerate(replica.decode_steps):
        if steps:
            sequences = parallel.sequences_per_lane(batch)
            rows = sequences * tables.rows
            gather, sampling = tables.gather[rows], tables.sampling[rows]
            decode.weights += steps * (tables.weights[rows] + tables.head[rows] - gather - sampling)
            decode.communication += steps * (tables.communication[rows] + gather)
            decode.overhead += steps * (tables.overhead[rows] + sampling)
            decode.attention += steps * tables.attention_fixed[sequences]
            decode.compression += steps * tables.compression_fixed[sequences]
    drafting = _split_drafting(replica, tables, decode)
    unpack = replica.compression_ticks(drafting)
    decode.compression += unpack
    decode.attention += replica.variable_total - unpack
    decode.overhead += replica.record.host_ticks
    replica.record.decode = decode


def _split_drafting(replica: ReplicaEngine, tables: StepTables, decode: PhaseTicks) -> int:
    """Divide the drafters' passes after the first likewise; ticks that drafting took for contexts."""
    batch, record, drafting = replica.batch, replica.record, tables.drafting
    if not isinstance(batch, SpeculativeBatch):
        return 0
    record.verifications, record.verified_tokens = batch.verifications, batch.tokens_out
    record.drafting_ticks = batch.draft_total
    for sequences, steps in enumerate(replica.decode_steps):
        if steps and drafting is not None:
            decode.weights += steps * drafting.weights[sequences]
            decode.communication += steps * drafting.communication[sequences]
            decode.overhead += steps * drafting.overhead[sequences]
            decode.attention += steps * drafting.attention[sequences]
            record.drafting_ticks += steps * drafting.whole[sequences]
    return batch.draft_total


def _check_replica(replica: ReplicaEngine) -> None:
    """Blocks and sequences are conserved: an idle replica has every byte back and nothing left to do."""
    scheduler, batch = replica.scheduler, replica.batch
    left = {
        "sequences": batch.size,
        "waiting requests": len(scheduler.waiting),
        "sequences that wait beside the steps": len(replica.waits) + len(scheduler.loaded),
        "prompts in progress": len(scheduler.prefilling),
        "missing pool bytes": scheduler.limits.pool_bytes - scheduler.free,
        "ticks of decode work": batch.variable,
        "bytes of pending growth": batch.growth_total,
    }
    if scheduler.sharing is not None and scheduler.sharing.tiers is not None:
        left |= scheduler.sharing.tiers.unfinished()
    wrong = {name: amount for name, amount in left.items() if amount}
    if wrong:
        msg = f"a replica ended with {wrong}"
        raise InvariantViolation(msg)


def check_requests(log: RequestLog, requests: RequestTable) -> None:
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
