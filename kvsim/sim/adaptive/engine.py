"""One replica whose sequences are at several levels of compression. The run loop is the plain engine's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvsim.adaptive import Adaptive
from kvsim.cost.profile import SequenceProfile
from kvsim.sim.adaptive.batch import AdaptiveBatch, level_of
from kvsim.sim.adaptive.control import LevelControl
from kvsim.sim.adaptive.prices import LevelPrices
from kvsim.sim.adaptive.record import AdaptiveRecord
from kvsim.sim.adaptive.scheduler import LevelSharing, adaptive_scheduler
from kvsim.sim.batch import DecodeBatch, SequenceState
from kvsim.sim.engine import ReplicaEngine
from kvsim.sim.parts import ReplicaParts
from kvsim.sim.replica import Clocked, ClockedAnswer
from kvsim.sim.scheduling import Chunk, Scheduler, SchedulerLimits, SchedulerParts
from kvsim.specs.adaptive import StaticPolicy
from kvsim.units import TICKS_PER_SECOND


class AdaptiveEngine(ReplicaEngine):
    """Lets prompts in at the level that its policy stands at, and prices each sequence by its own."""

    def __init__(
        self,
        parts: ReplicaParts,
        sharing: LevelSharing | None,
        adaptive: Adaptive,
        prices: LevelPrices,
        classes: tuple[tuple[str, ...], Sequence[int] | None],
    ) -> None:
        self.prices = prices
        self._level_sharing = sharing
        names, self._class_of = classes
        bounds = [adaptive.bounds(name) for name in names] if self._class_of is not None else [adaptive.bounds(None)]
        start = adaptive.policy.level if isinstance(adaptive.policy, StaticPolicy) else 0
        pool_bytes = parts.pool.limits.pool_bytes
        self.adaptive_record = AdaptiveRecord(prices.count, len(bounds), start)
        self.control = LevelControl(adaptive, prices, self.adaptive_record, pool_bytes, bounds, self._class_of)
        super().__init__(replace(parts, sharing=sharing.whole if sharing else None))
        self.record.adaptive = self.adaptive_record

    def _new_batch(self, limits: SchedulerLimits, token_ticks: int) -> DecodeBatch:
        self._mixed_batch = AdaptiveBatch(limits.block_size, self.prices, self._class_of, self.adaptive_record)
        return self._mixed_batch

    def _new_scheduler(self, parts: SchedulerParts) -> Scheduler:
        scheduler = adaptive_scheduler(self.step.deployment.engine, parts)
        scheduler.equip(self._level_sharing, self.prices.prompts, self.control)
        self.control.attach(scheduler, self._mixed_batch, lambda: self.source.next_ticks, self._next_ticks)
        return scheduler

    def compression_ticks(self, drafting_ticks: int) -> int:
        """Part of ``variable_total`` that is due to compression."""
        return self._mixed_batch.compression_ticks()

    # --- the policy looks at every boundary -------------------------------------------------------------------------

    def _next_ticks(self) -> int:
        """How long the next step takes if it decodes only; no later step of its run grows faster than the batch."""
        size = self.batch.size
        ticks, work = self.tables.step[size] + self.batch.variable, self.host_work[size]
        return max(ticks, work) if self.overlaps else ticks + work

    def _plan_run(self) -> tuple[int, int, int]:
        self.control.look(self.now)
        return super()._plan_run()

    def _step_in_company(self, chunks: list[Chunk]) -> Clocked:
        self.control.look(self.now)
        yield from super()._step_in_company(chunks)

    def _shared_step(self) -> Clocked:
        self.control.look(self.now)
        yield from super()._shared_step()

    def _idle(self) -> ClockedAnswer:
        since, waiting = self.now, len(self.scheduler.waiting)
        self.control.look(since)
        goes_on = yield from super()._idle()
        if goes_on:
            self.control.rest(since, self.now, waiting)
        return goes_on

    # --- prices of the sequence's own level -------------------------------------------------------------------------

    def _profile_of(self, sequence: SequenceState) -> SequenceProfile:
        return self.prices.steps[level_of(sequence)].sequences.profile(sequence.target)

    def _prefill_ticks(self, chunks: list[Chunk], tokens: int, ending: int, compress: int) -> int:
        tables, size, prices = self.tables, self.batch.size, self.prices
        by_level = [0] * prices.count
        attention, compression = 0, compress
        for sequence, chunk in chunks:
            level = level_of(sequence)
            by_level[level] += chunk
            if sequence.done == 0:
                attention += prices.tables[level].first_chunk[chunk]
            else:
                seconds, unpack_s = prices.steps[level].prefill_attention_seconds(chunk, sequence.done)
                attention += round(float(seconds) * TICKS_PER_SECOND)
                compression += round(float(unpack_s) * TICKS_PER_SECOND)
        present = self._mixed_batch.mask
        launched = prices.mixed.append_launch
        both = present | sum(1 << level for level, count in enumerate(by_level) if count)
        compression += launched[both] - launched[present]
        compression += sum(table.append[count] for table, count in zip(prices.tables, by_level, strict=True))
        self.record.prompts.append((size, tokens, ending, attention, compression))
        base, head = tables.base, tables.head
        return base[size + tokens] - base[size] + head[size + ending] - head[size] + attention + compression
