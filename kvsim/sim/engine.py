"""One replica on the clock: continuous batching as a SimPy process.

An event is a scheduler step, never a token. Steps that only decode and repeat until something can change (a sequence
ends, a request arrives, the pool runs dry, a token curve bends) are taken as one run whose length is summed in closed
form on the integer clock, which equals stepping through them exactly.

With asynchronous scheduling a step is planned when the one before it starts. The plan counts the running step's
tokens as there, but the seats and blocks of sequences that end with it only once it is over.
Source: vLLM 0.15.1 ``v1/engine/core.py`` ``step_with_batch_queue`` with two batches, and ``AsyncScheduler``.
"""

from __future__ import annotations

from kvsim.errors import InvariantViolation
from kvsim.sim.arrivals import NEVER
from kvsim.sim.decode_runs import DecodeRuns
from kvsim.sim.replica import LONE_STRIDE_TICKS, Clocked, ClockedAnswer
from kvsim.sim.shared_steps import SharedSteps
from kvsim.sim.sprint import sprint


class ReplicaEngine(SharedSteps, DecodeRuns):
    """Plays a scheduler's steps on the clock and writes down what happened."""

    def run(self) -> Clocked:  # noqa: C901, PLR0912, PLR0915 - the hot loop; calls would cost more than they explain
        """Serve until nothing can arrive any more.

        The clock is advanced only where the outside can matter: up to the next arrival a replica's steps follow from
        its own state, so they are taken ahead of the clock and paid for in one event.
        """
        env, source, scheduler, batch = self.env, self.source, self.scheduler, self.batch
        # A plan that is made behind a running step has its blocks in the cache from then on, as vLLM's has.
        caches_are_read = source.reads_caches and not self.overlaps
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
            if self._tiers is not None or caches_are_read:
                # They hear at its end what a step computed and whom it pushed out.
                yield sleep(self.now - int(env.now))
                if caches_are_read:
                    # Who came while it ran is routed by what could be found then.
                    source.deliver(self.now)
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
