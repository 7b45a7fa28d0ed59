"""Runs of decode steps: as many at once as nothing can change in, summed in closed form on the integer clock."""

from __future__ import annotations

import numpy as np

from kvsim.sim.replica import Replica
from kvsim.sim.spans import steps_to_cover, steps_within
from kvsim.sim.speculation import steps_until
from kvsim.sim.speculative_batch import SpeculativeBatch


class DecodeRuns(Replica):
    """Plans runs of decode steps."""

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
