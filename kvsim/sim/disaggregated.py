"""Two pools on the clock: replicas that process prompts, replicas that decode, and the KV that moves between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar, cast

import simpy
from simpy.events import NORMAL, EventPriority

from kvsim.cost.priors import Edge
from kvsim.deployment import Deployment
from kvsim.errors import InvariantViolation
from kvsim.memory import MemoryPlan
from kvsim.requests import RequestTable
from kvsim.sim.arrivals import ArrivalSource
from kvsim.sim.batch import SequenceState
from kvsim.sim.build import build_router, open_log, pool_parts
from kvsim.sim.engine import ReplicaEngine
from kvsim.sim.fabric import Fabric
from kvsim.sim.handover import Handover, HandoverSource, TransferRules, Transfers, expected_handovers
from kvsim.sim.observer import RunObserver
from kvsim.sim.parts import ReplicaParts
from kvsim.sim.recorder import RequestLog
from kvsim.sim.replica import PromptOut
from kvsim.sim.resources import SharedDevice
from kvsim.sim.run import RunResult, play_clock
from kvsim.sim.scheduling import Chunk, Leaving
from kvsim.sim.settle import check_requests, settle_replica
from kvsim.sim.sharing import Sharing
from kvsim.specs.routing import RouterThresholds, Routing

LATE = EventPriority(NORMAL + 2)
"""A decode step's end comes after all that prompts and transfers do in its tick."""


@dataclass(frozen=True)
class Pool:
    """One pool's deployment and its share of memory."""

    deployment: Deployment
    plan: MemoryPlan


@dataclass(frozen=True)
class Crossing:
    """Everything about what lies between the pools."""

    rules: TransferRules
    send_bytes_per_s: float
    """Of one prefill replica, all its ports together."""
    receive_bytes_per_s: float
    """Of one decode replica."""
    decode_routing: Routing


class PrefillEngine(ReplicaEngine):
    """A replica that processes prompts and gives their KV away."""

    hands_over = True
    place: int
    transfers: Transfers

    def start(self, place: int, transfers: Transfers) -> None:
        """Serve from ``place`` in the pool, and hand over to ``transfers``."""
        self.place, self.transfers = place, transfers
        self.env.process(self.run())

    def _begin_mixed(self, chunks: list[Chunk]) -> tuple[int, list[SequenceState]]:
        ticks, ending = super()._begin_mixed(chunks)
        if self.transfers.rules.mode == "layerwise":
            for sequence in ending:
                if self.scheduler.output[sequence.index] > 1:
                    self.transfers.begin_layers(sequence.index, self.place, self.now, ticks)
        return ticks, ending

    def _join(self, sequence: SequenceState, left: int) -> None:
        """Keep a prompt seated until the step that ends it is over: then it leaves with its KV."""
        if left:
            self._prompts_out[-1] = (*self._prompts_out[-1][:2], left)
        else:
            super()._join(sequence, left)

    def _come_out(self, prompts: list[PromptOut], leaving: list[Leaving], ended: int) -> None:
        super()._come_out([(sequence, since, 0) for sequence, since, _ in prompts], leaving, ended)
        for sequence, _, left in prompts:
            if left:
                self._hand_over(sequence)

    def _hand_over(self, sequence: SequenceState) -> None:
        scheduler, profile = self.scheduler, sequence.profile
        if profile is not None:
            kept = profile.resident_bytes(0, self.batch.block_size) - scheduler.shared_bytes(sequence)
            scheduler.shrink(sequence, kept)
            sequence.held = kept
        self.load -= 1
        self.waits.add_unseated(self.transfers.send(sequence.index, self.place), partial(self._let_go, sequence))

    def _let_go(self, sequence: SequenceState) -> None:
        self.scheduler.give_back(sequence, sequence.held)


class _LateTimeout(simpy.Event):
    """A timeout that comes after all others of its tick."""

    def __init__(self, env: simpy.Environment, delay_ticks: int) -> None:
        super().__init__(env)
        self._ok, self._value = True, None
        env.schedule(self, LATE, delay_ticks)


class DecodeEngine(ReplicaEngine):
    """A replica that takes sequences with their KV, and recomputes those that it preempts."""

    rank_count = 1

    def start(self, source: HandoverSource, *, coalesce: bool) -> None:
        """Serve what ``source`` offers, run by run of steps or step by step."""
        source.replica = self
        self._handovers: dict[int, Handover] = {}
        self._runs_ahead = self._plain = False
        self.coalesce = coalesce
        self.horizon = partial(getattr, source, "horizon_ticks")
        self.env.process(self.run())

    def sleep(self, delay_ticks: int) -> simpy.Event:
        """Let the clock move on, behind all that the other pool and the link do in that tick."""
        return _LateTimeout(self.env, delay_ticks)

    def expect(self, handover: Handover) -> None:
        """Queue a sequence whose KV will come."""
        self.scheduler.remote[handover.index] = self._arrival_bytes(self.scheduler.prompt[handover.index])
        self._handovers[handover.index] = handover
        self.scheduler.waiting.append(handover.index)

    def _arrival_bytes(self, tokens: int) -> int:
        if self.batch.token_ticks:
            return self.scheduler.prefill_bytes(tokens)
        return self.step.sequences.profile(tokens).resident_bytes(0, self.batch.block_size)

    def _await_arrivals(self) -> None:
        for sequence in self.scheduler.incoming:
            handover = self._handovers.pop(sequence.index)
            handover.size_bytes = sequence.held * self.rank_count
            handover.granted.succeed()
            self.waits.add(handover.arrived, partial(self._join_arrived, sequence))
        self.scheduler.incoming.clear()

    def _join_arrived(self, sequence: SequenceState) -> None:
        index = sequence.index
        sequence.done = sequence.target
        if not self.batch.token_ticks:
            sequence.profile = self.step.sequences.profile(sequence.target)
        self.scheduler.register_prompt(sequence)
        self.generated[index] = 1
        self._join(sequence, self.scheduler.output[index] - 1)
        self._late[index] = self.log.first_token[index]


def run_disaggregated(
    prefill: Pool,
    decode: Pool,
    crossing: Crossing,
    requests: RequestTable,
    max_model_len: int,
    *,
    routing: Routing = "round_robin",
    thresholds: RouterThresholds | None = None,
    edge: Edge = Edge.CENTRAL,
    coalesce: bool = True,
    progress: Callable[[float], None] | None = None,
    observer: RunObserver | None = None,
) -> RunResult:
    """Simulate every request to its end; raise InvariantViolation if anything is lost on the way."""
    env = simpy.Environment(initial_time=0)
    router = build_router(requests, routing, thresholds)
    arrivals, log = open_log(env, prefill.deployment, requests, router, edge)
    builder = _Builder(env, requests, log, max_model_len, edge)
    givers = builder.build(prefill, PrefillEngine, [arrivals] * prefill.deployment.replicas)
    sources = [HandoverSource(env, arrivals) for _ in range(decode.deployment.replicas)]
    takers = builder.build(decode, DecodeEngine, sources)
    fabric = Fabric(env, crossing.send_bytes_per_s, crossing.receive_bytes_per_s)
    transfers = Transfers(
        env,
        fabric,
        crossing.rules,
        build_router(requests, crossing.decode_routing, thresholds),
        sources,
        takers.replicas,
    )
    replicas = (*givers.replicas, *takers.replicas)
    if observer is not None:
        observer.watch_pools(givers.replicas, takers.replicas, fabric)
    for place, giver in enumerate(givers.replicas):
        giver.start(place, transfers)
    for taker, source in zip(takers.replicas, sources, strict=True):
        taker.rank_count = decode.deployment.tensor_parallel_size
        # A router that reads caches must see them as they are at every step.
        taker.start(source, coalesce=coalesce and (len(sources) == 1 or crossing.decode_routing != "prefix_aware"))
    arrivals.replicas.extend(givers.replicas)
    play_clock(env, requests, progress)
    givers.settle()
    takers.settle()
    check_requests(log, requests)
    _check_transfers(transfers, expected_handovers(requests, log.rejected))
    result = RunResult(
        log,
        tuple(replica.record for replica in replicas),
        int(env.now),
        takers.pool_bytes,
        prefill_replicas=len(givers.replicas),
        prefill_pool_bytes=givers.pool_bytes,
        transfers=transfers.record,
    )
    if observer is not None:
        observer.finish(replicas, result, requests)
    return result


EngineT = TypeVar("EngineT", bound=ReplicaEngine)


@dataclass(frozen=True)
class _BuiltPool(Generic[EngineT]):
    replicas: list[EngineT]
    pool_bytes: int

    def settle(self) -> None:
        for replica in self.replicas:
            settle_replica(replica)


@dataclass(frozen=True)
class _Builder:
    """Builds the replicas of a pool on one clock."""

    env: simpy.Environment
    requests: RequestTable
    log: RequestLog
    max_model_len: int
    edge: Edge

    def build(
        self,
        pool: Pool,
        engine_class: type[EngineT],
        sources: Sequence[ArrivalSource | HandoverSource],
    ) -> _BuiltPool[EngineT]:
        parts = pool_parts(pool.deployment, pool.plan, self.requests, self.log, self.max_model_len, edge=self.edge)
        sharing = Sharing.of(pool.deployment, self.requests, parts.limits)
        replicas = []
        for source in sources:
            device = SharedDevice(self.env)
            shared = sharing.build(device) if sharing is not None else None
            # One that offers has all that an engine uses which never runs ahead of the clock.
            taken = cast("ArrivalSource", source)
            replicas.append(engine_class(ReplicaParts(self.env, parts, device, taken, shared, coalesce=False)))
        return _BuiltPool(replicas, parts.limits.pool_bytes)


def _check_transfers(transfers: Transfers, expected: int) -> None:
    """Nothing is left between the pools, and every sequence crossed once."""
    record = transfers.record
    if transfers.in_flight or record.sent_bytes != record.size_bytes or record.count != expected:
        msg = (
            f"{record.count} of {expected} sequences crossed; {transfers.in_flight} are in flight with "
            f"{record.sent_bytes - record.size_bytes} bytes"
        )
        raise InvariantViolation(msg)
