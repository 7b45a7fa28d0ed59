"""A replica's policy on the clock: at which level prompts are let in now, and when that changes.

It looks between steps only. Between two looks of a run of equal steps the pool fills monotonically and nothing else
moves, so the step after which it would act is known ahead: runs stop there, and equal single steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kvsim.adaptive import Adaptive
from kvsim.sim.adaptive.batch import AdaptiveBatch, LevelledSequence, level_of
from kvsim.sim.adaptive.prefix_cache import LevelCache
from kvsim.sim.adaptive.prices import LevelPrices
from kvsim.sim.adaptive.record import Action, AdaptiveRecord
from kvsim.sim.batch import SequenceState
from kvsim.sim.scheduling import Scheduler
from kvsim.sim.spans import steps_to_cover
from kvsim.specs.adaptive import PressurePolicy
from kvsim.units import seconds_to_ticks

POOL_FULL = "pool above the high watermark"
QUEUE_LONG = "queue too long"
POOL_EMPTY = "pool below the low watermark"
POOL_DRY = "the next step's blocks do not fit"


class LevelControl:
    """Chooses levels on one replica. ``bounds`` are (lowest, highest) level per class; ``class_of`` per request."""

    def __init__(
        self,
        adaptive: Adaptive,
        prices: LevelPrices,
        record: AdaptiveRecord,
        pool_bytes: int,
        bounds: Sequence[tuple[int, int]],
        class_of: Sequence[int] | None,
    ) -> None:
        self._prices = prices
        self._record = record
        self._pool_bytes = pool_bytes
        self._bounds = bounds
        self._class_of = class_of
        self.level = record.start_level
        self._requantize = adaptive.requantize
        policy = adaptive.policy
        self._policy = policy if isinstance(policy, PressurePolicy) else None
        self._high_bytes = self._low_bytes = self._dwell_ticks = 0
        if self._policy is not None:
            self._high_bytes = math.ceil(self._policy.high_watermark * pool_bytes)
            self._low_bytes = math.floor(self._policy.low_watermark * pool_bytes)
            self._dwell_ticks = seconds_to_ticks(self._policy.min_dwell_s)
        self._top = prices.count - 1
        self._looked_at = -1
        self._ready_at = 0
        """From when on the next change is allowed, in ticks."""

    def attach(
        self,
        scheduler: Scheduler,
        batch: AdaptiveBatch,
        next_arrival: Callable[[], int],
        next_ticks: Callable[[], int],
    ) -> None:
        """Watch a replica's queue, pool and batch; ``next_ticks`` says how long its next step takes at least."""
        self._scheduler = scheduler
        self._batch = batch
        self._next_arrival = next_arrival
        self._next_ticks = next_ticks
        if self._policy is not None:
            batch.watch(self.steps_until_change)

    # --- levels of sequences ----------------------------------------------------------------------------------------

    def level_for(self, index: int) -> int:
        """Level of a request that is let in now: the policy's, within what its class may have."""
        low, high = self._bounds[self._class_of[index] if self._class_of is not None else 0]
        return min(max(self.level, low), high)

    def note_prompt(self, sequence: SequenceState) -> None:
        """A prompt was let in."""
        self._record.prompts[level_of(sequence)] += 1

    # --- looking between steps --------------------------------------------------------------------------------------

    def look(self, now_ticks: int) -> None:
        """Act on what is seen, at most once per step boundary."""
        if self._policy is None or now_ticks == self._looked_at:
            return
        self._looked_at = now_ticks
        if now_ticks < self._ready_at:
            return
        used = self._used_bytes
        reason = self._pressure(used)
        if reason is not None:
            if self.level and self._requantize is not None and self._encode_again(now_ticks, reason):
                return
            if self.level < self._top:
                self._change(now_ticks, self.level + 1, reason, len(self._scheduler.waiting))
        elif self.level and used <= self._low_bytes:
            self._change(now_ticks, self.level - 1, POOL_EMPTY, len(self._scheduler.waiting))

    def rest(self, since_ticks: int, now_ticks: int, waiting: int) -> None:
        """The replica idled while so many requests waited: it relaxed whenever it was allowed to."""
        if self._policy is None or self._used_bytes > self._low_bytes:
            return
        while self.level and (at := max(since_ticks, self._ready_at)) < now_ticks:
            self._change(at, self.level - 1, POOL_EMPTY, waiting)

    def make_room(self, now_ticks: int) -> None:
        """Encode sequences again before any is preempted, where the scenario asks for that."""
        if self.level and self._requantize is not None and self._requantize.before_preemption:
            self._encode_again(now_ticks, POOL_DRY)

    @property
    def _used_bytes(self) -> int:
        return self._pool_bytes - self._scheduler.free

    def _pressure(self, used_bytes: int) -> str | None:
        if used_bytes >= self._high_bytes:
            return POOL_FULL
        return QUEUE_LONG if self._queue_is_long else None

    @property
    def _queue_is_long(self) -> bool:
        policy = self._policy
        if policy is None or policy.queue_length is None:
            return False
        return len(self._scheduler.waiting) >= policy.queue_length

    def _change(self, now_ticks: int, level: int, reason: str, waiting: int) -> None:
        self._record.actions.append(Action(now_ticks, self.level, level, reason, self._used_bytes, waiting))
        self.level = level
        self._ready_at = now_ticks + self._dwell_ticks

    # --- how far ahead nothing changes ------------------------------------------------------------------------------

    def steps_until_change(self) -> int | None:
        """Decode steps from here to the next boundary at which a look could act, or None where none can."""
        if self._policy is None:
            return None
        used = self._used_bytes
        found = []
        pressed = self._pressure(used) is not None
        may_tighten = self.level < self._top or (self._requantize is not None and bool(self._looser()))
        if may_tighten and not pressed:
            if self._batch.growth_total:
                found.append(self._batch.steps_until_dry(self._high_bytes - used - 1) + 1)
            if self._policy.queue_length is not None:
                found.append(self._steps_to(self._next_arrival()))
        if (may_tighten and pressed) or (self.level and not pressed and used <= self._low_bytes):
            found.append(self._steps_to(self._ready_at))
        return min(found) if found else None

    def _steps_to(self, at_ticks: int) -> int:
        steps, _ = steps_to_cover(max(1, at_ticks - self._looked_at), self._next_ticks(), self._batch.slope)
        return steps

    # --- running sequences ------------------------------------------------------------------------------------------

    def _looser(self) -> list[SequenceState]:
        """Running sequences at a looser level than they would be let in at now, oldest first."""
        return [one for one in self._batch.active.values() if level_of(one) < self.level_for(one.index)]

    def _encode_again(self, now_ticks: int, reason: str) -> bool:
        """Tighten running sequences until the pool is down to the low watermark; whether that freed anything."""
        scheduler, batch = self._scheduler, self._batch
        candidates = self._looser()
        if self._requantize is not None and self._requantize.order == "longest":
            candidates.sort(key=lambda one: one.joined - one.target)
        order, before = list(batch.active), self._used_bytes
        waiting, ways, ticks, sequences = len(scheduler.waiting), set(), 0, 0
        for sequence in candidates:
            if self._used_bytes <= self._low_bytes:
                break
            way = level_of(sequence), self.level_for(sequence.index)
            tokens = self._swap(sequence, way[1])
            if tokens:
                ways.add(way)
                ticks += self._prices.reencodings[way].ticks(tokens)
                sequences += 1
                self._record.requantized_tokens += tokens
        if not sequences:
            return False
        batch.reorder(order)
        batch.charge(ticks + sum(self._prices.reencodings[way].launch_ticks for way in ways))
        freed = before - self._used_bytes
        self._record.actions.append(
            Action(now_ticks, self.level, self.level, reason, before, waiting, sequences, freed)
        )
        self._ready_at = now_ticks + self._dwell_ticks
        return True

    def _swap(self, sequence: SequenceState, level: int) -> int:
        """Put a sequence's cache at another level; its tokens, or 0 where that would free nothing.

        All tokens are kept, so the sequence goes on as one whose prompt was everything that is cached so far.
        """
        scheduler, batch = self._scheduler, self._batch
        steps = batch.counter - sequence.joined
        tokens = sequence.target + steps
        profile = self._prices.steps[level].sequences.profile(tokens)
        needed = profile.resident_bytes(0, batch.block_size)
        if needed >= self._leaves_bytes(sequence, steps):
            return 0
        left = sequence.finish - batch.counter
        scheduler.generated[sequence.index] += steps
        encoded = LevelledSequence(sequence.index, tokens, level, profile)
        encoded.done = tokens
        encoded.held = profile.fixed_bytes
        scheduler.give_back(sequence, batch.remove(sequence))
        scheduler.take(needed)
        batch.join(encoded, left)
        encoded.order, encoded.admitted = sequence.order, sequence.admitted
        scheduler.register_prompt(encoded)
        return tokens

    def _leaves_bytes(self, sequence: SequenceState, steps: int) -> int:
        """Bytes that are free once a sequence is gone: its own, and those of units that nobody else uses."""
        if sequence.profile is None:
            return 0
        own = sequence.profile.resident_bytes(steps, self._batch.block_size)
        sharing = self._scheduler.sharing_of(sequence)
        if not sequence.pinned or sharing is None or not isinstance(sharing.cache, LevelCache):
            return own
        others = len(sequence.pinned) - sharing.cache.sole_units(sequence.pinned)
        return own - others * sharing.cache.unit_bytes
