"""The decoding sequences of one replica as sums: how long their next step takes, and which blocks it needs.

Every sequence gains one token a step, so a whole batch is a handful of integers: its size, the ticks that it adds to
the next step and their growth per step, and a histogram of when each sequence crosses a block boundary. No clock here.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from kvsim.cost.profile import SequenceProfile


class SequenceState:
    """One request on a replica, first while its prompt is processed, then while it decodes.

    ``target`` tokens are to be cached before the next token comes out: the prompt, and after a preemption the output
    so far. While decoding, ``ticks`` is the sequence's share of the step at counter ``joined``, growing by ``slope``;
    ``held`` are bytes on top of its growing blocks (negative where blocks are shared through the prefix cache).
    """

    __slots__ = (
        "admitted", "alive", "done", "finish", "held", "index", "joined", "order", "pinned", "profile", "slope",
        "target", "ticks",
    )  # fmt: skip

    joined: int
    order: int
    finish: int
    ticks: int
    slope: int
    admitted: int
    """Number of its admission, counted over all sequences of the replica."""

    def __init__(self, index: int, target: int) -> None:
        self.index = index
        self.target = target
        self.done = 0
        self.held = 0
        self.pinned: Sequence[int] = ()
        self.profile: SequenceProfile | None = None
        self.alive = True


class DecodeBatch:
    """Sums over the decoding sequences. ``token_ticks`` > 0 means that every cached token costs that much for ever."""

    __slots__ = (
        "_bends",
        "_growth",
        "_order",
        "active",
        "block_bytes",
        "block_size",
        "counter",
        "cut_bytes",
        "finishing",
        "growth_total",
        "size",
        "slope",
        "token_ticks",
        "unpack_total",
        "variable",
    )

    def __init__(self, block_size: int, block_bytes: int, token_ticks: int) -> None:
        self.block_size = block_size
        self.block_bytes = block_bytes
        self.token_ticks = token_ticks
        self.counter = 0
        """Decode steps taken so far; the batch's own time."""
        self.size = 0
        self.variable = 0
        """Ticks that the sequences add to the next step."""
        self.slope = 0
        """Growth of ``variable`` per step."""
        self.unpack_total = 0
        """Ticks due to compression, of sequences that left (profiles only)."""
        self.cut_bytes = 0
        """Bytes of blocks that cuts of caches left empty since somebody took them back."""
        self.active: dict[int, SequenceState] = {}
        """Sequences by request, oldest admission first."""
        self.finishing: list[tuple[int, int, SequenceState]] = []
        # Bytes of new blocks due at counters congruent to the index, twice over so that no slice wraps around.
        self._growth = [0] * (2 * block_size)
        self.growth_total = 0
        self._bends: list[tuple[int, int, SequenceState, int]] = []
        self._order = 0

    def join(self, sequence: SequenceState, steps: int) -> None:
        """Let a sequence decode for ``steps`` steps from the next one on."""
        counter = self.counter
        sequence.joined = counter
        sequence.finish = counter + steps
        profile = sequence.profile
        if profile is None:
            slope = self.token_ticks
            ticks = slope * (sequence.target + 1)
            self._grow((counter - sequence.target) % self.block_size, self.block_bytes)
        else:
            segment = profile.segments[0]
            ticks, slope = segment.ticks, segment.slope_ticks
            for growth in profile.growths:
                _, value, rising = growth.curve.segments[0]
                if rising:
                    self._grow((counter - value) % self.block_size, growth.block_bytes)
            self._plan_bend(sequence, profile, 0)
        sequence.ticks = ticks
        sequence.slope = slope
        sequence.order = self.next_order()
        heapq.heappush(self.finishing, (counter + steps, sequence.order, sequence))
        self.active[sequence.index] = sequence
        self.size += 1
        self.variable += ticks
        self.slope += slope

    def next_order(self) -> int:
        """A number that grows with every sequence that joins."""
        self._order += 1
        return self._order

    def remove(self, sequence: SequenceState) -> int:
        """Take a sequence out of every sum; the bytes that it held."""
        steps = self.counter - sequence.joined
        sequence.alive = False
        del self.active[sequence.index]
        self.size -= 1
        self.variable -= sequence.ticks + sequence.slope * steps
        self.slope -= sequence.slope
        size, profile = self.block_size, sequence.profile
        if profile is None:
            self._grow((sequence.joined - sequence.target) % size, -self.block_bytes)
            return -(-(sequence.target + steps) // size) * self.block_bytes + sequence.held
        self.unpack_total += profile.unpack_total_ticks(steps)
        held = sequence.held
        for growth in profile.growths:
            held += -(-growth.curve(steps) // size) * growth.block_bytes
            start, value, rising = growth.curve.segment_at(steps)
            if rising:
                self._grow((sequence.joined + start - value) % size, -growth.block_bytes)
        return held

    def gained(self, sequence: SequenceState) -> int:
        """Tokens that a decoding sequence has gained since it joined."""
        return self.counter - sequence.joined

    def newest(self, sequence: SequenceState) -> int:
        """Tokens of those that came with the latest step."""
        return 1 if self.counter > sequence.joined else 0

    def drop_dead(self) -> None:
        """Forget preempted sequences at the head of the finishing order."""
        finishing = self.finishing
        while finishing and not finishing[0][2].alive:
            heapq.heappop(finishing)

    def due_bytes(self) -> int:
        """Bytes of new blocks that the next step needs."""
        return self._growth[self.counter % self.block_size]

    def advance(self, steps: int) -> int:
        """Every sequence gains ``steps`` tokens; the bytes of new blocks that took."""
        size, counter = self.block_size, self.counter
        start = counter % size
        if steps == 1:
            due = self._growth[start]
        elif steps < size:
            due = sum(self._growth[start : start + steps])
        else:
            cycles, rest = divmod(steps, size)
            due = cycles * self.growth_total + sum(self._growth[start : start + rest])
        self.counter = counter + steps
        self.variable += self.slope * steps
        bends = self._bends
        if bends and bends[0][0] <= self.counter:
            self._bend()
        return due

    def steps_until_bend(self) -> int | None:
        """Steps until a sequence's curve bends, or None."""
        bends = self._bends
        while bends and not bends[0][2].alive:
            heapq.heappop(bends)
        return bends[0][0] - self.counter if bends else None

    def steps_until_dry(self, free_bytes: int) -> int:
        """How many steps ``free_bytes`` of new blocks allow; the one after that must preempt."""
        size, growth, total = self.block_size, self._growth, self.growth_total
        cycles, left = divmod(free_bytes, total)
        start = self.counter % size
        for offset in range(size):
            left -= growth[start + offset]
            if left < 0:
                return cycles * size + offset
        return (cycles + 1) * size

    def _grow(self, phase: int, block_bytes: int) -> None:
        self._growth[phase] += block_bytes
        self._growth[phase + self.block_size] += block_bytes
        self.growth_total += block_bytes

    def _plan_bend(self, sequence: SequenceState, profile: SequenceProfile, after: int) -> None:
        """Note the next bend only: a cache that is cut back again and again has no last one."""
        point = profile.next_bend(after)
        if point is not None and sequence.joined + point <= sequence.finish:
            self._order += 1
            heapq.heappush(self._bends, (sequence.joined + point, self._order, sequence, point))

    def _bend(self) -> None:
        """Take over the next segment of every curve that bends at this counter."""
        counter, bends = self.counter, self._bends
        while bends and bends[0][0] <= counter:
            _, _, sequence, point = heapq.heappop(bends)
            profile = sequence.profile
            if not sequence.alive or profile is None:
                continue
            now_ticks = sequence.ticks + sequence.slope * (counter - sequence.joined)
            segment = profile.segment_at(point)
            if segment.start_step == point:
                self.variable += segment.ticks - now_ticks
                self.slope += segment.slope_ticks - sequence.slope
                sequence.slope = segment.slope_ticks
                sequence.ticks = segment.ticks - segment.slope_ticks * point
            self._bend_growth(sequence, profile, point)
            self._plan_bend(sequence, profile, point)

    def _bend_growth(self, sequence: SequenceState, profile: SequenceProfile, point: int) -> None:
        """Let blocks come due in the new rhythm, and note those that a cut has emptied."""
        size, joined = self.block_size, sequence.joined
        for growth in profile.growths:
            start, value, rising = growth.curve.segment_at(point)
            if start != point:
                continue
            before, held, rose = growth.curve.segment_at(point - 1)
            reached = held + rose * (point - before)
            if rose != rising or reached != value:
                self._grow((joined + before - held) % size, -rose * growth.block_bytes)
                self._grow((joined + point - value) % size, rising * growth.block_bytes)
                self.cut_bytes += (-(-reached // size) - -(-value // size)) * growth.block_bytes
