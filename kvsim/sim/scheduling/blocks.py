"""Who holds how much of a replica's block pool, what can be found again of it, and what is shared. No clock here.

Sources: vLLM V1 ``KVCacheManager.allocate_slots`` and ``get_computed_blocks``, ``BlockPool``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvsim.sim.batch import SequenceState
from kvsim.sim.scheduling.parts import PrefixSharing, SchedulerParts


class Kept(NamedTuple):
    """Bytes of a preempted request in the queue of free blocks, which is used up from its front; full blocks."""

    start: int
    end: int
    blocks: int


class BlockBooks:
    """The block pool of one replica."""

    def __init__(self, parts: SchedulerParts) -> None:
        self.limits = limits = parts.limits
        self.batch = parts.batch
        self.prompt, self.output = parts.lengths
        self.generated = parts.generated
        """Tokens out so far, per request."""
        self.record = parts.record
        self.sharing = parts.sharing
        self.free = limits.pool_bytes
        self._returned_bytes = 0
        """All that ever came back to the pool; with ``free`` it says how far the queue of free blocks was used up."""
        self._kept: dict[int, Kept] = {}
        """Where blocks of preempted requests lie in that queue."""

    def take(self, size_bytes: int) -> None:
        """Hand out bytes; cached units that nobody uses make way."""
        self.free -= size_bytes
        if self.sharing is not None:
            self.sharing.cache.evict_until(self.free)

    def give_back(self, sequence: SequenceState, held_bytes: int) -> None:
        """Return a sequence's own bytes, and let go of the units that it shares."""
        self._note_peak()
        self.free += held_bytes
        self._returned_bytes += held_bytes
        if sequence.pinned and (sharing := self.sharing_of(sequence)) is not None:
            cache = sharing.cache
            self.free += cache.unpin(sequence.pinned) * cache.unit_bytes

    def shrink(self, sequence: SequenceState, kept_bytes: int) -> None:
        """Return what a prompt held beyond what its selection keeps."""
        self._note_peak()
        self.free += sequence.held - kept_bytes
        self._returned_bytes += sequence.held - kept_bytes

    def take_back_cuts(self) -> None:
        """Return the blocks that cuts of decoding sequences' caches have emptied."""
        self._note_peak()
        self.free += self.batch.cut_bytes
        self._returned_bytes += self.batch.cut_bytes
        self.batch.cut_bytes = 0

    def note_returned(self, size_bytes: int) -> None:
        """Bytes that came back while the engine kept the books itself."""
        self._returned_bytes += size_bytes

    def _note_peak(self) -> None:
        """The pool is fullest just before something is returned."""
        if self.free < self.record.min_free_bytes:
            self.record.min_free_bytes = self.free

    def prompt_bytes(self, sequence: SequenceState, tokens: int) -> int:
        """Bytes that a sequence holds once ``tokens`` of its prompt are in; those of all are alike."""
        return self.prefill_bytes(tokens)

    def prefill_bytes(self, tokens: int) -> int:
        """Bytes held once ``tokens`` of a prompt are in."""
        size, held = self.limits.block_size, self.limits.fixed_bytes
        for cap, block_bytes in self.limits.prefill_growths:
            kept = tokens if cap is None or tokens < cap else cap
            held += -(-kept // size) * block_bytes
        return held

    def shared_bytes(self, sequence: SequenceState) -> int:
        """Bytes of the units that the sequence shares."""
        sharing = self.sharing_of(sequence)
        return 0 if sharing is None else len(sequence.pinned) * sharing.cache.unit_bytes

    # --- blocks of preempted requests --------------------------------------------------------------------------------

    def _give_up(self, sequence: SequenceState, held_bytes: int, known_tokens: int) -> None:
        """Return a preempted sequence's bytes; its full blocks join the queue of free ones, the last one first."""
        start = self.limits.pool_bytes + self._returned_bytes
        self.give_back(sequence, held_bytes)
        if self.limits.keeps_preempted:
            self._kept[sequence.index] = Kept(start, start + held_bytes, known_tokens // self.limits.block_size)

    def kept_block_bytes(self, index: int) -> int:
        """Bytes of a block of a preempted request."""
        return self.limits.prefill_growths[0][1]

    def find_again(self, sequence: SequenceState, reserved_bytes: int) -> None:
        """Begin a preempted request after those of its blocks that nobody has used since.

        ``reserved_bytes``, the next ones of decoding sequences, count as used. The last token is computed at any rate.
        """
        kept = self._kept.get(sequence.index)
        if kept is None:
            return
        used = self.limits.pool_bytes + self._returned_bytes - self.free + reserved_bytes
        left = max(0, kept.end - max(kept.start, used)) // self.kept_block_bytes(sequence.index)
        blocks = min(left, kept.blocks, (sequence.target - 1) // self.limits.block_size)
        sequence.done = blocks * self.limits.block_size

    def take_again(self, sequence: SequenceState) -> None:
        """Take what was found out of the middle of the queue of free blocks: those behind it move up."""
        kept = self._kept.pop(sequence.index, None)
        if kept is None:
            return
        blocks = sequence.done // self.limits.block_size
        size_bytes = blocks * self.kept_block_bytes(sequence.index)
        self._returned_bytes -= size_bytes
        self.record.recomputed_tokens -= blocks * self.limits.block_size
        for other, place in self._kept.items():
            if place.start >= kept.end:
                self._kept[other] = Kept(place.start - size_bytes, place.end - size_bytes, place.blocks)

    # --- prefix sharing ---------------------------------------------------------------------------------------------

    def sharing_of(self, sequence: SequenceState) -> PrefixSharing | None:
        """Where a sequence's units are found: in one cache for all, or in none."""
        return self.sharing

    def match_prefix(self, sequence: SequenceState) -> int:
        """Find the cached prefix; bytes that pinning it takes from the free ones."""
        sharing = self.sharing_of(sequence)
        if sharing is None:
            return 0
        own = sharing.hashes[sequence.index]
        # At least one prompt token must be computed to sample from.
        units = sharing.cache.match(own, (sequence.target - 1) // sharing.unit_tokens)
        sequence.pinned = own[:units]
        sequence.done = units * sharing.unit_tokens
        return sharing.cache.unused_among(sequence.pinned) * sharing.cache.unit_bytes

    def _pin_prefix(self, sequence: SequenceState, pinned_bytes: int) -> None:
        if (sharing := self.sharing_of(sequence)) is not None:
            sharing.cache.pin(sequence.pinned)
            self.free -= pinned_bytes

    def register_prompt(self, sequence: SequenceState) -> None:
        """Make a processed prompt's blocks findable; from a unit that another added first, they stay private."""
        sharing = self.sharing_of(sequence)
        if sharing is None:
            return
        own = sharing.hashes[sequence.index]
        self._share(sharing, sequence, own[len(sequence.pinned) : self.prompt[sequence.index] // sharing.unit_tokens])

    def register_output(self, sequence: SequenceState) -> None:
        """Blocks that an answer completed become findable too, for the conversation's next turn."""
        sharing = self.sharing_of(sequence)
        if sharing is None:
            return
        known = self.prompt[sequence.index] // sharing.unit_tokens
        if len(sequence.pinned) >= known:
            self._share(sharing, sequence, sharing.hashes[sequence.index][known:])

    @staticmethod
    def _share(sharing: PrefixSharing, sequence: SequenceState, values: Sequence[int]) -> None:
        pinned = list(sequence.pinned)
        for value in values:
            if not sharing.cache.insert(value):
                break
            pinned.append(value)
        if sharing.tiers is not None:
            sharing.tiers.computed(pinned[len(sequence.pinned) :])
        sequence.held -= (len(pinned) - len(sequence.pinned)) * sharing.cache.unit_bytes
        sequence.pinned = pinned
