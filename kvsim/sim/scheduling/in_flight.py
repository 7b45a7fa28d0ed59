"""In-flight batching: each step decodes all running sequences and fills the token budget with prompts.

vLLM V1, TensorRT-LLM and llama.cpp's server share this loop and differ in who waits first, how a prompt is cut, when a
request may start and who gives way. Decoding sequences take their tokens before prompts in progress; in vLLM the order
is that of admission, which differs only where several cut prompts exhaust the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvsim.sim.batch import SequenceState
from kvsim.sim.scheduling.base import Scheduler
from kvsim.sim.scheduling.parts import Chunk, PrefixSharing
from kvsim.sim.tiers.reload import Reload


class InFlightScheduler(Scheduler):
    """Running sequences first, then prompts in progress, then the waiting queue."""

    def chunk_tokens(self, left: int, budget: int) -> int:
        """Tokens of a prompt, ``left`` of them to come, in a step that has ``budget``; 0 where it must wait."""
        if left <= budget:
            return left
        return budget if self.limits.chunked_prefill else 0

    def fits(self, sequence: SequenceState, need_bytes: int, pinned_bytes: int, reserved_bytes: int) -> bool:
        """Whether a waiting request may start: its first chunk beside what decoding needs in this step."""
        del sequence
        return need_bytes + pinned_bytes + reserved_bytes <= self.free

    def take_from_leaving(self) -> bool:
        """Take blocks from a sequence that ends with the running step where it is the latest arrival."""
        order, sequence, held_bytes = self.leaving[-1]
        active = self.batch.active
        if self.prefilling or held_bytes is None or (active and active[next(reversed(active))].order > order):
            return False
        self.give_back(sequence, held_bytes)
        self.leaving[-1] = (order, sequence, None)
        return True

    def schedule(self, now_ticks: int, seats_taken: int, start_ticks: int) -> list[Chunk]:
        """Prompt chunks of the next step, planned at ``now_ticks`` to start at ``start_ticks``.

        ``seats_taken`` sequences are neither decoding nor prefilling.
        """
        batch, limits = self.batch, self.limits
        reserved = batch.due_bytes()
        preempted = reserved > self.free and self.make_room(start_ticks)
        budget = limits.max_num_batched_tokens - batch.size * limits.decode_tokens
        chunks: list[Chunk] = []
        if self.prefilling and budget > 0:
            preempted |= self._continue_prompts(chunks, budget, start_ticks)
            budget = limits.max_num_batched_tokens - batch.size * limits.decode_tokens - total_tokens(chunks)
        running = batch.size + seats_taken + len(self.prefilling)
        # Prompts back from a tier hold all their blocks and a seat already.
        while self.loaded and budget > 0:
            sequence = self.loaded.popleft()
            tokens = min(sequence.target - sequence.done, budget)
            chunks.append((sequence, tokens))
            budget -= tokens
            if sequence.done + tokens < sequence.target:
                self.prefilling.append(sequence)
        self.looked = not preempted
        if not preempted and self.waiting:
            self._admit(chunks, budget, reserved, now_ticks, running)
        return chunks

    def _continue_prompts(self, chunks: list[Chunk], budget: int, start_ticks: int) -> bool:
        """Next chunks of the prompts in progress; True if the pool was short and any sequence gave way."""
        preempted = False
        for sequence in tuple(self.prefilling):
            if sequence not in self.prefilling:
                continue
            chunk = self.chunk_tokens(sequence.target - sequence.done, budget)
            if not chunk:
                break
            need = max(
                0, self.prompt_bytes(sequence, sequence.done + chunk) - sequence.held - self.shared_bytes(sequence)
            )
            if need + self.batch.due_bytes() > self.free:
                preempted = True
                if not self._make_room_for(sequence, need, chunks, start_ticks):
                    break
            sequence.held += need
            self.take(need)
            chunks.append((sequence, chunk))
            budget -= chunk
        return preempted

    def _make_room_for(self, sequence: SequenceState, need_bytes: int, chunks: list[Chunk], start_ticks: int) -> bool:
        """Preempt until a prompt in progress can go on; False where it gave way itself."""
        while need_bytes + self.batch.due_bytes() > self.free:
            victim = self.take_blocks(start_ticks)
            self.batch.drop_dead()
            if victim is sequence:
                return False
            chunks[:] = [chunk for chunk in chunks if chunk[0] is not victim]
        return True

    def _admit(self, chunks: list[Chunk], budget: int, reserved: int, now_ticks: int, running: int) -> None:
        """Start waiting requests while budget, seats and pool allow."""
        waiting, record = self.waiting, self.record
        record.max_waiting = max(record.max_waiting, len(waiting))
        self.reusable_bytes = 0
        while waiting and budget > 0 and running < self.limits.max_num_seqs:
            index = waiting[0]
            if self.reject_too_long(index):
                continue
            sequence = self.new_sequence(index)
            self.find_again(sequence, reserved)
            pinned_bytes = self.match_prefix(sequence)
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
            chunk = self.chunk_tokens(sequence.target - sequence.done, budget)
            if not chunk:
                break
            need = self.prompt_bytes(sequence, sequence.done + chunk) - self.shared_bytes(sequence)
            if not self.fits(sequence, need, pinned_bytes, reserved):
                # A cut prompt that finds less of itself also needs less.
                cut = chunk < sequence.target - sequence.done
                self.reusable_bytes = pinned_bytes or (sequence.done if cut else 0)
                break
            self.take_again(sequence)
            self.seat(sequence, need, pinned_bytes, sequence.done, now_ticks, reload)
            chunks.append((sequence, chunk))
            budget -= chunk
            running += 1
            if sequence.done + chunk < sequence.target:
                self.prefilling.append(sequence)
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
        need = self.prefill_bytes(sequence.target) - self.shared_bytes(sequence)
        if need + pinned_bytes + reserved > self.free:
            self.reusable_bytes = pinned_bytes
            return False
        unit_tokens = self.sharing.unit_tokens if self.sharing is not None else 0
        cached = sequence.done + len(reload.values) * unit_tokens
        self.seat(sequence, need, pinned_bytes, cached, now_ticks, reload)
        self.loads.append((sequence, reload))
        return True

    def _reserve_arrival(self, sequence: SequenceState, reserved: int, pinned_bytes: int, now_ticks: int) -> bool:
        """Admit a sequence whose KV comes from elsewhere, with blocks for all of it; False if too few."""
        need = self.remote[sequence.index] - self.shared_bytes(sequence)
        if need + pinned_bytes + reserved > self.free:
            self.reusable_bytes = pinned_bytes
            return False
        del self.remote[sequence.index]
        self.seat(sequence, need, pinned_bytes, sequence.done, now_ticks)
        self.incoming.append(sequence)
        return True


def total_tokens(chunks: Sequence[Chunk]) -> int:
    """Prompt tokens of a step."""
    return sum(tokens for _, tokens in chunks)
