"""Steps with prompts in them: what they take, and what their end changes."""

from __future__ import annotations

import math

from kvsim.cost.profile import SequenceProfile
from kvsim.sim.batch import SequenceState
from kvsim.sim.lanes import LanePricing, Piece
from kvsim.sim.observer import prompts_of
from kvsim.sim.replica import UNKNOWN, Replica
from kvsim.sim.scheduling import Chunk
from kvsim.units import TICKS_PER_SECOND


class PromptSteps(Replica):
    """Begins and ends steps that process prompts."""

    def _begin_mixed(self, chunks: list[Chunk]) -> tuple[int, list[SequenceState]]:
        """Write down one step of all decoding sequences and some prompts: (ticks, prompts that it completes)."""
        batch = self.batch
        size = self._decoding = batch.size if self.scheduler.mixes else 0
        if size < batch.size:
            self._hold_back()
        tokens = compress = 0
        ending = []
        for sequence, chunk in chunks:
            tokens += chunk
            if sequence.done + chunk == sequence.target:
                ending.append(sequence)
                if not batch.token_ticks:
                    profile = sequence.profile = self._profile_of(sequence)
                    compress += profile.compress_ticks
        ticks = self._prefill_ticks(chunks, tokens, len(ending), 0 if self._side_stream else compress)
        if size:
            ticks += self._count_decode_step()
        ticks = self._add_host_work(ticks, size + len(chunks))
        if self.observer is not None:
            self.observer.step(self, ticks, prompt_tokens=tokens, prompts=prompts_of(chunks))
        return ticks, ending

    def _end_mixed(self, chunks: list[Chunk], ending: list[SequenceState], lasted: int) -> None:
        batch = self.batch
        for sequence, chunk in chunks:
            sequence.done += chunk
        if self._decoding:
            if self._late:
                self._record_step(batch.size, lasted, self.now)
            else:
                self.record.runs.append((1, batch.size, lasted, 0))
            self._advance(1)
        for sequence in ending:
            self._end_prompt(sequence)

    def _end_prompt(self, sequence: SequenceState) -> None:
        """A prompt is in: its blocks can be shared, its token will come out, and it decodes or is compacted first."""
        scheduler, index = self.scheduler, sequence.index
        scheduler.end_prompt(sequence)
        if scheduler.sharing is not None:
            scheduler.register_prompt(sequence)
        generated = self.generated[index] = self.generated[index] + 1
        since = UNKNOWN if generated == 1 else scheduler.last_token.pop(index)
        left = scheduler.output[index] - generated
        profile = sequence.profile
        if self._side_stream and profile is not None and profile.compress_ticks and left:
            self._prompts_out.append((sequence, since, left))
        else:
            self._prompts_out.append((sequence, since, 0))
            self._join(sequence, left)

    def _prefill_ticks(self, chunks: list[Chunk], tokens: int, ending: int, compress: int) -> int:
        """What the chunks add to a step: the difference of the tables, attention, and encoding the new tokens."""
        if self._lanes is not None:
            return self._lane_prefill_ticks(self._lanes, chunks)
        tables, size = self.tables, self._decoding
        compression = compress + tables.append[tokens]
        if not size:
            compression += tables.append_launch
        attention = 0
        for sequence, chunk in chunks:
            if sequence.done == 0:
                attention += tables.first_chunk[chunk]
            else:
                seconds, unpack_s = self.step.prefill_attention_seconds(chunk, sequence.done)
                attention += round(float(seconds) * TICKS_PER_SECOND)
                compression += round(float(unpack_s) * TICKS_PER_SECOND)
                if self._speculation is not None:
                    seconds = self._speculation.prefill_attention_seconds(chunk, sequence.done)
                    attention += round(seconds * TICKS_PER_SECOND)
        self.record.prompts.append((size, tokens, ending, attention, compression))
        base, head = tables.base, tables.head
        size *= tables.rows
        return base[size + tokens] - base[size] + head[size + ending] - head[size] + attention + compression

    def _lane_prefill_ticks(self, lanes: LanePricing, chunks: list[Chunk]) -> int:
        """The same where the chunks are dealt to lanes: what the fullest one takes longer."""
        pieces = []
        for sequence, chunk in chunks:
            ends, profile = sequence.done + chunk == sequence.target, sequence.profile
            compress = profile.compress_ticks if ends and profile is not None and not self._side_stream else 0
            pieces.append(Piece(chunk, sequence.done, ends, compress))
        size, record = self._decoding, self.record
        fullest = lanes.prompts(pieces, size)
        decoding = self.step.deployment.parallelism.sequences_per_lane(size)
        record.prompts.append((decoding, fullest.tokens, fullest.ending, fullest.attention, fullest.compression))
        record.other_lanes_tokens += sum(piece.tokens for piece in pieces) - fullest.tokens
        return fullest.ticks

    def _begin_lone_prompt(self) -> int:
        """Start the step of the one waiting request, the commonest of all, without a plan; its ticks.

        0 where the prompt needs the scheduler: it was preempted before, does not fit the budget, the seats or the
        pool, or another prompt is in progress. Equal to :meth:`_begin_mixed`, which steps one by one always takes.
        """
        scheduler, batch, tables, record = self.scheduler, self.batch, self.tables, self.record
        limits, index, size = scheduler.limits, scheduler.waiting[0], batch.size
        target = scheduler.prompt[index]
        total = size + target
        held = limits.fixed_bytes + -(-target // limits.block_size) * batch.block_bytes
        if (
            scheduler.prefilling
            or self.log.scheduled[index] >= 0
            or total > limits.max_num_batched_tokens
            or size + len(scheduler.leaving) >= limits.max_num_seqs
            or target + scheduler.output[index] > limits.max_model_len
            or held + batch.due_bytes() > scheduler.free
        ):
            return 0
        scheduler.waiting.clear()
        sequence = self._lone = SequenceState(index, target)
        sequence.held = held
        scheduler.free -= held
        self.log.scheduled[index] = self.seen
        running = size + len(scheduler.leaving)
        if running >= record.max_running:
            record.max_running = running + 1
        record.max_waiting = max(record.max_waiting, 1)
        attention, compression = tables.first_chunk[target], tables.append[target]
        ticks = tables.base[total] - tables.base[size] + tables.head[size + 1] - tables.head[size]
        if size:
            self.decode_steps[size] += 1
            self.variable_total += batch.variable
            ticks += tables.step[size] + batch.variable
        else:
            compression += tables.append_launch
        record.prompts.append((size, target, 1, attention, compression))
        ticks += attention + compression
        work = self.host_work[size + 1]
        if not self.overlaps or ticks < work:
            ticks = self._add_host_work(ticks, size + 1)
        if self.observer is not None:
            self.observer.step(self, ticks, prompt_tokens=target, prompts=(index,))
        return ticks

    def _end_lone_prompt(self, ticks: int) -> None:
        batch, scheduler, sequence = self.batch, self.scheduler, self._lone
        index = sequence.index
        if batch.size:
            self.record.runs.append((1, batch.size, ticks, 0))
            self._advance(1)
        self.log.first_token[index] = self.now
        self.generated[index] = 1
        left = scheduler.output[index] - 1
        if left:
            sequence.held = scheduler.limits.fixed_bytes
            batch.join(sequence, left)
        else:
            scheduler.leaving.append((batch.next_order(), sequence, sequence.held))

    def _hold_back(self) -> None:
        """A step of prompts alone: who decodes goes without a token, and its next gap began at its latest one."""
        late, now = self._late, self.now
        if len(late) < self.batch.size:
            for index in self.batch.active:
                late.setdefault(index, now)

    def _profile_of(self, sequence: SequenceState) -> SequenceProfile:
        """The life of a sequence whose prompt is in."""
        return self.step.sequences.profile(sequence.target)

    def compression_ticks(self, drafting_ticks: int) -> int:
        """Part of ``variable_total``, of which drafts took so much, that is due to compression."""
        if self.batch.token_ticks:
            return math.floor((self.variable_total - drafting_ticks) * self.step.sequences.unpack_share)
        if self.tables.factors is None:
            return self.batch.unpack_total
        # The batch counts sixteenths of a lane's share; the steps were charged by the fullest lane.
        return self.batch.unpack_total * self.variable_total // max(1, self.unscaled_total)
