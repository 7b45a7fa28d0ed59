"""A decode batch whose sequences are at several levels: the plain batch's sums, and what a mixture costs more."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from kvsim.cost.profile import SequenceProfile
from kvsim.sim.adaptive.prices import LevelPrices
from kvsim.sim.adaptive.record import AdaptiveRecord
from kvsim.sim.batch import DecodeBatch, SequenceState


class LevelledSequence(SequenceState):
    """A sequence and the level at which its cache is stored."""

    __slots__ = ("level",)

    def __init__(self, index: int, target: int, level: int, profile: SequenceProfile | None = None) -> None:
        super().__init__(index, target)
        self.level = level
        self.profile = profile


class AdaptiveBatch(DecodeBatch):
    """Keeps in ``variable`` what the engine's tables, those of level 0, do not say about the present mixture.

    Work that belongs to no sequence, such as encoding caches again, is charged to the next step.
    """

    __slots__ = (
        "_attention_total",
        "_charged",
        "_class_of",
        "_compression_total",
        "_counts",
        "_level_ticks",
        "_mixture",
        "_outlook",
        "_prices",
        "_record",
    )

    def __init__(
        self, block_size: int, prices: LevelPrices, class_of: Sequence[int] | None, record: AdaptiveRecord
    ) -> None:
        super().__init__(block_size, 0, 0)
        self._prices = prices
        self._class_of = class_of
        self._record = record
        self._counts = [0] * prices.count
        self._mixture = (0, 0)
        """(attention, compression) of the mixture's fixed part above that of as many sequences at level 0."""
        self._charged = 0
        self._attention_total = 0
        self._compression_total = 0
        self._level_ticks = [0] * prices.count
        self._outlook: Callable[[], int | None] = lambda: None

    @property
    def mask(self) -> int:
        """Levels that are present, as bits."""
        return sum(1 << level for level, count in enumerate(self._counts) if count)

    def watch(self, outlook: Callable[[], int | None]) -> None:
        """Stop runs of equal steps where ``outlook`` says: steps until something outside may change, or None."""
        self._outlook = outlook

    def charge(self, ticks: int) -> None:
        """Let the next step take so much longer."""
        self._charged += ticks
        self.variable += ticks

    def join(self, sequence: SequenceState, steps: int) -> None:
        """Let a sequence decode for ``steps`` steps from the next one on."""
        super().join(sequence, steps)
        self._count(sequence, 1)

    def remove(self, sequence: SequenceState) -> int:
        """Take a sequence out of every sum; the bytes that it held."""
        steps, unpacked = self.counter - sequence.joined, self.unpack_total
        level = level_of(sequence)
        held = super().remove(sequence)
        if self._prices.steps[level].sequences.is_affine:
            # Rounded once for all sequences of a level, as in a run of that level alone.
            self.unpack_total = unpacked
            self._level_ticks[level] += steps * sequence.ticks + sequence.slope * (steps * (steps - 1) // 2)
        self._record.tokens[self._class_of[sequence.index] if self._class_of else 0][level] += steps
        self._count(sequence, -1)
        return held

    def advance(self, steps: int) -> int:
        """Every sequence gains ``steps`` tokens; the bytes of new blocks that took."""
        attention, compression = self._mixture
        self._attention_total += steps * attention
        self._compression_total += steps * compression
        due = super().advance(steps)
        if self._charged:
            self._record.requantize_ticks += self._charged
            self.variable -= self._charged
            self._charged = 0
        return due

    def steps_until_bend(self) -> int | None:
        """Steps until a sequence's curve bends or the policy may act, or None."""
        if self._charged:
            return 1
        found = [steps for steps in (super().steps_until_bend(), self._outlook()) if steps is not None]
        return min(found) if found else None

    def reorder(self, indices: Sequence[int]) -> None:
        """Put sequences back into an order of admission, after some of them left and joined again."""
        self.active = {index: self.active[index] for index in indices}
        self.finishing[:] = [(at, sequence.order, sequence) for at, _, sequence in self.finishing if sequence.alive]
        heapq.heapify(self.finishing)

    def compression_ticks(self) -> int:
        """Part of all ticks above level 0's fixed parts that is due to compression."""
        unpacked = sum(
            math.floor(ticks * step.sequences.unpack_share)
            for ticks, step in zip(self._level_ticks, self._prices.steps, strict=True)
            if ticks
        )
        return self.unpack_total + unpacked + self._compression_total + self._record.requantize_ticks

    def _count(self, sequence: SequenceState, change: int) -> None:
        self._counts[level_of(sequence)] += change
        before, self._mixture = self._mixture, self._fixed_parts()
        self.variable += sum(self._mixture) - sum(before)

    def _fixed_parts(self) -> tuple[int, int]:
        tables, mixed, mask = self._prices.tables, self._prices.mixed, self.mask
        attention = -mixed.shared_attention[mask] - tables[0].attention_fixed[self.size]
        compression = -mixed.shared_compression[mask] - tables[0].compression_fixed[self.size]
        for table, count in zip(tables, self._counts, strict=True):
            attention += table.attention_fixed[count]
            compression += table.compression_fixed[count]
        return attention, compression


def level_of(sequence: SequenceState) -> int:
    """The level of a sequence of an adaptive run."""
    level: int = sequence.level  # type: ignore[attr-defined]
    return level
