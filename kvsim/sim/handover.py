"""How a prompt's KV gets from the replica that computed it to the one that decodes it.

The prefill side keeps a prompt's blocks until their transfer has ended. The decode side takes such sequences first
come, first served, with blocks for all of their KV; while it has no room, the KV stays where it is and can hold the
prefill side up. Sources: vLLM ``NixlConnector`` and ``Scheduler`` (WAITING_FOR_REMOTE_KVS), SGLang's
``disaggregation`` (first token and KV from the prefill instance).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import simpy

from kvsim.requests import RequestTable
from kvsim.sim.arrivals import NEVER, ArrivalSource
from kvsim.sim.fabric import Fabric
from kvsim.sim.routing import Replica, Router
from kvsim.units import seconds_to_ticks

TransferMode = Literal["layerwise", "after_prefill"]


@dataclass(frozen=True)
class TransferRules:
    """When KV moves, and what its transfer costs beside the fabric's bandwidth."""

    mode: TransferMode
    setup_ticks: int
    num_layers: int
    wire_share: float = 1.0
    """Bytes on the wire / bytes of KV, below 1 where KV is compressed in transit."""
    coder_seconds_per_byte: float = 0.0
    """Encoding before a transfer and decoding after it, per byte of KV."""


@dataclass
class TransferRecord:
    """Tallies of all transfers of a run, in bytes and ticks."""

    count: int = 0
    size_bytes: int = 0
    """On the wire."""
    sent_bytes: int = 0
    """Of transfers begun; equal to ``size_bytes`` once nothing is in flight."""
    moving_ticks: int = 0
    """From the start of a transfer to its end, summed."""
    room_ticks: int = 0
    """Wait for room on the decode side after a prompt's end, summed."""
    exposed_ticks: int = 0
    """From a prompt's end to the arrival of its KV, summed."""
    max_in_flight: int = 0


class Handover:
    """One sequence on its way."""

    def __init__(self, env: simpy.Environment, index: int, sender: int, receiver: int) -> None:
        self.index = index
        self.sender = sender
        self.receiver = receiver
        self.start_ticks = self.step_ticks = 0
        """Start and length of the step that completes the prompt, where KV moves layer by layer."""
        self.size_bytes = 0
        """Bytes of KV that the receiver lacks, over its ranks; known once it has room."""
        self.computed_ticks = 0
        self.computed: simpy.Event = env.event()
        """The prompt is in, and its first token out."""
        self.granted: simpy.Event = env.event()
        """The receiver has reserved room."""
        self.arrived: simpy.Event = env.event()


class DecodeReplica(Replica, Protocol):
    """A replica that takes sequences with their KV."""

    def expect(self, handover: Handover) -> None:
        """Queue a sequence whose KV will come."""


class HandoverSource:
    """What a decode replica takes for its source of requests: sequences offered by the prefill side.

    Nobody can foresee them, but nothing can happen before the next event of the clock: ``horizon_ticks``.
    """

    is_dynamic = True
    reads_caches = False
    """No step waits for its end because of it: an answer's blocks are found from the start of its last step."""
    outstanding = 1
    """Never known to be the last."""

    def __init__(self, env: simpy.Environment, arrivals: ArrivalSource) -> None:
        self._env = env
        self._arrivals = arrivals
        self._offers: list[Handover] = []
        self.replica: DecodeReplica | None = None
        self.next_ticks = NEVER
        self.released = env.event()
        """Fires when a sequence was offered; an idle replica waits for it."""

    @property
    def horizon_ticks(self) -> int:
        """Before this nothing from outside can reach the replica."""
        upcoming = self._env.peek()
        return self.next_ticks if upcoming == float("inf") else min(self.next_ticks, int(upcoming))

    def offer(self, handover: Handover) -> None:
        """Let the replica know of a sequence."""
        self._offers.append(handover)
        self.next_ticks = min(self.next_ticks, int(self._env.now))
        released, self.released = self.released, self._env.event()
        released.succeed()

    def deliver(self, now_ticks: int) -> None:
        """Hand over what was offered up to ``now_ticks``, which is all: offers are made as they happen."""
        if self.next_ticks <= now_ticks and self.replica is not None:
            offers, self._offers = self._offers, []
            self.next_ticks = NEVER
            for handover in offers:
                self.replica.expect(handover)

    def settle(self, index: int, now_ticks: int) -> None:
        """Request ``index`` ended."""
        self._arrivals.settle(index, now_ticks)


class Transfers:
    """All sequences between the pools."""

    def __init__(
        self,
        env: simpy.Environment,
        fabric: Fabric,
        rules: TransferRules,
        router: Router,
        sources: Sequence[HandoverSource],
        replicas: Sequence[DecodeReplica],
    ) -> None:
        self.record = TransferRecord()
        self.rules = rules
        self._env = env
        self._fabric = fabric
        self._router = router
        self._sources = sources
        self._replicas = replicas
        self._early: dict[int, Handover] = {}
        self.in_flight = 0
        """Transfers under way."""

    def begin_layers(self, index: int, sender: int, start_ticks: int, step_ticks: int) -> None:
        """A step is planned that will complete the prompt of ``index``: its layers can leave one by one."""
        handover = self._offer(index, sender)
        handover.start_ticks, handover.step_ticks = start_ticks, step_ticks
        self._early[index] = handover

    def send(self, index: int, sender: int) -> simpy.Event:
        """A prompt is in; the event fires when its blocks on the prefill side are free."""
        handover = self._early.pop(index, None) or self._offer(index, sender)
        handover.computed_ticks = int(self._env.now)
        handover.computed.succeed()
        return handover.arrived

    def _offer(self, index: int, sender: int) -> Handover:
        receiver = self._router.choose(index, self._replicas) if len(self._replicas) > 1 else 0
        handover = Handover(self._env, index, sender, receiver)
        self._replicas[receiver].load += 1
        self._env.process(self._deliver(handover))
        self._sources[receiver].offer(handover)
        return handover

    def _deliver(self, handover: Handover) -> Generator[simpy.Event, Any, None]:
        env, record, rules = self._env, self.record, self.rules
        if rules.mode == "after_prefill":
            yield handover.computed
        yield handover.granted
        granted_ticks = int(env.now)
        wire_bytes = round(handover.size_bytes * rules.wire_share)
        record.sent_bytes += wire_bytes
        self.in_flight += 1
        record.max_in_flight = max(record.max_in_flight, self.in_flight)
        coder_ticks = seconds_to_ticks(handover.size_bytes * rules.coder_seconds_per_byte)
        if rules.mode == "layerwise":
            # The last layer's share waits for the prompt's end, all before it only for its own layer.
            last, coder_ticks = wire_bytes // rules.num_layers, coder_ticks // rules.num_layers
            first_layer = handover.start_ticks + handover.step_ticks // rules.num_layers
            yield from self._until(max(first_layer, granted_ticks + rules.setup_ticks))
            yield self._fabric.move(wire_bytes - last, handover.sender, handover.receiver)
            yield handover.computed
        else:
            last = wire_bytes
            yield from self._until(granted_ticks + rules.setup_ticks)
        yield from self._until(int(env.now) + coder_ticks)
        yield self._fabric.move(last, handover.sender, handover.receiver)
        self._arrive(handover, granted_ticks, wire_bytes)

    def _until(self, ticks: int) -> Generator[simpy.Event, Any, None]:
        if ticks > int(self._env.now):
            yield self._env.timeout(ticks - int(self._env.now))

    def _arrive(self, handover: Handover, granted_ticks: int, wire_bytes: int) -> None:
        record, now = self.record, int(self._env.now)
        self.in_flight -= 1
        record.count += 1
        record.size_bytes += wire_bytes
        record.moving_ticks += now - granted_ticks
        record.room_ticks += max(0, granted_ticks - handover.computed_ticks)
        record.exposed_ticks += now - handover.computed_ticks
        handover.arrived.succeed()


def expected_handovers(requests: RequestTable, rejected: Sequence[bool]) -> int:
    """Sequences that must change pools: all that are served and have more than their first token to make."""
    return sum(
        not refused and tokens > 1 for refused, tokens in zip(rejected, requests.output_tokens.tolist(), strict=True)
    )
