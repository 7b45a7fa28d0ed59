"""What every engine's scheduler shares on one replica: the block pool, prefix sharing, preemption. No clock here.

A scheduler says who gets tokens in the next step, and who must give blocks back. Each engine's rules are in a file of
its own beside this one.
Sources: vLLM V1 ``KVCacheManager.allocate_slots`` and ``get_computed_blocks``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from kvsim.errors import InvariantViolation
from kvsim.sim.batch import SequenceState
from kvsim.sim.scheduling.parts import Chunk, Leaving, PrefixSharing, SchedulerParts, WaitingQueue
from kvsim.sim.tiers.reload import Reload


class Kept(NamedTuple):
    """Bytes of a preempted request in the queue of free blocks, which is used up from its front; full blocks."""

    start: int
    end: int
    blocks: int


class Scheduler(ABC):
    """Waiting queue, prompts in progress and the block pool of one replica."""

    mixes = True
    """Whether the step just scheduled decodes besides the prompts."""
    reorders = False
    """Whether an arrival can overtake who waits already."""
    admits_plainly = False
    """Whether a prompt that fits budget, seats and pool is admitted whole, whatever else is true."""

    def __init__(self, parts: SchedulerParts) -> None:
        self.limits = limits = parts.limits
        self.batch = parts.batch
        self.prompt, self.output = parts.lengths
        self.generated = parts.generated
        """Tokens out so far, per request."""
        self.log = parts.log
        self.record = parts.record
        self.sharing = parts.sharing
        self.waiting: WaitingQueue = deque()
        self.loads: list[tuple[SequenceState, Reload]] = []
        """Prompts admitted since the engine last looked whose blocks must first come back from a tier."""
        self.loaded: deque[SequenceState] = deque()
        """Prompts whose blocks are back, in the order to go on; all their blocks are reserved."""
        self.remote: dict[int, int] = {}
        """Waiting requests whose prompt was processed elsewhere, and the bytes that its KV takes here."""
        self.incoming: list[SequenceState] = []
        """Such requests admitted since the engine last looked; their KV can come."""
        self.prefilling: list[SequenceState] = []
        """Prompts in progress, in order of admission."""
        self._admissions = 0
        self.leaving: list[Leaving] = []
        """Sequences that end with the running step: they keep seats and blocks until it is over, oldest first."""
        self.free = limits.pool_bytes
        self.looked = False
        """Whether the latest step offered the waiting queue tokens, seats and blocks; one that preempted does not."""
        self.reusable_bytes = 0
        """Cached and unused bytes that the head of the queue would take over, if it is held back by the pool; above 0
        what it needs may shrink as the pool does."""
        self.rejected: list[int] = []
        """Requests refused since the engine last looked."""
        self._returned_bytes = 0
        """All that ever came back to the pool; with ``free`` it says how far the queue of free blocks was used up."""
        self._kept: dict[int, Kept] = {}
        """Where blocks of preempted requests lie in that queue."""
        self.last_token: dict[int, int] = {}
        """When preempted requests got their latest token, in ticks."""

    # --- the pool ---------------------------------------------------------------------------------------------------

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

    def note_returned(self, size_bytes: int) -> None:
        """Bytes that came back while the engine kept the books itself."""
        self._returned_bytes += size_bytes

    def _note_peak(self) -> None:
        """The pool is fullest just before something is returned."""
        if self.free < self.record.min_free_bytes:
            self.record.min_free_bytes = self.free

    def new_sequence(self, index: int) -> SequenceState:
        """A waiting request that may be let in."""
        return SequenceState(index, self.prompt[index] + self.generated[index])

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

    # --- preemption -------------------------------------------------------------------------------------------------

    def make_room(self, start_ticks: int) -> bool:
        """Preempt until the next tokens of all that still decode fit; True if any was."""
        batch = self.batch
        preempted = False
        while batch.due_bytes() > self.free:
            self.take_blocks(start_ticks)
            preempted = True
        self.looked = False
        batch.drop_dead()
        return preempted

    def take_blocks(self, start_ticks: int) -> SequenceState | None:
        """Take all blocks from whoever gives way first; None if it ends with the running step anyway."""
        if self.leaving and self.take_from_leaving():
            return None
        sequence = self.victim()
        self.preempt(sequence, start_ticks)
        return sequence

    def take_from_leaving(self) -> bool:
        """Take the blocks of a sequence that ends with the running step; True if any had some."""
        for position, (order, sequence, held_bytes) in enumerate(self.leaving):
            if held_bytes is not None:
                self.give_back(sequence, held_bytes)
                self.leaving[position] = (order, sequence, None)
                return True
        return False

    def victim(self) -> SequenceState:
        """Whoever gives way first: the latest arrival."""
        if self.prefilling:
            return self.prefilling[-1]
        active = self.batch.active
        if active:
            return active[next(reversed(active))]
        msg = "the pool is exhausted although nothing runs"
        raise InvariantViolation(msg)

    def preempt(self, sequence: SequenceState, start_ticks: int) -> None:
        """Take all blocks from a sequence and queue it again; its latest token is out at ``start_ticks``."""
        batch, index = self.batch, sequence.index
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
            self.record.recomputed_tokens += sequence.done
            self._give_up(sequence, sequence.held, sequence.done)
        else:
            newest = batch.newest(sequence)
            self.generated[index] += batch.gained(sequence)
            self.last_token[index] = start_ticks
            computed = self.prompt[index] + self.generated[index] - 1
            self.record.recomputed_tokens += computed
            # The newest tokens of a step planned ahead have no hash yet.
            unknown = newest if self.limits.plans_ahead else 0
            self._give_up(sequence, batch.remove(sequence), computed - unknown)
        self.record.preemptions += 1
        self.requeue(index)

    def requeue(self, index: int) -> None:
        """Let a preempted request wait again: before all others."""
        self.waiting.appendleft(index)

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

    # --- one step ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def schedule(self, now_ticks: int, seats_taken: int, start_ticks: int) -> list[Chunk]:
        """Prompt chunks of the next step, planned at ``now_ticks`` to start at ``start_ticks``.

        ``seats_taken`` sequences are neither decoding nor prefilling.
        """

    def end_prompt(self, sequence: SequenceState) -> None:
        """A prompt is in."""
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)

    def reject_too_long(self, index: int) -> bool:
        """Refuse the request at the head of the queue if one sequence can never hold it."""
        if self.prompt[index] + self.output[index] <= self.limits.max_model_len:
            return False
        self.waiting.popleft()
        self.log.rejected[index] = True
        self.rejected.append(index)
        return True

    def seat(
        self,
        sequence: SequenceState,
        need_bytes: int,
        pinned_bytes: int,
        cached_tokens: int,
        now_ticks: int,
        reload: Reload | None = None,
    ) -> None:
        """Take the head of the waiting queue in: its shared units, its own blocks, and the time, if it is its first."""
        index = self.waiting.popleft()
        if reload is not None and self.sharing is not None and self.sharing.tiers is not None:
            # Before blocks are evicted for it: what it loads must not make way for them.
            self.sharing.tiers.commit(reload)
        if sequence.pinned:
            self._pin_prefix(sequence, pinned_bytes)
        self._admissions += 1
        sequence.admitted = self._admissions
        sequence.held = need_bytes
        self.take(need_bytes)
        if self.log.scheduled[index] < 0:
            self.log.scheduled[index] = now_ticks
            self.record.cached_prompt_tokens += cached_tokens
        self.note_seated(sequence)

    def note_seated(self, sequence: SequenceState) -> None:  # noqa: B027 - most engines keep no books of their own
        """Do what an engine does besides when a request has got its seat and its blocks."""

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
