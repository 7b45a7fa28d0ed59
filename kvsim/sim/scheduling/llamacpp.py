"""llama.cpp's server: a fixed number of slots, each with its own part of the context; nobody ever gives way.

Sources: llama.cpp ``tools/server/server-context.cpp`` (``update_slots``: the tokens of generating slots first, then
prompts up to ``n_batch``; ``get_available_slot``: the slot with the longest common prefix, else the one longest
unused), builds of 2025, without ``--kv-unified``. Prompts of several slots are taken in order of
arrival; the server takes them in order of slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvsim.sim.batch import SequenceState
from kvsim.sim.scheduling.in_flight import InFlightScheduler
from kvsim.sim.scheduling.parts import SchedulerParts

SLOT_PROMPT_SIMILARITY: Final = 0.1
"""Share of a prompt that a slot must hold for the slot to be chosen for it (``--slot-prompt-similarity``)."""


class LlamaCppScheduler(InFlightScheduler):
    """Slots instead of a pool: a slot keeps its last request's cells and reuses their common prefix."""

    def __init__(self, parts: SchedulerParts) -> None:
        super().__init__(parts)
        sharing, self.sharing = self.sharing, None
        self._hashes = sharing.hashes if sharing is not None else None
        self._unit_tokens = sharing.unit_tokens if sharing is not None else 1
        self._free_slots: list[Sequence[int]] = [()] * parts.limits.max_num_seqs
        """What the unused slots hold, longest unused first."""
        self._chosen = 0
        """The slot that the head of the queue gets."""

    def match_prefix(self, sequence: SequenceState) -> int:
        """Take the common prefix with the best free slot; its cells are the sequence's own from then on."""
        if self._hashes is None:
            return 0
        self._chosen, units = self._best_slot(self._hashes, sequence)
        sequence.done = units * self._unit_tokens
        return 0

    def note_seated(self, sequence: SequenceState) -> None:
        """Take the chosen slot from the free ones."""
        super().note_seated(sequence)
        if self._hashes is not None:
            del self._free_slots[self._chosen]

    def give_back(self, sequence: SequenceState, held_bytes: int) -> None:
        """Free the slot, which keeps what it holds."""
        super().give_back(sequence, held_bytes)
        if self._hashes is not None:
            self._free_slots.append(self._hashes[sequence.index])

    def _best_slot(self, hashes: Sequence[tuple[int, ...]], sequence: SequenceState) -> tuple[int, int]:
        """(slot, units in common) of the free slot with the longest common prefix, if it is long enough."""
        own = hashes[sequence.index][: (sequence.target - 1) // self._unit_tokens]
        common = [_common(own, held) for held in self._free_slots]
        best = max(range(len(common)), key=lambda slot: common[slot])
        if common[best] * self._unit_tokens <= SLOT_PROMPT_SIMILARITY * sequence.target:
            best = 0
        return best, common[best]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count
