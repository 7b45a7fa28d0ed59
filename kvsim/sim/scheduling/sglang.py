"""SGLang: prompts first in batches of their own, admission by an estimate of what running requests will still need.

Sources: SGLang 0.5, ``srt/managers/schedule_policy.py`` (``PrefillAdder``, ``SchedulePolicy``), ``scheduler.py``
(``get_next_batch_to_run``, ``_get_new_batch_prefill_raw``, ``update_running_batch``) and ``schedule_batch.py``
(``retract_decode``); the constants are those of ``environ.py``. A simulated request asks for exactly the output that it
gets, so ``max_new_tokens`` is its output length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvsim.errors import InvariantViolation
from kvsim.sim.batch import SequenceState
from kvsim.sim.scheduling.base import Scheduler
from kvsim.sim.scheduling.parts import Chunk, SchedulerParts

INIT_NEW_TOKEN_RATIO: Final = 0.7
MIN_NEW_TOKEN_RATIO_FACTOR: Final = 0.14
NEW_TOKEN_RATIO_DECAY_STEPS: Final = 600
RETRACT_DECODE_STEPS: Final = 20
CLIP_MAX_NEW_TOKENS: Final = 4096
MATCHED_QUEUE: Final = 128
"""Waiting requests up to which ``lpm`` sorts; a longer queue is served in order of arrival."""
IN_BATCH_TOKENS: Final = 32
"""``lpm``: a request with no longer cached prefix waits for an earlier one that shares at least as much with it."""


@dataclass(frozen=True)
class SglangOptions:
    """SGLang's own options, in its names."""

    max_prefill_tokens: int
    enable_mixed_chunk: bool
    schedule_conservativeness: float
    longest_prefix_first: bool
    recv_interval: int = 1


class NewTokenRatio:
    """The share of their unspent output that running requests are expected to take.

    It decays with every decode step towards its least value, and rises to what was seen whenever requests had to be
    retracted (``new_token_ratio_tracker.py``).
    """

    def __init__(self, conservativeness: float) -> None:
        self._first = min(INIT_NEW_TOKEN_RATIO * conservativeness, 1.0)
        self._least = min(self._first * MIN_NEW_TOKEN_RATIO_FACTOR, 1.0)
        self._decay = (self._first - self._least) / NEW_TOKEN_RATIO_DECAY_STEPS
        self._start, self._since = self._first, 0

    def reset(self, step: int) -> None:
        """Nothing runs any more: begin as the engine began."""
        self._start, self._since = self._first, step

    def raise_to(self, ratio: float, step: int) -> None:
        """Requests were retracted."""
        self._start, self._since = min(1.0, ratio), step

    def at(self, step: int) -> float:
        """The ratio at a decode step, counted from the run's start."""
        return max(self._start - self._decay * (step - self._since), min(self._least, self._start))


class SglangScheduler(Scheduler):
    """Prefill-only batches as long as any request may start, else one decode step of all running ones."""

    def __init__(self, parts: SchedulerParts, options: SglangOptions) -> None:
        super().__init__(parts)
        self._options = options
        self._ratio = NewTokenRatio(options.schedule_conservativeness)
        self._full = False
        """A request was held back for want of tokens or seats: look again once one leaves (``batch_is_full``)."""
        self._left = False
        """Whether a request left since."""
        self._received = 0
        """Waiting requests that were received and could not start yet."""
        self._heard = 0
        """Decode steps until the latest prompt, after which requests are received at once."""
        self.mixes = options.enable_mixed_chunk

    # --- one step ---------------------------------------------------------------------------------------------------

    def schedule(self, now_ticks: int, seats_taken: int, start_ticks: int) -> list[Chunk]:
        """Prompt chunks of the next step, which decodes nothing unless ``enable_mixed_chunk``."""
        batch = self.batch
        if self._is_deaf():
            # Who arrived is not even received: the next step is planned anew.
            self.looked = False
            return []
        self.looked = True
        if self.mixes and batch.due_bytes() > self.free:
            self.make_room(start_ticks)
        if not self.prefilling and self._stays_full():
            return []
        decoding = batch.size if self.mixes else 0
        budget = self.limits.max_num_batched_tokens - decoding
        chunks: list[Chunk] = []
        if budget > 0:
            budget -= self._continue_prompt(chunks, budget)
            if self.waiting:
                self._admit(chunks, budget, decoding, now_ticks, seats_taken)
        if chunks:
            self._heard = batch.counter + (decoding > 0)
        self._received = len(self.waiting)
        return chunks

    def _is_deaf(self) -> bool:
        """Whether this step is not one of those that receive requests (``SchedulerRecvSkipper``)."""
        if self._options.recv_interval == 1 or not self.batch.size or self.prefilling or self._received:
            return False
        return (self.batch.counter - self._heard) % self._options.recv_interval != 0

    def _stays_full(self) -> bool:
        """Whether nobody may start yet; who left is noticed when the next decode step is prepared."""
        if not self._full:
            return False
        if not self.batch.size:
            self._full = self._left = False
            return False
        if self._left:
            self._full = self._left = self.looked = False
        return True

    def _continue_prompt(self, chunks: list[Chunk], budget: int) -> int:
        """Next chunk of the prompt in progress, of which there is one at most; its tokens."""
        if not self.prefilling:
            return 0
        sequence = self.prefilling[0]
        chunk = min(sequence.target - sequence.done, budget)
        need = max(0, self.prefill_bytes(sequence.done + chunk) - sequence.held - self.shared_bytes(sequence))
        if need + self._due_bytes() > self.free:
            return 0
        sequence.held += need
        self.take(need)
        chunks.append((sequence, chunk))
        return chunk

    def _due_bytes(self) -> int:
        """What decoding takes in the same step."""
        return self.batch.due_bytes() if self.mixes else 0

    def _admit(self, chunks: list[Chunk], budget: int, decoding: int, now_ticks: int, seats_taken: int) -> None:
        limits, record = self.limits, self.record
        record.max_waiting = max(record.max_waiting, len(self.waiting))
        self._order_queue()
        left_tokens = self._unreserved_tokens()
        input_budget = self._options.max_prefill_tokens - decoding - sum(tokens for _, tokens in chunks)
        # The prompt in progress has its seat among the chunks unless it had to pause.
        running = self.batch.size + seats_taken + max(len(chunks), len(self.prefilling))
        while self.waiting and budget > 0 and input_budget > 0:
            index = self.waiting[0]
            if self.reject_too_long(index):
                continue
            if running >= limits.max_num_seqs:
                self._full = True
                break
            sequence = SequenceState(index, self.prompt[index] + self.generated[index])
            pinned_bytes = self.match_prefix(sequence)
            extend = sequence.target - sequence.done
            if extend > budget and not limits.chunked_prefill:
                break
            chunk = min(extend, budget)
            new_tokens = min(self.output[index] - self.generated[index], CLIP_MAX_NEW_TOKENS)
            left_tokens -= pinned_bytes / self._token_bytes
            need = self.prefill_bytes(sequence.done + chunk) - self.shared_bytes(sequence)
            total = extend + new_tokens + limits.block_size
            # The first one goes alone whatever is estimated: a sequence that fits the pool is never held for ever.
            alone = not running and not chunks
            if need + pinned_bytes + self._due_bytes() > self.free or (total >= left_tokens and not alone):
                self._full = True
                break
            self.seat(sequence, need, pinned_bytes, sequence.done, now_ticks)
            chunks.append((sequence, chunk))
            cut = chunk < extend
            left_tokens -= chunk + (0 if cut else new_tokens) + limits.block_size
            budget -= chunk
            input_budget -= chunk
            running += 1
            if cut:
                self.prefilling.append(sequence)
        self._left = False
        record.max_running = max(record.max_running, running)

    # --- the estimate -----------------------------------------------------------------------------------------------

    @property
    def _token_bytes(self) -> float:
        """Pool bytes behind one token of a sequence that grows."""
        return sum(size for cap, size in self.limits.prefill_growths if cap is None) / self.limits.block_size or 1.0

    def _unreserved_tokens(self) -> float:
        """Tokens that the pool has beside what running requests are expected to take (``rem_total_tokens``)."""
        counter, active = self.batch.counter, self.batch.active
        if not active:
            self._ratio.reset(counter)
        unspent = sum(min(one.finish - counter, CLIP_MAX_NEW_TOKENS) for one in active.values())
        return self.free / self._token_bytes - unspent * self._ratio.at(counter)

    # --- retraction -------------------------------------------------------------------------------------------------

    def make_room(self, start_ticks: int) -> bool:
        """Retract decoding requests until the next token of the others fits, at least one.

        Requests that end with the running step lose nothing by giving their tokens back before.
        """
        batch = self.batch
        while batch.due_bytes() > self.free and self.take_from_leaving():
            self._left = True
        if batch.due_bytes() <= self.free:
            self.looked = False
            return False
        while batch.size > 1:
            self.preempt(self.victim(), start_ticks)
            if batch.due_bytes() <= self.free:
                break
        if batch.due_bytes() > self.free:
            # Only with mixed chunks: a prompt in progress holds what the last decoding request needs.
            self._drop_prompt(start_ticks)
        batch.drop_dead()
        self._raise_ratio()
        self._full = self._left = self.looked = False
        return True

    def victim(self) -> SequenceState:
        """The decoding request with the fewest tokens out, of those the one with the longest prompt, then the last."""
        best: SequenceState | None = None
        least = (0, 0)
        for one in self.batch.active.values():
            key = (self.generated[one.index] + self.batch.gained(one), -self.prompt[one.index])
            if best is None or key <= least:
                best, least = one, key
        if best is None:
            msg = "the pool is exhausted although nothing runs"
            raise InvariantViolation(msg)
        return best

    def requeue(self, index: int) -> None:
        """Let a retracted request wait behind all others."""
        self.waiting.append(index)

    def give_back(self, sequence: SequenceState, held_bytes: int) -> None:
        """Return a sequence's bytes, and note that one left."""
        super().give_back(sequence, held_bytes)
        self._left = True

    def _drop_prompt(self, start_ticks: int) -> None:
        if not self.prefilling:
            msg = "the pool is exhausted although nothing else runs"
            raise InvariantViolation(msg)
        self.preempt(self.prefilling[-1], start_ticks)

    def _raise_ratio(self) -> None:
        """Raise the ratio to what the requests that stay have used up."""
        decoded = total = count = 0
        for one in self.batch.active.values():
            decoded += self.generated[one.index] + self.batch.gained(one)
            total += self.output[one.index]
            count += 1
        self._ratio.raise_to((decoded + RETRACT_DECODE_STEPS * count) / (total + 1), self.batch.counter)

    # --- the queue --------------------------------------------------------------------------------------------------

    def _order_queue(self) -> None:
        """``lpm``: longest cached prefix first; who shares a new prefix with an earlier one waits for it."""
        sharing = self.sharing
        if not self._options.longest_prefix_first or sharing is None or len(self.waiting) > MATCHED_QUEUE:
            return
        seen: set[int] = set()
        keys: dict[int, int] = {}
        queue = list(self._queue)
        for index in queue:
            own = sharing.hashes[index][: self.prompt[index] // sharing.unit_tokens]
            cached = sharing.cache.match(own, len(own)) * sharing.unit_tokens
            keys[index] = -cached
            if cached <= IN_BATCH_TOKENS:
                if _leading(own, seen) * sharing.unit_tokens >= IN_BATCH_TOKENS:
                    keys[index] = 1
                else:
                    seen.update(own)
        queue.sort(key=lambda index: keys[index])
        self._queue.clear()
        self._queue.extend(queue)

    @property
    def _queue(self) -> deque[int]:
        queue = self.waiting
        if not isinstance(queue, deque):
            msg = "SGLang's queue is not in order of arrival"
            raise InvariantViolation(msg)
        return queue


def _leading(values: Sequence[int], present: set[int]) -> int:
    """How many leading values are present."""
    count = 0
    for value in values:
        if value not in present:
            break
        count += 1
    return count
