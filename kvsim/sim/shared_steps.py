"""Steps beside other work of the device: copies, compaction, arriving KV. Each is an activity of its own."""

from __future__ import annotations

from functools import partial

import simpy

from kvsim.errors import InvariantViolation
from kvsim.sim.arrivals import NEVER
from kvsim.sim.batch import SequenceState
from kvsim.sim.prompt_steps import PromptSteps
from kvsim.sim.replica import Clocked, Flight
from kvsim.sim.resources import Demand
from kvsim.sim.scheduling import Chunk


class SharedSteps(PromptSteps):
    """Steps that share the device with other activities."""

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
        msg = "a sequence came with its KV to a replica that is in no decode pool"
        raise InvariantViolation(msg)

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
        if flight.sequences or flight.late:
            record.runs.append((1, flight.sequences, lasted, 0))
        record.gaps += [self.now - since for since in flight.late.values()]
        # Sequences that the plan behind it preempted got their latest token from it.
        for index, since in self.scheduler.last_token.items():
            if since == promised:
                self.scheduler.last_token[index] = self.now
        self.source.deliver(self.now)

    def _wake_events(self) -> list[simpy.Event]:
        """What can end an idle wait: the end of what a sequence waits for, the next arrival, or a release."""
        events = self.waits.events()
        if self._dynamic:
            events.append(self.source.released)
        if self.source.next_ticks < NEVER:
            events.append(self.env.timeout(self.source.next_ticks - self.now))
        return events

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
