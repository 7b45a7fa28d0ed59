"""What every engine's scheduler shares on one replica: the queue, seats, preemption. No clock here.

A scheduler says who gets tokens in the next step, and who must give blocks back. Each engine's rules are in a file of
its own beside this one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque

from kvsim.errors import InvariantViolation
from kvsim.sim.batch import SequenceState
from kvsim.sim.scheduling.blocks import BlockBooks
from kvsim.sim.scheduling.parts import Chunk, Leaving, SchedulerParts, WaitingQueue
from kvsim.sim.tiers.reload import Reload


class Scheduler(BlockBooks, ABC):
    """Waiting queue, prompts in progress and the block pool of one replica."""

    mixes = True
    """Whether the step just scheduled decodes besides the prompts."""
    reorders = False
    """Whether an arrival can overtake who waits already."""
    admits_plainly = False
    """Whether a prompt that fits budget, seats and pool is admitted whole, whatever else is true."""

    def __init__(self, parts: SchedulerParts) -> None:
        super().__init__(parts)
        self.log = parts.log
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
        self.looked = False
        """Whether the latest step offered the waiting queue tokens, seats and blocks; one that preempted does not."""
        self.reusable_bytes = 0
        """Cached and unused bytes that the head of the queue would take over, if it is held back by the pool; above 0
        what it needs may shrink as the pool does."""
        self.rejected: list[int] = []
        """Requests refused since the engine last looked."""
        self.last_token: dict[int, int] = {}
        """When preempted requests got their latest token, in ticks."""

    def new_sequence(self, index: int) -> SequenceState:
        """A waiting request that may be let in."""
        return SequenceState(index, self.prompt[index] + self.generated[index])

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

    def note_seated(self, sequence: SequenceState) -> None:
        """Do what an engine does besides when a request has got its seat and its blocks."""
