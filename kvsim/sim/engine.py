"""One replica on the clock: continuous batching as a SimPy process.

An event is a scheduler step, never a token. Steps that only decode and repeat until something can change (a sequence
ends, a request arrives, the pool runs dry, a token curve bends) are taken as one run whose length is summed in closed
form on the integer clock, which equals stepping through them exactly.

With asynchronous scheduling a step is planned when the one before it starts. The plan counts the running step's
tokens as there, but the seats and blocks of sequences that end with it only once it is over.
Source: vLLM 0.15.1 ``v1/engine/core.py`` ``step_with_batch_queue`` with two batches, and ``AsyncScheduler``.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import simpy

from kvsim.cost.sequence import SequenceProfile
from kvsim.cost.step import StepModel
from kvsim.cost.tables import StepTables
from kvsim.errors import InvariantViolation
from kvsim.sim.arrivals import NEVER, ArrivalSource
from kvsim.sim.batch import DecodeBatch, SequenceState
from kvsim.sim.lanes import LanePricing, Piece
from kvsim.sim.observer import ReplicaWatch, prompts_of
from kvsim.sim.prefix_cache import PrefixCache
from kvsim.sim.recorder import ReplicaRecord, RequestLog
from kvsim.sim.resources import Demand, SharedDevice
from kvsim.sim.scheduling import (
    Chunk,
    Leaving,
    PrefixSharing,
    Scheduler,
    SchedulerLimits,
    SchedulerParts,
    WaitingQueue,
    build_scheduler,
)
from kvsim.sim.spans import steps_to_cover, steps_within
from kvsim.sim.speculation import Speculation, steps_until
from kvsim.sim.speculative_batch import SpeculativeBatch
from kvsim.sim.sprint import sprint
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


class ReplicaEngine:
    """Plays a scheduler's steps on the clock and writes down what happened."""

    horizon: Callable[[], int] | None = None
    """When something from outside may come next, where arrivals alone do not say it."""
    hands_over = False
    """Whether prompts leave with their KV once the step that ends them is over."""

    def __init__(  # noqa: PLR0915 - all state of a replica, named once
        self,
        env: simpy.Environment,
        device: SharedDevice,
        source: ArrivalSource,
        lengths: tuple[list[int], list[int]],
        log: RequestLog,
        step: StepModel,
        tables: StepTables,
        limits: SchedulerLimits,
        sharing: PrefixSharing | None,
        *,
        token_ticks: int,
        coalesce: bool,
        host_work: list[int],
        priority: Sequence[int] | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.env = env
        self.now = 0
        """When the step to plan next starts, in ticks."""
        self.seen = 0
        """When it is planned: ``now``, or with asynchronous scheduling when the step before it starts."""
        self.overlaps = step.deployment.engine.schedules_ahead
        """Whether a step is planned while the one before it runs."""
        self.host_work = host_work
        """Ticks of host work of a step, by its sequences."""
        self.source = source
        self.log = log
        self.step = step
        self.tables = tables
        self.coalesce = coalesce
        self.record = ReplicaRecord(min_free_bytes=limits.pool_bytes)
        self.generated = [0] * len(lengths[0])
        self._speculation = speculation
        sizes = (limits.block_size, limits.prefill_growths[0][1], token_ticks)
        self._drafted = SpeculativeBatch(*sizes, speculation.plan) if speculation is not None else None
        self.batch = self._new_batch(limits, token_ticks)
        self.scheduler = self._new_scheduler(
            SchedulerParts(limits, self.batch, lengths, self.generated, log, self.record, sharing, priority)
        )
        self.device = device
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
        self._plain = self._runs_ahead and token_ticks > 0 and sharing is None and self._lanes is None
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

    # --- the clock --------------------------------------------------------------------------------------------------

    def run(self) -> Clocked:  # noqa: C901, PLR0912, PLR0915 - the hot loop; calls would cost more than they explain
        """Serve until nothing can arrive any more.

        The clock is advanced only where the outside can matter: up to the next arrival a replica's steps follow from
        its own state, so they are taken ahead of the clock and paid for in one event.
        """
        env, source, scheduler, batch = self.env, self.source, self.scheduler, self.batch
        overlaps, runs_ahead, waits, sleep = self.overlaps, self._runs_ahead, self.waits, self.sleep
        # Nobody else looks at the clock of a replica that is alone; it still moves now and then, to show progress.
        clock_from = LONE_STRIDE_TICKS if runs_ahead and len(source.replicas) == 1 else 0
        # The loop that knows nothing but prompts and decoding takes over where it may, and nobody watches.
        sprints = self._plain and clock_from > 0 and not source.is_dynamic and self.observer is None
        while True:
            if sprints and not (scheduler.waiting or scheduler.prefilling or self._prompts_out):
                sprint(self, clock_from)
            if source.next_ticks <= self.seen:
                source.deliver(self.seen)
            if waits:
                waits.settle()
            lone, chunks, steps, ticks = False, None, 0, 0
            if scheduler.waiting or scheduler.prefilling or scheduler.loaded:
                if self._plain and len(scheduler.waiting) == 1 and (ticks := self._begin_lone_prompt()):
                    lone, last = True, ticks
                else:
                    aside = waits.seats + len(scheduler.loaded) + len(scheduler.leaving)
                    if self._side_stream or self.hands_over:
                        aside += sum(left > 0 for _, _, left in self._prompts_out)
                    chunks = scheduler.schedule(self.seen, aside, self.now)
                    if scheduler.loads:
                        self._start_loads()
                    if scheduler.incoming:
                        self._await_arrivals()
                    if self._late:
                        self._forget_preempted()
                    if scheduler.rejected:
                        self._settle_rejected()
                    if self._in_company and (chunks or batch.size):
                        yield from self._step_in_company(chunks)
                        continue
                    if chunks:
                        ticks, ending = self._begin_mixed(chunks)
                        if self._shares_device:
                            yield self._occupy(ticks)
                            ticks = self._contended(ticks)
                        last = ticks
            if not ticks:
                if not batch.size:
                    if self.seen < self.now:
                        yield from self._run_dry()
                    elif (scheduler.looked or not (scheduler.waiting or scheduler.loaded)) and not (
                        yield from self._idle()
                    ):
                        return
                    continue
                if self._in_company:
                    yield from self._step_in_company([])
                    continue
                if self._shares_device or (self._late and not overlaps and scheduler.mixes):
                    yield from self._shared_step()
                    continue
                steps, ticks, last = self._plan_run()
                if not steps:
                    scheduler.make_room(self.now)
                    if self._late:
                        self._forget_preempted()
                    if not batch.size:
                        if self.seen < self.now:
                            yield from self._run_dry()
                        continue
                    steps, ticks, last = self._plan_run()
                if self.observer is not None:
                    self.observer.step(self, ticks, steps=steps)
            # The next plan counts the step's tokens; what ends with it comes out once the clock is there.
            prompts, leaving, ended = self._prompts_out, scheduler.leaving, self.now
            self._prompts_out, scheduler.leaving = [], []
            self.now += ticks
            if self._tiers is not None:
                # They hear at its end what a step computed and whom it pushed out.
                yield sleep(self.now - int(env.now))
            if steps:
                self._advance(steps)
            elif lone:
                self._end_lone_prompt(ticks)
            elif chunks:
                self._end_mixed(chunks, ending, ticks)
            self.seen = self.now - last if overlaps else self.now
            if self.seen >= source.next_ticks or not runs_ahead:
                if self.seen >= clock_from:
                    yield sleep(self.seen - int(env.now))
                    clock_from = clock_from and self.seen + LONE_STRIDE_TICKS
                # Before anything comes out: the router sees who was there when the request came.
                source.deliver(self.seen)
            if not overlaps:
                prompts, leaving, ended = self._prompts_out, scheduler.leaving, self.now
                self._prompts_out, scheduler.leaving = [], []
            if prompts or leaving:
                self._come_out(prompts, leaving, ended)

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

    def _run_dry(self) -> Clocked:
        """Nothing to plan behind the running step: wait for its end."""
        prompts, leaving = self._prompts_out, self.scheduler.leaving
        self._prompts_out, self.scheduler.leaving = [], []
        if self._flight is not None:
            yield from self._land()
        self.seen = self.now
        if self.seen >= self.source.next_ticks or not self._runs_ahead:
            yield self.sleep(self.seen - int(self.env.now))
            self.source.deliver(self.seen)
        self._come_out(prompts, leaving, self.seen)

    def _idle(self) -> ClockedAnswer:
        """Wait for what a sequence waits for, an arrival or a release; False where none can come."""
        source = self.source
        if self.observer is not None:
            self.observer.idle(self)
        if self.waits:
            yield self.env.any_of(self._wake_events())
        elif self.scheduler.waiting:
            msg = f"request {self.scheduler.waiting[0]} waits although the replica is idle"
            raise InvariantViolation(msg)
        elif source.next_ticks < NEVER:
            arrival = self.env.timeout(source.next_ticks - int(self.env.now))
            # Another replica may release a request that comes before.
            yield arrival if self._runs_ahead or not self._dynamic else self.env.any_of([arrival, source.released])
        elif self._dynamic and source.outstanding:
            yield source.released
        else:
            yield self.env.timeout(self.now - int(self.env.now))
            return False
        self.now = self.seen = int(self.env.now)
        return True

    def _settle_rejected(self) -> None:
        self.load -= len(self.scheduler.rejected)
        if self._dynamic:
            for index in self.scheduler.rejected:
                self.source.settle(index, self.seen)
        self.scheduler.rejected.clear()

    # --- decode runs ------------------------------------------------------------------------------------------------

    def _plan_run(self) -> tuple[int, int, int]:  # noqa: C901, PLR0912, PLR0915 - hot, as the loop itself
        """Take steps until something can change: (steps, ticks, ticks of the last), written down.

        No steps where the pool is dry.
        """
        batch, scheduler = self.batch, self.scheduler
        size, slope, variable = batch.size, batch.slope, batch.variable
        if self._factors is not None:
            slope, variable = slope * self._factors[size], variable * self._factors[size]
        first = self.tables.step[size] + variable
        # Who waits was held back for as long as nobody ends, or a step that preempted did not look at the queue.
        steps = 1
        if self.coalesce and not self._late and (scheduler.looked or not scheduler.waiting):
            steps = batch.finishing[0][0] - batch.counter
        if scheduler.leaving:
            if scheduler.waiting or not self._foresees_ends:
                steps = 1
            elif steps > 1 and batch.due_bytes() <= scheduler.free:
                self._come_out_behind_first_step()
        if not batch.token_ticks:
            bend = batch.steps_until_bend()
            if bend is not None and bend < steps:
                steps = bend
        work, own_first, own_slope = self.host_work[size], first, slope
        if work:
            if not self.overlaps:
                first += work
            elif first < work:
                steps = min(steps, steps_within(work - first, slope))
                first, slope = work, 0
        if scheduler.waiting and scheduler.reusable_bytes and batch.growth_total:
            # Evicting what the head of the queue would reuse changes what it needs: look again after an eviction.
            if scheduler.sharing is None:
                steps = 1
            else:
                spare = scheduler.free - scheduler.sharing.cache.evictable_bytes
                steps = min(steps, max(1, batch.steps_until_dry(spare)))
        if self._tiers is not None and scheduler.sharing is not None:
            steps = min(steps, self._steps_to_tiers(scheduler.sharing.cache.evictable_bytes))
        if batch.growth_total * (steps // batch.block_size + 1) > scheduler.free:
            steps = min(steps, batch.steps_until_dry(scheduler.free))
            if not steps:
                return 0, 0, 0
        if self._drafted is not None:
            return self._plan_drafted_run(self._drafted, steps)
        ticks = steps * first + slope * (steps * (steps - 1) // 2)
        last = first + slope * (steps - 1)
        # A new arrival changes nothing while an earlier one is still held back; who is on the way has room already.
        gap = (self.source.next_ticks if self.horizon is None else self.horizon()) - self.now
        if ticks > gap and (not scheduler.waiting or self.waits or scheduler.reorders):
            if not self.overlaps:
                steps, ticks = steps_to_cover(gap, first, slope)
            elif ticks - last > gap:
                # The first plan that sees it is made when a step starts, and the step behind it takes it in.
                steps = 1 + steps_to_cover(gap, first, slope)[0] if gap > 0 else 1
                ticks = steps * first + slope * (steps * (steps - 1) // 2)
                last = first + slope * (steps - 1)
        self.decode_steps[size] += steps
        own = ticks
        if work:
            own = steps * own_first + own_slope * (steps * (steps - 1) // 2)
            self.record.host_ticks += ticks - own
        self.variable_total += own - steps * self.tables.step[size]
        if self._factors is not None:
            self.unscaled_total += (own - steps * self.tables.step[size]) // self._factors[size]
        if self._late:
            self._record_step(size, ticks, self.now + ticks)
        else:
            self.record.runs.append((steps, size, first, slope))
        return steps, ticks, last

    def _plan_drafted_run(self, batch: SpeculativeBatch, steps: int) -> tuple[int, int, int]:
        """The same for steps that verify drafts, each of which lasts its own time."""
        size, fixed = batch.size, self.tables.step[batch.size]
        steps = min(steps, batch.steps_until_dry(self.scheduler.free))
        if not steps:
            return 0, 0, 0
        work, own = self.host_work[size], batch.durations(fixed, steps)
        lasting = np.maximum(own, work) if self.overlaps else own + work
        ends = np.cumsum(lasting)
        if not self.scheduler.waiting or self.waits or self.scheduler.reorders:
            gap = (self.source.next_ticks if self.horizon is None else self.horizon()) - self.now
            steps = steps_until(lasting, ends, gap, overlaps=self.overlaps)
        ticks, own_ticks = int(ends[steps - 1]), int(own[:steps].sum())
        self.decode_steps[size] += steps
        self.record.host_ticks += ticks - own_ticks
        self.variable_total += own_ticks - steps * fixed
        rows = np.zeros((steps, 4), dtype=np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2] = 1, size, lasting[:steps]
        self.record.runs.append(rows.ravel().tolist())
        return steps, ticks, int(lasting[steps - 1])

    def _come_out_behind_first_step(self) -> None:
        """Sequences that end with the running step: a run's first step is planned with their blocks held, no other."""
        scheduler, due = self.scheduler, self.batch.due_bytes()
        scheduler.free -= due
        self._come_out(self._prompts_out, scheduler.leaving, self.now)
        self._prompts_out, scheduler.leaving = [], []
        scheduler.free += due

    def _steps_to_tiers(self, evictable_bytes: int) -> int:
        """Steps until the tiers may hear of an eviction, or another replica may change what is found in them."""
        tiers, batch = self._tiers, self.batch
        if tiers is not None and tiers.is_shared and self.scheduler.waiting:
            return 1
        if tiers is None or not tiers.writes_back or not batch.growth_total:
            return batch.finishing[0][0] - batch.counter
        return max(1, batch.steps_until_dry(self.scheduler.free - evictable_bytes))

    def _advance(self, steps: int) -> None:
        """Every decoding sequence gains ``steps`` tokens: account for blocks, note who ends."""
        batch = self.batch
        due = batch.advance(steps)
        if due:
            scheduler = self.scheduler
            scheduler.free -= due
            if scheduler.sharing is not None:
                scheduler.sharing.cache.evict_until(scheduler.free)
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

    def _add_host_work(self, ticks: int, sequences: int) -> int:
        """A step's ticks with the host's work: behind it, or beside it where steps are planned ahead."""
        work = self.host_work[sequences]
        whole = max(ticks, work) if self.overlaps else ticks + work
        self.record.host_ticks += whole - ticks
        return whole

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _begin_mixed(self, chunks: list[Chunk]) -> tuple[int, list[SequenceState]]:
        """Write down one step of all decoding sequences and some prompts: (ticks, prompts that it completes)."""
        batch = self.batch
        size = self._decoding = batch.size if self.scheduler.mixes else 0
        if size < batch.size:
            self._hold_back()
        tokens = compress = 0
        ending = []
        for sequence, chunk in chunks:
            tokens += chunk
            if sequence.done + chunk == sequence.target:
                ending.append(sequence)
                if not batch.token_ticks:
                    profile = sequence.profile = self._profile_of(sequence)
                    compress += profile.compress_ticks
        ticks = self._prefill_ticks(chunks, tokens, len(ending), 0 if self._side_stream else compress)
        if size:
            ticks += self._count_decode_step()
        ticks = self._add_host_work(ticks, size + len(chunks))
        if self.observer is not None:
            self.observer.step(self, ticks, prompt_tokens=tokens, prompts=prompts_of(chunks))
        return ticks, ending

    def _count_decode_step(self) -> int:
        """Write down one decode step of the whole batch; its ticks."""
        size, variable = self.batch.size, self.batch.variable
        if self._factors is not None:
            self.unscaled_total += variable
            variable *= self._factors[size]
        self.decode_steps[size] += 1
        self.variable_total += variable
        return self.tables.step[size] + variable

    def _end_mixed(self, chunks: list[Chunk], ending: list[SequenceState], lasted: int) -> None:
        batch = self.batch
        for sequence, chunk in chunks:
            sequence.done += chunk
        if self._decoding:
            if self._late:
                self._record_step(batch.size, lasted, self.now)
            else:
                self.record.runs.append((1, batch.size, lasted, 0))
            self._advance(1)
        for sequence in ending:
            self._end_prompt(sequence)

    def _end_prompt(self, sequence: SequenceState) -> None:
        """A prompt is in: its blocks can be shared, its token will come out, and it decodes or is compacted first."""
        scheduler, index = self.scheduler, sequence.index
        scheduler.end_prompt(sequence)
        if scheduler.sharing is not None:
            scheduler.register_prompt(sequence)
        generated = self.generated[index] = self.generated[index] + 1
        since = UNKNOWN if generated == 1 else scheduler.last_token.pop(index)
        left = scheduler.output[index] - generated
        profile = sequence.profile
        if self._side_stream and profile is not None and profile.compress_ticks and left:
            self._prompts_out.append((sequence, since, left))
        else:
            self._prompts_out.append((sequence, since, 0))
            self._join(sequence, left)

    def _prefill_ticks(self, chunks: list[Chunk], tokens: int, ending: int, compress: int) -> int:
        """What the chunks add to a step: the difference of the tables, attention, and encoding the new tokens."""
        if self._lanes is not None:
            return self._lane_prefill_ticks(self._lanes, chunks)
        tables, size = self.tables, self._decoding
        compression = compress + tables.append[tokens]
        if not size:
            compression += tables.append_launch
        attention = 0
        for sequence, chunk in chunks:
            if sequence.done == 0:
                attention += tables.first_chunk[chunk]
            else:
                seconds, unpack_s = self.step.prefill_attention_seconds(chunk, sequence.done)
                attention += round(float(seconds) * TICKS_PER_SECOND)
                compression += round(float(unpack_s) * TICKS_PER_SECOND)
                if self._speculation is not None:
                    seconds = self._speculation.prefill_attention_seconds(chunk, sequence.done)
                    attention += round(seconds * TICKS_PER_SECOND)
        self.record.prompts.append((size, tokens, ending, attention, compression))
        base, head = tables.base, tables.head
        size *= tables.rows
        return base[size + tokens] - base[size] + head[size + ending] - head[size] + attention + compression

    def _profile_of(self, sequence: SequenceState) -> SequenceProfile:
        """The life of a sequence whose prompt is in."""
        return self.step.sequences.profile(sequence.target)

    def compression_ticks(self, drafting_ticks: int) -> int:
        """Part of ``variable_total``, of which drafts took so much, that is due to compression."""
        if self.batch.token_ticks:
            return math.floor((self.variable_total - drafting_ticks) * self.step.sequences.unpack_share)
        if self.tables.factors is None:
            return self.batch.unpack_total
        # The batch counts sixteenths of a lane's share; the steps were charged by the fullest lane.
        return self.batch.unpack_total * self.variable_total // max(1, self.unscaled_total)

    def _lane_prefill_ticks(self, lanes: LanePricing, chunks: list[Chunk]) -> int:
        """The same where the chunks are dealt to lanes: what the fullest one takes longer."""
        pieces = []
        for sequence, chunk in chunks:
            ends, profile = sequence.done + chunk == sequence.target, sequence.profile
            compress = profile.compress_ticks if ends and profile is not None and not self._side_stream else 0
            pieces.append(Piece(chunk, sequence.done, ends, compress))
        size, record = self._decoding, self.record
        fullest = lanes.prompts(pieces, size)
        decoding = self.step.deployment.parallelism.sequences_per_lane(size)
        record.prompts.append((decoding, fullest.tokens, fullest.ending, fullest.attention, fullest.compression))
        record.other_lanes_tokens += sum(piece.tokens for piece in pieces) - fullest.tokens
        return fullest.ticks

    def _begin_lone_prompt(self) -> int:
        """Start the step of the one waiting request, the commonest of all, without a plan; its ticks.

        0 where the prompt needs the scheduler: it was preempted before, does not fit the budget, the seats or the
        pool, or another prompt is in progress. Equal to :meth:`_begin_mixed`, which steps one by one always takes.
        """
        scheduler, batch, tables, record = self.scheduler, self.batch, self.tables, self.record
        limits, index, size = scheduler.limits, scheduler.waiting[0], batch.size
        target = scheduler.prompt[index]
        total = size + target
        held = limits.fixed_bytes + -(-target // limits.block_size) * batch.block_bytes
        if (
            scheduler.prefilling
            or self.log.scheduled[index] >= 0
            or total > limits.max_num_batched_tokens
            or size + len(scheduler.leaving) >= limits.max_num_seqs
            or target + scheduler.output[index] > limits.max_model_len
            or held + batch.due_bytes() > scheduler.free
        ):
            return 0
        scheduler.waiting.clear()
        sequence = self._lone = SequenceState(index, target)
        sequence.held = held
        scheduler.free -= held
        self.log.scheduled[index] = self.seen
        running = size + len(scheduler.leaving)
        if running >= record.max_running:
            record.max_running = running + 1
        record.max_waiting = max(record.max_waiting, 1)
        attention, compression = tables.first_chunk[target], tables.append[target]
        ticks = tables.base[total] - tables.base[size] + tables.head[size + 1] - tables.head[size]
        if size:
            self.decode_steps[size] += 1
            self.variable_total += batch.variable
            ticks += tables.step[size] + batch.variable
        else:
            compression += tables.append_launch
        record.prompts.append((size, target, 1, attention, compression))
        ticks += attention + compression
        work = self.host_work[size + 1]
        if not self.overlaps or ticks < work:
            ticks = self._add_host_work(ticks, size + 1)
        if self.observer is not None:
            self.observer.step(self, ticks, prompt_tokens=target, prompts=(index,))
        return ticks

    def _end_lone_prompt(self, ticks: int) -> None:
        batch, scheduler, sequence = self.batch, self.scheduler, self._lone
        index = sequence.index
        if batch.size:
            self.record.runs.append((1, batch.size, ticks, 0))
            self._advance(1)
        self.log.first_token[index] = self.now
        self.generated[index] = 1
        left = scheduler.output[index] - 1
        if left:
            sequence.held = scheduler.limits.fixed_bytes
            batch.join(sequence, left)
        else:
            scheduler.leaving.append((batch.next_order(), sequence, sequence.held))

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

    # --- sharing the device -----------------------------------------------------------------------------------------

    @property
    def _shares_device(self) -> bool:
        """Whether anything runs beside the engine's steps."""
        return not self.device.is_idle or (self._tiers is not None and self._tiers.copies > 0)

    def _start_loads(self) -> None:
        """Copy back what newly admitted prompts wait for."""
        scheduler, tiers = self.scheduler, self._tiers
        if tiers is not None and scheduler.sharing is not None:
            for sequence, reload in scheduler.loads:
                tokens = len(reload.values) * scheduler.sharing.unit_tokens
                self.waits.add(tiers.load(reload), partial(self._take_loaded, sequence, tokens))
        scheduler.loads.clear()

    def _take_loaded(self, sequence: SequenceState, tokens: int) -> None:
        sequence.done += tokens
        self.scheduler.loaded.append(sequence)

    def _await_arrivals(self) -> None:
        """Receive what was admitted with KV from elsewhere; only engines of a decode pool admit such."""
        raise NotImplementedError

    def _occupy(self, ticks: int) -> simpy.Event:
        """The engine's step as an activity that shares the device with compaction and copies."""
        return self._start_step(ticks, self._demand(ticks))

    def _start_step(self, ticks: int, demand: Demand) -> simpy.Event:
        """Start a step, behind copies of blocks that were evicted for it; the event is its end."""
        start = partial(self.device.start, ticks, demand, "step")
        if self._tiers is not None and self._tiers.write_backs:
            return self._tiers.after_write_backs(start)
        return start().done

    def _demand(self, ticks: int) -> Demand:
        """What a step of ``ticks`` asks of the device: memory while it decodes, compute for prompts."""
        size = self.batch.size
        factor = self._factors[size] if self._factors is not None else 1
        decode = self.tables.step[size] + self.batch.variable * factor if size else 0
        return Demand(hbm=decode / ticks, compute=(ticks - decode) / ticks)

    def _contended(self, alone: int) -> int:
        """How long the step just taken lasted on the shared device."""
        lasted = int(self.env.now) - self.now
        self.record.contention_ticks += lasted - alone
        return lasted

    def _shared_step(self) -> Clocked:
        """One decode step that may share the device, or ends the wait of sequences that were compacted aside."""
        batch, scheduler = self.batch, self.scheduler
        if batch.due_bytes() > scheduler.free:
            scheduler.make_room(self.now)
            self._forget_preempted()
            if not batch.size:
                return
        size, ticks = batch.size, self._begin_decode_step()
        yield self._occupy(ticks)
        ticks = self._contended(ticks)
        self.now += ticks
        self.seen = self.now
        self.source.deliver(self.now)
        self._record_step(size, ticks, self.now)
        self._advance(1)
        leaving, scheduler.leaving = scheduler.leaving, []
        self._come_out([], leaving, self.now)

    def _begin_decode_step(self) -> int:
        """Write down one step of all decoding sequences, which may share the device; its ticks alone."""
        ticks = self._add_host_work(self._count_decode_step(), self.batch.size)
        if self.observer is not None:
            self.observer.step(self, ticks)
        return ticks

    def _step_in_company(self, chunks: list[Chunk]) -> Clocked:
        """Plan a step behind the running one, whose end is known when it comes, and start it then."""
        batch, scheduler = self.batch, self.scheduler
        if not chunks and batch.due_bytes() > scheduler.free:
            scheduler.make_room(self.now)
            self._forget_preempted()
            if not batch.size:
                yield from self._run_dry()
                return
        size = batch.size
        ticks, ending = self._begin_mixed(chunks) if chunks else (self._begin_decode_step(), [])
        demand = self._demand(ticks)
        prompts, leaving = self._prompts_out, scheduler.leaving
        self._prompts_out, scheduler.leaving = [], []
        late, self._late = self._late, {}
        for sequence, chunk in chunks:
            sequence.done += chunk
        if size:
            self._advance(1)
        for sequence in ending:
            self._end_prompt(sequence)
        if self._flight is not None:
            yield from self._land()
        self._come_out(prompts, leaving, self.now)
        self.seen = self.now
        if self.observer is not None:
            self.observer.begins(self.now)
        done = self._start_step(ticks, demand)
        if self._tiers is not None:
            self._tiers.compute_with(done)
        self._flight = Flight(done, self.now, ticks, size - len(late), late)
        # When it ends is not known yet; any later time says that a step is under way.
        self.now += ticks

    def _land(self) -> Clocked:
        """Wait for the running step's end, and write down what it was to its sequences."""
        flight, record = self._flight, self.record
        if flight is None:
            return
        yield flight.done
        self._flight = None
        promised, self.now = self.now, int(self.env.now)
        lasted = self.now - flight.start
        record.contention_ticks += lasted - flight.alone
        if flight.sequences:
            record.runs.append((1, flight.sequences, lasted, 0))
        record.gaps += [self.now - since for since in flight.late.values()]
        # Sequences that the plan behind it preempted got their latest token from it.
        for index, since in self.scheduler.last_token.items():
            if since == promised:
                self.scheduler.last_token[index] = self.now
        self.source.deliver(self.now)

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

    def _hold_back(self) -> None:
        """A step of prompts alone: who decodes goes without a token, and its next gap began at its latest one."""
        late, now = self._late, self.now
        if len(late) < self.batch.size:
            for index in self.batch.active:
                late.setdefault(index, now)

    def _forget_preempted(self) -> None:
        """Sequences preempted before their first step after compaction: their gap goes on."""
        for index in [index for index in self._late if index not in self.batch.active]:
            self.scheduler.last_token[index] = self._late.pop(index)

    def _compact_aside(self, sequence: SequenceState, profile: SequenceProfile, left: int, since: int) -> None:
        """Score and compact on a side stream; the sequence decodes once its cache is compact."""
        self.record.aside_ticks += profile.compress_ticks
        activity = self.device.start(profile.compress_ticks, Demand(hbm=1.0), "compact")
        self.waits.add(activity.done, partial(self._join_compacted, sequence, left, since))

    def _join_compacted(self, sequence: SequenceState, left: int, since: int) -> None:
        self._join(sequence, left)
        self._late[sequence.index] = since

    def _wake_events(self) -> list[simpy.Event]:
        """What can end an idle wait: the end of what a sequence waits for, the next arrival, or a release."""
        events = self.waits.events()
        if self._dynamic:
            events.append(self.source.released)
        if self.source.next_ticks < NEVER:
            events.append(self.env.timeout(self.source.next_ticks - self.now))
        return events
