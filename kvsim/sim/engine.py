"""One replica on the clock: continuous batching as a SimPy process.

An event is a scheduler step, never a token. Steps that only decode and repeat until something can change (a sequence
ends, a request arrives, the pool runs dry, a token curve bends) are taken as one run whose length is summed in closed
form on the integer clock, which equals stepping through them exactly.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Generator
from functools import partial
from typing import Any

import simpy

from kvsim.cost.sequence import SequenceProfile
from kvsim.cost.step import StepModel
from kvsim.cost.tables import StepTables
from kvsim.errors import InvariantViolation
from kvsim.sim.arrivals import NEVER, ArrivalSource
from kvsim.sim.batch import DecodeBatch, SequenceState
from kvsim.sim.recorder import ReplicaRecord, RequestLog
from kvsim.sim.resources import Demand, SharedDevice
from kvsim.sim.scheduler import Chunk, PrefixSharing, Scheduler, SchedulerLimits
from kvsim.sim.spans import steps_to_cover
from kvsim.sim.waits import Waits
from kvsim.units import TICKS_PER_SECOND

Clocked = Generator[simpy.Event, Any, None]
ClockedAnswer = Generator[simpy.Event, Any, bool]


class ReplicaEngine:
    """Plays a scheduler's steps on the clock and writes down what happened."""

    def __init__(
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
    ) -> None:
        self.env = env
        self.now = 0
        """The clock at the latest step boundary, in ticks."""
        self.source = source
        self.log = log
        self.step = step
        self.tables = tables
        self.coalesce = coalesce
        self.record = ReplicaRecord(min_free_bytes=limits.pool_bytes)
        self.generated = [0] * len(lengths[0])
        self.batch = self._new_batch(limits, token_ticks)
        self.scheduler = self._new_scheduler(limits, lengths, sharing)
        self.device = device
        self.decode_steps = [0] * (limits.max_num_seqs + 1)
        """Decode steps taken at each batch size."""
        self.variable_total = 0
        """Ticks of all decode steps above the batches' fixed parts."""
        self._dynamic = source.is_dynamic
        self._host = sharing.host if sharing is not None else None
        self.waits = Waits()
        """Sequences that wait for a compaction or for blocks from the host; each has a seat."""
        self._side_stream = step.deployment.engine.compression_stream == "side"
        self._runs_ahead = coalesce and not self._side_stream and self._host is None
        self._plain = self._runs_ahead and token_ticks > 0 and sharing is None
        """Whether a prompt alone can skip the scheduler: every token costs the same, nothing is shared."""
        self._lone = SequenceState(-1, 0)
        self._late: dict[int, int] = {}
        """When sequences that were just compacted aside, and have not decoded since, got their latest token."""
        self.load = 0
        """Requests routed here that have not ended; counted by the router, and only where it has a choice."""

    def _new_batch(self, limits: SchedulerLimits, token_ticks: int) -> DecodeBatch:
        return DecodeBatch(limits.block_size, limits.prefill_growths[0][1], token_ticks)

    def _new_scheduler(
        self, limits: SchedulerLimits, lengths: tuple[list[int], list[int]], sharing: PrefixSharing | None
    ) -> Scheduler:
        return Scheduler(limits, self.batch, lengths, self.generated, self.log, self.record, sharing)

    @property
    def waiting(self) -> deque[int]:
        """Requests that the router left here and the scheduler has not admitted."""
        return self.scheduler.waiting

    # --- the clock --------------------------------------------------------------------------------------------------

    def run(self) -> Clocked:  # noqa: C901, PLR0912, PLR0915 - the hot loop; calls would cost more than they explain
        """Serve until nothing can arrive any more.

        The clock is advanced only where the outside can matter: up to the next arrival a replica's steps follow from
        its own state, so they are taken ahead of the clock and paid for in one event.
        """
        env, source, scheduler, batch = self.env, self.source, self.scheduler, self.batch
        while True:
            if source.next_ticks <= self.now:
                source.deliver(self.now)
            if self.waits:
                self.waits.settle()
            if scheduler.waiting or scheduler.partial is not None or scheduler.loaded:
                if self._plain and len(scheduler.waiting) == 1 and (ticks := self._begin_lone_prompt()):
                    self.now += ticks
                    if self.now >= source.next_ticks:
                        yield env.timeout(self.now - int(env.now))
                        source.deliver(self.now)
                    self._end_lone_prompt(ticks)
                    continue
                aside = len(self.waits) + len(scheduler.loaded)
                chunks = scheduler.schedule(self.now, aside)
                if scheduler.loads:
                    self._start_loads()
                if self._late:
                    self._forget_preempted()
                if scheduler.rejected:
                    self._settle_rejected()
                if chunks:
                    ticks, ending = self._begin_mixed(chunks)
                    if self._shares_device:
                        yield self._occupy(ticks)
                        ticks = self._contended(ticks)
                    self.now += ticks
                    if self.now >= source.next_ticks or not self._runs_ahead:
                        yield env.timeout(self.now - int(env.now))
                        source.deliver(self.now)
                    self._end_mixed(chunks, ending, ticks)
                    continue
            if batch.size:
                if self._shares_device or self._late:
                    yield from self._shared_step()
                    continue
                steps, ticks = self._plan_run()
                if not steps:
                    scheduler.make_room(self.now)
                    if not batch.size:
                        continue
                    steps, ticks = self._plan_run()
                self.now += ticks
                if self.now >= source.next_ticks or not self._runs_ahead:
                    yield env.timeout(self.now - int(env.now))
                    # Before the step's end counts: the router sees who was there when the request came.
                    source.deliver(self.now)
                self._advance(steps)
                continue
            if not scheduler.looked and (scheduler.waiting or scheduler.loaded):
                continue
            if not (yield from self._idle()):
                return

    def _idle(self) -> ClockedAnswer:
        """Wait for what a sequence waits for, an arrival or a release; False where none can come."""
        source = self.source
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
        self.now = int(self.env.now)
        return True

    def _settle_rejected(self) -> None:
        self.load -= len(self.scheduler.rejected)
        if self._dynamic:
            for index in self.scheduler.rejected:
                self.source.settle(index, self.now)
        self.scheduler.rejected.clear()

    # --- decode runs ------------------------------------------------------------------------------------------------

    def _plan_run(self) -> tuple[int, int]:
        """Take steps until something can change: (steps, ticks), written down; no steps where the pool is dry."""
        batch, scheduler = self.batch, self.scheduler
        size, slope = batch.size, batch.slope
        first = self.tables.step[size] + batch.variable
        # Who waits was held back for as long as nobody ends, or a step that preempted did not look at the queue.
        steps = 1
        if self.coalesce and (scheduler.looked or not scheduler.waiting):
            steps = batch.finishing[0][0] - batch.counter
        if not batch.token_ticks:
            bend = batch.steps_until_bend()
            if bend is not None and bend < steps:
                steps = bend
        if scheduler.waiting and scheduler.reusable_bytes and scheduler.sharing is not None and batch.growth_total:
            # Evicting what the head of the queue would reuse changes what it needs: look again after an eviction.
            spare = scheduler.free - scheduler.sharing.cache.evictable_bytes
            steps = min(steps, max(1, batch.steps_until_dry(spare)))
        if batch.growth_total * (steps // batch.block_size + 1) > scheduler.free:
            steps = min(steps, batch.steps_until_dry(scheduler.free))
            if not steps:
                return 0, 0
        ticks = steps * first + slope * (steps * (steps - 1) // 2)
        # A new arrival changes nothing while an earlier one is still held back.
        gap = self.source.next_ticks - self.now
        if ticks > gap and not scheduler.waiting:
            steps, ticks = steps_to_cover(gap, first, slope)
        self.decode_steps[size] += steps
        self.variable_total += ticks - steps * self.tables.step[size]
        self.record.runs.append((steps, size, first, slope))
        return steps, ticks

    def _advance(self, steps: int) -> None:
        """Every decoding sequence has gained ``steps`` tokens: account for blocks, let the finished go."""
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
            sequence = heapq.heappop(finishing)[2]
            if sequence.alive:
                if scheduler.sharing is not None:
                    scheduler.register_output(sequence)
                scheduler.give_back(sequence, batch.remove(sequence))
                self._complete(sequence.index)

    def _complete(self, index: int) -> None:
        self.log.finished[index] = self.now
        self.load -= 1
        if self._dynamic:
            self.source.settle(index, self.now)

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _begin_mixed(self, chunks: list[Chunk]) -> tuple[int, list[SequenceState]]:
        """Write down one step of all decoding sequences and some prompts: (ticks, prompts that it completes)."""
        batch, tables = self.batch, self.tables
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
        size = batch.size
        if size:
            self.decode_steps[size] += 1
            self.variable_total += batch.variable
            ticks += tables.step[size] + batch.variable
        return ticks, ending

    def _end_mixed(self, chunks: list[Chunk], ending: list[SequenceState], lasted: int) -> None:
        batch = self.batch
        for sequence, chunk in chunks:
            sequence.done += chunk
        if batch.size:
            if self._late:
                self._record_step(batch.size, lasted)
            else:
                self.record.runs.append((1, batch.size, lasted, 0))
            self._advance(1)
        for sequence in ending:
            self._end_prompt(sequence)

    def _end_prompt(self, sequence: SequenceState) -> None:
        """A prompt is in: its blocks can be shared, its token comes out, and it decodes or is compacted first."""
        scheduler = self.scheduler
        if sequence is scheduler.partial:
            scheduler.partial = None
        if scheduler.sharing is not None:
            scheduler.register_prompt(sequence)
        left = self._emit(sequence.index)
        profile = sequence.profile
        if self._side_stream and profile is not None and profile.compress_ticks and left:
            self._compact_aside(sequence, profile, left)
        else:
            self._join(sequence, left)

    def _prefill_ticks(self, chunks: list[Chunk], tokens: int, ending: int, compress: int) -> int:
        """What the chunks add to a step: the difference of the tables, attention, and encoding the new tokens."""
        tables, size = self.tables, self.batch.size
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
        self.record.prompts.append((size, tokens, ending, attention, compression))
        base, head = tables.base, tables.head
        return base[size + tokens] - base[size] + head[size + ending] - head[size] + attention + compression

    def _profile_of(self, sequence: SequenceState) -> SequenceProfile:
        """The life of a sequence whose prompt is in."""
        return self.step.sequences.profile(sequence.target)

    def compression_ticks(self) -> int:
        """Part of ``variable_total`` that is due to compression."""
        if self.batch.token_ticks:
            return math.floor(self.variable_total * self.step.sequences.unpack_share)
        return self.batch.unpack_total

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
            scheduler.partial is not None
            or self.log.scheduled[index] >= 0
            or total > limits.max_num_batched_tokens
            or size >= limits.max_num_seqs
            or target + scheduler.output[index] > limits.max_model_len
            or held + batch.due_bytes() > scheduler.free
        ):
            return 0
        scheduler.waiting.clear()
        sequence = self._lone = SequenceState(index, target)
        sequence.held = held
        scheduler.free -= held
        self.log.scheduled[index] = self.now
        if size >= record.max_running:
            record.max_running = size + 1
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
        return ticks + attention + compression

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
            scheduler.give_back(sequence, sequence.held)
            self._complete(index)

    def _emit(self, index: int) -> int:
        """A prompt is in, so its token comes out now; tokens still to come."""
        generated = self.generated[index] = self.generated[index] + 1
        if generated == 1:
            self.log.first_token[index] = self.now
        else:
            self.record.gaps.append(self.now - self.scheduler.last_token.pop(index))
        return self.scheduler.output[index] - generated

    def _join(self, sequence: SequenceState, left: int) -> None:
        """Decode from the next step on, ``left`` tokens more."""
        scheduler, batch = self.scheduler, self.batch
        if left == 0:
            scheduler.give_back(sequence, sequence.held)
            self._complete(sequence.index)
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
        return not self.device.is_idle

    def _start_loads(self) -> None:
        """Copy back what newly admitted prompts wait for."""
        scheduler, host = self.scheduler, self._host
        if host is not None and scheduler.sharing is not None:
            for sequence, values in scheduler.loads:
                tokens = len(values) * scheduler.sharing.unit_tokens
                self.waits.add(host.load(values), partial(self._take_loaded, sequence, tokens))
        scheduler.loads.clear()

    def _take_loaded(self, sequence: SequenceState, tokens: int) -> None:
        sequence.done += tokens
        self.scheduler.loaded.append(sequence)

    def _occupy(self, ticks: int) -> simpy.Event:
        """The engine's step as an activity that shares the device with compaction."""
        size = self.batch.size
        decode = self.tables.step[size] + self.batch.variable if size else 0
        demand = Demand(hbm=decode / ticks, compute=(ticks - decode) / ticks)
        return self.device.start(ticks, demand, "step").done

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
        size, ticks = batch.size, self.tables.step[batch.size] + batch.variable
        self.decode_steps[size] += 1
        self.variable_total += batch.variable
        yield self._occupy(ticks)
        ticks = self._contended(ticks)
        self.now += ticks
        self.source.deliver(self.now)
        self._record_step(size, ticks)
        self._advance(1)

    def _record_step(self, size: int, lasted: int) -> None:
        """One step's gaps; a sequence that waited for its compaction counts that wait as part of its gap."""
        late = self._late
        self.record.runs.append((1, size - len(late), lasted, 0))
        if late:
            self.record.gaps += [self.now - since for since in late.values()]
            late.clear()

    def _forget_preempted(self) -> None:
        """Sequences preempted before their first step after compaction: their gap goes on."""
        for index in [index for index in self._late if index not in self.batch.active]:
            self.scheduler.last_token[index] = self._late.pop(index)

    def _compact_aside(self, sequence: SequenceState, profile: SequenceProfile, left: int) -> None:
        """Score and compact on a side stream; the sequence decodes once its cache is compact."""
        self.record.aside_ticks += profile.compress_ticks
        activity = self.device.start(profile.compress_ticks, Demand(hbm=1.0), "compact")
        self.waits.add(activity.done, partial(self._join_compacted, sequence, left, self.now))

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
