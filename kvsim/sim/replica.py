"""State and books of one replica: which sequences join, come out, end or wait, whatever the clock does."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple

import simpy

from kvsim.cost.profile import SequenceProfile
from kvsim.sim.batch import DecodeBatch, SequenceState
from kvsim.sim.lanes import LanePricing
from kvsim.sim.observer import ReplicaWatch
from kvsim.sim.parts import ReplicaParts
from kvsim.sim.prefix_cache import PrefixCache
from kvsim.sim.recorder import ReplicaRecord
from kvsim.sim.resources import Demand
from kvsim.sim.scheduling import (
    Leaving,
    Scheduler,
    SchedulerLimits,
    SchedulerParts,
    WaitingQueue,
    build_scheduler,
)
from kvsim.sim.speculative_batch import SpeculativeBatch
from kvsim.sim.waits import Waits
from kvsim.units import TICKS_PER_SECOND

Clocked = Generator[simpy.Event, Any, None]
ClockedAnswer = Generator[simpy.Event, Any, bool]
PromptOut = tuple[SequenceState, int, int]
"""(sequence, when its latest token came out or -1, tokens still to come where it is compacted aside first)."""
UNKNOWN = -1
LONE_STRIDE_TICKS = 10 * TICKS_PER_SECOND
"""How far a replica without neighbours goes before it moves the clock."""


class Flight(NamedTuple):
    """A step under way on the shared device, planned ahead."""

    done: simpy.Event
    start: int
    alone: int
    """Ticks that it takes without company."""
    sequences: int
    """Decoding sequences whose gap is this step."""
    late: dict[int, int]
    """Sequences that were compacted aside before it, and when they got their latest token."""


class Replica:
    """One replica's scheduler, batch, records and waits; what plans and times its steps builds on it."""

    horizon: Callable[[], int] | None = None
    """When something from outside may come next, where arrivals alone do not say it."""
    hands_over = False
    """Whether prompts leave with their KV once the step that ends them is over."""

    def __init__(self, parts: ReplicaParts) -> None:  # noqa: PLR0915 - all state of a replica, named once
        pool, source, sharing, coalesce = parts.pool, parts.source, parts.sharing, parts.coalesce
        step, tables, limits, speculation = pool.step, pool.tables, pool.limits, pool.speculation
        self.env = parts.env
        self.now = 0
        """When the step to plan next starts, in ticks."""
        self.seen = 0
        """When it is planned: ``now``, or with asynchronous scheduling when the step before it starts."""
        self.overlaps = step.deployment.engine.schedules_ahead
        """Whether a step is planned while the one before it runs."""
        self.host_work = pool.host_work
        """Ticks of host work of a step, by its sequences."""
        self.source = source
        self.log = pool.log
        self.step = step
        self.tables = tables
        self.coalesce = coalesce
        self.record = ReplicaRecord(min_free_bytes=limits.pool_bytes)
        self.generated = [0] * len(pool.lengths[0])
        self._speculation = speculation
        sizes = (limits.block_size, limits.prefill_growths[0][1], pool.token_ticks)
        self._drafted = SpeculativeBatch(*sizes, speculation.plan) if speculation is not None else None
        self.batch = self._new_batch(limits, pool.token_ticks)
        self.scheduler = self._new_scheduler(
            SchedulerParts(
                limits, self.batch, pool.lengths, self.generated, pool.log, self.record, sharing, pool.priority
            )
        )
        self.device = parts.device
        self.decode_steps = [0] * (limits.max_num_seqs + 1)
        """Decode steps taken at each batch size."""
        self.variable_total = 0
        """Ticks of all decode steps above the batches' fixed parts."""
        self._dynamic = source.is_dynamic
        self._tiers = sharing.tiers if sharing is not None else None
        self.waits = Waits()
        """Sequences that wait for a compaction or for blocks from a tier; each has a seat."""
        self._side_stream = step.deployment.engine.compression_stream == "side"
        self._runs_ahead = coalesce and not self._side_stream and self._tiers is None
        self._in_company = self.overlaps and (self._side_stream or self._tiers is not None)
        """Whether every step is an activity of the shared device, whose end is known when it comes."""
        if self._tiers is not None:
            self._tiers.is_planned_ahead = self._in_company
        self._foresees_ends = self._runs_ahead and sharing is None and step.deployment.replicas == 1
        """Whether what a sequence's end changes can be worked out ahead of the clock."""
        self._lanes = LanePricing(step.deployment, step, tables) if tables.factors is not None else None
        self._factors = tables.factors
        self.unscaled_total = 0
        """``variable_total`` before each batch's factor, where sequences are dealt to lanes."""
        self._plain = self._runs_ahead and pool.token_ticks > 0 and sharing is None and self._lanes is None
        self._plain &= speculation is None and self.scheduler.admits_plainly
        """Whether a prompt alone can skip the scheduler: every token costs the same, nothing is shared."""
        self._lone = SequenceState(-1, 0)
        self._late: dict[int, int] = {}
        """When sequences that have not decoded since they were compacted aside, or since a step of prompts alone, got
        their latest token."""
        self._decoding = 0
        """Sequences that decode in the step under way besides its prompts."""
        self._prompts_out: list[PromptOut] = []
        """Prompts that end with the step planned last."""
        self._flight: Flight | None = None
        self.observer: ReplicaWatch | None = None
        self.load = 0
        """Requests routed here that have not left; counted by the router, and only where it has a choice."""

    def _new_batch(self, limits: SchedulerLimits, token_ticks: int) -> DecodeBatch:
        return self._drafted or DecodeBatch(limits.block_size, limits.prefill_growths[0][1], token_ticks)

    def _new_scheduler(self, parts: SchedulerParts) -> Scheduler:
        return build_scheduler(self.step.deployment.engine, parts)

    @property
    def waiting(self) -> WaitingQueue:
        """Requests that the router left here and the scheduler has not admitted."""
        return self.scheduler.waiting

    @property
    def cache(self) -> PrefixCache | None:
        """The prefix cache, where there is one."""
        return self.scheduler.sharing.cache if self.scheduler.sharing is not None else None

    def sleep(self, delay_ticks: int) -> simpy.Event:
        """Let the clock move on to where the replica is."""
        return self.env.timeout(delay_ticks)

    @property
    def _shares_device(self) -> bool:
        """Whether anything runs beside the engine's steps."""
        return not self.device.is_idle or (self._tiers is not None and self._tiers.copies > 0)

    def _join(self, sequence: SequenceState, left: int) -> None:
        """Decode from the next step on, ``left`` tokens more."""
        scheduler, batch = self.scheduler, self.batch
        if left == 0:
            scheduler.leaving.append((batch.next_order(), sequence, sequence.held))
            return
        # From here on, what grows is counted by the batch; ``held`` keeps the rest.
        profile = sequence.profile
        shared = scheduler.shared_bytes(sequence) if sequence.pinned else 0
        if profile is None:
            sequence.held = scheduler.limits.fixed_bytes - shared
        else:
            scheduler.shrink(sequence, profile.resident_bytes(0, batch.block_size) - shared)
            sequence.held = profile.fixed_bytes - shared
        batch.join(sequence, left)

    def _compact_aside(self, sequence: SequenceState, profile: SequenceProfile, left: int, since: int) -> None:
        """Score and compact on a side stream; the sequence decodes once its cache is compact."""
        self.record.aside_ticks += profile.compress_ticks
        activity = self.device.start(profile.compress_ticks, Demand(hbm=1.0), "compact")
        self.waits.add(activity.done, partial(self._join_compacted, sequence, left, since))

    def _join_compacted(self, sequence: SequenceState, left: int, since: int) -> None:
        self._join(sequence, left)
        self._late[sequence.index] = since

    def _come_out(self, prompts: list[PromptOut], leaving: list[Leaving], ended: int) -> None:
        """What the end of a step at ``ended`` shows: prompts' tokens, and sequences that are done."""
        log, scheduler = self.log, self.scheduler
        for _, sequence, held_bytes in leaving:
            if held_bytes is not None:
                scheduler.give_back(sequence, held_bytes)
            self._complete(sequence.index, ended)
        for sequence, since, left in prompts:
            if since == UNKNOWN:
                log.first_token[sequence.index] = ended
            else:
                self.record.gaps.append(ended - since)
            if left and sequence.profile is not None:
                self._compact_aside(sequence, sequence.profile, left, ended)

    def _advance(self, steps: int) -> None:
        """Every decoding sequence gains ``steps`` tokens: account for blocks, note who ends."""
        batch = self.batch
        due = batch.advance(steps)
        if due:
            scheduler = self.scheduler
            scheduler.free -= due
            if scheduler.sharing is not None:
                scheduler.sharing.cache.evict_until(scheduler.free)
        if batch.cut_bytes:
            self.scheduler.take_back_cuts()
        if batch.finishing[0][0] <= batch.counter:
            self._finish_due()

    def _finish_due(self) -> None:
        batch, scheduler = self.batch, self.scheduler
        finishing, counter = batch.finishing, batch.counter
        while finishing and finishing[0][0] <= counter:
            _, order, sequence = heapq.heappop(finishing)
            if sequence.alive:
                if scheduler.sharing is not None:
                    scheduler.register_output(sequence)
                scheduler.leaving.append((order, sequence, batch.remove(sequence)))

    def _complete(self, index: int, ended: int) -> None:
        self.log.finished[index] = ended
        self.load -= 1
        if self._dynamic:
            self.source.settle(index, ended)

    def _settle_rejected(self) -> None:
        self.load -= len(self.scheduler.rejected)
        if self._dynamic:
            for index in self.scheduler.rejected:
                self.source.settle(index, self.seen)
        self.scheduler.rejected.clear()

    def _forget_preempted(self) -> None:
        """Sequences preempted before their first step after compaction: their gap goes on."""
        for index in [index for index in self._late if index not in self.batch.active]:
            self.scheduler.last_token[index] = self._late.pop(index)

    def _add_host_work(self, ticks: int, sequences: int) -> int:
        """A step's ticks with the host's work: behind it, or beside it where steps are planned ahead."""
        work = self.host_work[sequences]
        whole = max(ticks, work) if self.overlaps else ticks + work
        self.record.host_ticks += whole - ticks
        return whole

    def _count_decode_step(self) -> int:
        """Write down one decode step of the whole batch; its ticks."""
        size, variable = self.batch.size, self.batch.variable
        if self._factors is not None:
            self.unscaled_total += variable
            variable *= self._factors[size]
        self.decode_steps[size] += 1
        self.variable_total += variable
        return self.tables.step[size] + variable

    def _record_step(self, size: int, lasted: int, end_ticks: int) -> None:
        """One step's gaps; a sequence that had to wait before it counts that wait as part of its gap."""
        late = self._late
        self.record.runs.append((1, size - len(late), lasted, 0))
        if not late:
            return
        if self.scheduler.mixes:
            self.record.gaps += [end_ticks - since for since in late.values()]
        else:
            self.record.held_back += [(end_ticks - since, count) for since, count in Counter(late.values()).items()]
        late.clear()
