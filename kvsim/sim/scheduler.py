"""vLLM V1's scheduler on one replica: who gets tokens in the next step, and who must give blocks back. No clock here.

Running sequences come first, one token each, then the prompt in progress, then the waiting queue in order of arrival,
under the token budget, the seats and the pool. Where the pool is short the latest arrival is preempted and recomputed.
Sources: vLLM V1 ``Scheduler.schedule``, ``KVCacheManager.allocate_slots`` and ``get_computed_blocks``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvsim.errors import InvariantViolation
from kvsim.sim.batch import DecodeBatch, SequenceState
from kvsim.sim.prefix_cache import PrefixCache
from kvsim.sim.recorder import ReplicaRecord, RequestLog
from kvsim.sim.tiers.hierarchy import KvTiers
from kvsim.sim.tiers.reload import Reload

Chunk = tuple[SequenceState, int]
Leaving = tuple[int, SequenceState, int | None]
"""(order of joining, sequence, bytes that it holds, or None where a preemption has taken them)."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits of one replica, and what a prompt holds while it is processed. Bytes are of one tensor-parallel rank."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    pool_bytes: int
    chunked_prefill: bool
    prefill_growths: tuple[tuple[int | None, int], ...]
    """(most tokens held or None, bytes of a block) per kind of layer."""
    fixed_bytes: int
    """Bytes per sequence whatever its length."""
    keeps_preempted: bool = False
    """Whether the blocks of a preempted sequence can be found again until they are used: prefix caching where every
    layer keeps all tokens."""
    plans_ahead: bool = False
    """A step is planned while the one before it runs, whose tokens are not known yet."""


class Kept(NamedTuple):
    """Bytes of a preempted request in the queue of free blocks, which is used up from its front; full blocks."""

    start: int
    end: int
    blocks: int


@dataclass(frozen=True)
class PrefixSharing:
    """A replica's prefix cache, the hashes of every request's tokens, and how many tokens a hash stands for."""

    cache: PrefixCache
    hashes: Sequence[tuple[int, ...]]
    unit_tokens: int
    tiers: KvTiers | None = None
    """Where blocks go beside the device's pool."""


class Scheduler:
    """Waiting queue, the prompt in progress and the block pool of one replica."""

    def __init__(
        self,
        limits: SchedulerLimits,
        batch: DecodeBatch,
        lengths: tuple[list[int], list[int]],
        generated: list[int],
        log: RequestLog,
        record: ReplicaRecord,
        sharing: PrefixSharing | None,
    ) -> None:
        self.limits = limits
        self.batch = batch
        self.prompt, self.output = lengths
        self.generated = generated
        """Tokens out so far, per request."""
        self.log = log
        self.record = record
        self.sharing = sharing
        self.waiting: deque[int] = deque()
        self.loads: list[tuple[SequenceState, Reload]] = []
        """Prompts admitted since the engine last looked whose blocks must first come back from a tier."""
        self.loaded: deque[SequenceState] = deque()
        """Prompts whose blocks are back, in the order to go on; all their blocks are reserved."""
        self.remote: dict[int, int] = {}
        """Waiting requests whose prompt was processed elsewhere, and the bytes that its KV takes here."""
        self.incoming: list[SequenceState] = []
        """Such requests admitted since the engine last looked; their KV can come."""
        self.partial: SequenceState | None = None
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

    def new_sequence(self, index: int, target: int) -> SequenceState:
        """A request that may be let in."""
        return SequenceState(index, target)

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
        """Preempt the latest arrivals until the next token of all others fits; True if any was."""
        batch = self.batch
        preempted = False
        while batch.due_bytes() > self.free:
            self.preempt_latest(start_ticks)
            preempted = True
        self.looked = False
        batch.drop_dead()
        return preempted

    def preempt_latest(self, start_ticks: int) -> None:
        """Take all blocks from the latest arrival and queue it first; its latest token is out at ``start_ticks``."""
        batch = self.batch
        if self.partial is not None:
            sequence, self.partial = self.partial, None
            self.record.recomputed_tokens += sequence.done
            self._give_up(sequence, sequence.held, sequence.done)
        elif self.leaving and self._take_from_leaving():
            return
        elif batch.active:
            sequence = batch.active[next(reversed(batch.active))]
            index = sequence.index
            self.generated[index] += batch.counter - sequence.joined
            self.last_token[index] = start_ticks
            computed = self.prompt[index] + self.generated[index] - 1
            self.record.recomputed_tokens += computed
            # The newest token of a step planned ahead has no hash yet.
            unknown = self.limits.plans_ahead and batch.counter > sequence.joined
            self._give_up(sequence, batch.remove(sequence), computed - unknown)
        else:
            msg = "the pool is exhausted although nothing runs"
            raise InvariantViolation(msg)
        self.record.preemptions += 1
        self.waiting.appendleft(sequence.index)

    def _give_up(self, sequence: SequenceState, held_bytes: int, known_tokens: int) -> None:
        """Return a preempted sequence's bytes; its full blocks join the queue of free ones, the last one first."""
        start = self.limits.pool_bytes + self._returned_bytes
        self.give_back(sequence, held_bytes)
        if self.limits.keeps_preempted:
            self._kept[sequence.index] = Kept(start, start + held_bytes, known_tokens // self.limits.block_size)

    def _found_again(self, index: int, target: int, reserved: int) -> int:
        """Leading blocks of a preempted request that nobody has used since, the decoding sequences' next ones included.

        The last token is computed at any rate.
        """
        kept = self._kept.get(index)
        if kept is None:
            return 0
        used = self.limits.pool_bytes + self._returned_bytes - self.free + reserved
        left = max(0, kept.end - max(kept.start, used)) // self.kept_block_bytes(index)
        return min(left, kept.blocks, (target - 1) // self.limits.block_size)

    def kept_block_bytes(self, index: int) -> int:
        """Bytes of a block of a preempted request."""
        return self.limits.prefill_growths[0][1]

    def _take_again(self, index: int, blocks: int) -> None:
        """Take blocks out of the middle of the queue of free ones: those behind them move up."""
        kept = self._kept.pop(index)
        size_bytes = blocks * self.kept_block_bytes(index)
        self._returned_bytes -= size_bytes
        self.record.recomputed_tokens -= blocks * self.limits.block_size
        for other, place in self._kept.items():
            if place.start >= kept.end:
                self._kept[other] = Kept(place.start - size_bytes, place.end - size_bytes, place.blocks)

    def _take_from_leaving(self) -> bool:
        """Take the blocks of the latest arrival where it ends with the running step anyway; True if it was so."""
        order, sequence, held_bytes = self.leaving[-1]
        active = self.batch.active
        if held_bytes is None or (active and active[next(reversed(active))].order > order):
            return False
        self.give_back(sequence, held_bytes)
        self.leaving[-1] = (order, sequence, None)
        return True

    # --- one step ---------------------------------------------------------------------------------------------------

    def schedule(self, now_ticks: int, seats_taken: int, start_ticks: int) -> list[Chunk]:
        """Prompt chunks of the next step, planned at ``now_ticks`` to start at ``start_ticks``.

        ``seats_taken`` sequences are neither decoding nor prefilling.
        """
        batch, limits = self.batch, self.limits
        reserved = batch.due_bytes()
        preempted = reserved > self.free and self.make_room(start_ticks)
        if preempted:
            reserved = batch.due_bytes()
        budget = limits.max_num_batched_tokens - batch.size
        chunks: list[Chunk] = []
        if self.partial is not None and budget > 0:
            chunk = self._continue_partial(self.partial, budget, reserved, start_ticks)
            if chunk is None:
                preempted = True
            else:
                chunks.append(chunk)
                budget -= chunk[1]
        running = batch.size + seats_taken + (self.partial is not None)
        # Prompts back from a tier hold all their blocks and a seat already.
        while self.loaded and budget > 0:
            sequence = self.loaded.popleft()
            tokens = min(sequence.target - sequence.done, budget)
            chunks.append((sequence, tokens))
            budget -= tokens
            if sequence.done + tokens < sequence.target:
                self.partial = sequence
        self.looked = not preempted
        if not preempted and self.waiting:
            self._admit(chunks, budget, reserved, now_ticks, running)
        return chunks

    def _continue_partial(self, partial: SequenceState, budget: int, reserved: int, start_ticks: int) -> Chunk | None:
        """Next chunk of the prompt in progress; None where the pool is short and it, the latest, gave way."""
        chunk = min(partial.target - partial.done, budget)
        need = max(0, self.prompt_bytes(partial, partial.done + chunk) - partial.held - self.shared_bytes(partial))
        if need + reserved > self.free:
            self.preempt_latest(start_ticks)
            return None
        partial.held += need
        self.take(need)
        return partial, chunk

    def _admit(  # noqa: C901, PLR0912 - one decision after the other, in vLLM's order
        self, chunks: list[Chunk], budget: int, reserved: int, now_ticks: int, running: int
    ) -> None:
        waiting, limits, log, record = self.waiting, self.limits, self.log, self.record
        record.max_waiting = max(record.max_waiting, len(waiting))
        self.reusable_bytes = 0
        while waiting and budget > 0 and running < limits.max_num_seqs:
            index = waiting[0]
            target = self.prompt[index] + self.generated[index]
            if self.prompt[index] + self.output[index] > limits.max_model_len:
                waiting.popleft()
                log.rejected[index] = True
                self.rejected.append(index)
                continue
            sequence = self.new_sequence(index, target)
            if self._kept:
                sequence.done = self._found_again(index, target, reserved) * limits.block_size
            pinned_bytes = self._match_prefix(sequence) if self.sharing is not None else 0
            if index in self.remote:
                if not self._reserve_arrival(sequence, reserved, pinned_bytes, now_ticks):
                    break
                running += 1
                continue
            reload = self._plan_reload(self.sharing, sequence) if self.sharing is not None else None
            if reload is not None and reload.segments:
                if not self._reserve_load(sequence, reload, reserved, pinned_bytes, now_ticks):
                    break
                running += 1
                continue
            chunk = target - sequence.done
            if chunk > budget:
                if not limits.chunked_prefill:
                    break
                chunk = budget
            need = self.prompt_bytes(sequence, sequence.done + chunk)
            if sequence.pinned:
                need -= self.shared_bytes(sequence)
            if need + pinned_bytes + reserved > self.free:
                # A cut prompt that finds less of itself also needs less.
                self.reusable_bytes = pinned_bytes or (sequence.done if chunk < target - sequence.done else 0)
                break
            if index in self._kept:
                self._take_again(index, sequence.done // limits.block_size)
            self._seat(sequence, need, pinned_bytes, sequence.done, now_ticks, reload)
            chunks.append((sequence, chunk))
            budget -= chunk
            running += 1
            if sequence.done + chunk < target:
                self.partial = sequence
                break
        record.max_running = max(record.max_running, running)

    def _plan_reload(self, sharing: PrefixSharing, sequence: SequenceState) -> Reload | None:
        """What the tiers have of a prompt right after the device's own units; None without tiers."""
        if sharing.tiers is None:
            return None
        own, units = sharing.hashes[sequence.index], (sequence.target - 1) // sharing.unit_tokens
        waiting = len(self.waiting) - 1
        return sharing.tiers.plan(own, len(sequence.pinned), units, sequence.target, self.batch.size, waiting)

    def _reserve_load(
        self, sequence: SequenceState, reload: Reload, reserved: int, pinned_bytes: int, now_ticks: int
    ) -> bool:
        """Admit a prompt whose blocks come back from a tier, with blocks for the whole of it; False if too few.

        It holds blocks while it waits, so it must never need more to go on: two such prompts could block each other.
        """
        need = self.prompt_bytes(sequence, sequence.target) - self.shared_bytes(sequence)
        if need + pinned_bytes + reserved > self.free:
            self.reusable_bytes = pinned_bytes
            return False
        unit_tokens = self.sharing.unit_tokens if self.sharing is not None else 0
        cached = sequence.done + len(reload.values) * unit_tokens
        self._seat(sequence, need, pinned_bytes, cached, now_ticks, reload)
        self.loads.append((sequence, reload))
        return True

    def _reserve_arrival(self, sequence: SequenceState, reserved: int, pinned_bytes: int, now_ticks: int) -> bool:
        """Admit a sequence whose KV comes from elsewhere, with blocks for all of it; False if too few."""
        need = self.remote[sequence.index] - self.shared_bytes(sequence)
        if need + pinned_bytes + reserved > self.free:
            self.reusable_bytes = pinned_bytes
            return False
        del self.remote[sequence.index]
        self._seat(sequence, need, pinned_bytes, sequence.done, now_ticks, None)
        self.incoming.append(sequence)
        return True

    def _seat(
        self,
        sequence: SequenceState,
        need_bytes: int,
        pinned_bytes: int,
        cached_tokens: int,
        now_ticks: int,
        reload: Reload | None,
    ) -> None:
        """Take the head of the waiting queue in: its shared units, its own blocks, and the time, if it is its first."""
        index = self.waiting.popleft()
        if reload is not None and self.sharing is not None and self.sharing.tiers is not None:
            # Before blocks are evicted for it: what it loads must not make way for them.
            self.sharing.tiers.commit(reload)
        if sequence.pinned:
            self._pin_prefix(sequence, pinned_bytes)
        sequence.held = need_bytes
        self.take(need_bytes)
        if self.log.scheduled[index] < 0:
            self.log.scheduled[index] = now_ticks
            self.record.cached_prompt_tokens += cached_tokens

    # --- prefix sharing ---------------------------------------------------------------------------------------------

    def sharing_of(self, sequence: SequenceState) -> PrefixSharing | None:
        """Where a sequence's units are found: in one cache for all, or in none."""
        return self.sharing

    def _match_prefix(self, sequence: SequenceState) -> int:
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
