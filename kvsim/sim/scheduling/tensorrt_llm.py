"""TensorRT-LLM: in-flight batching under a capacity policy.

Sources: TensorRT-LLM 1.2 ``_torch/pyexecutor/scheduler/scheduler.py`` (``GuaranteedNoEvictPolicy``,
``MaxUtilizationPolicy``), ``cpp/tensorrt_llm/batch_manager/capacityScheduler.cpp`` and ``microBatchScheduler.cpp``:
prompts are cut to whole blocks (``chunkUnitSize`` is ``tokens_per_block``), first come first served; waiting for a
fuller step, ``_torch/pyexecutor/py_executor.py`` (``PyExecutor._waiting_requests``).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.sim.batch import SequenceState
from kvsim.sim.scheduling.in_flight import InFlightScheduler
from kvsim.sim.scheduling.parts import Chunk, SchedulerParts


@dataclass(frozen=True)
class BatchWait:
    """Hold prompts back while others decode, for ``timeout_iters`` steps or until a step has ``enough_tokens``."""

    timeout_iters: int
    enough_tokens: float


class MaxUtilizationScheduler(InFlightScheduler):
    """``MAX_UTILIZATION``: start a request once its prompt fits, pause the one started last where blocks run out."""

    def __init__(self, parts: SchedulerParts, wait: BatchWait | None = None) -> None:
        super().__init__(parts)
        self._wait = wait
        self._waited_iters = 0

    def chunk_tokens(self, left: int, budget: int) -> int:
        """Whole blocks of a prompt that is cut."""
        tokens = super().chunk_tokens(left, budget)
        return tokens if tokens == left else tokens // self.limits.block_size * self.limits.block_size

    def _admit(self, chunks: list[Chunk], budget: int, reserved: int, now_ticks: int, running: int) -> None:
        """Start waiting requests, unless they wait for more to share their step."""
        if self._wait is not None and self._holds_back(self._wait, chunks, budget):
            self._waited_iters += 1
            # The next step must be planned anew, although nobody arrives or leaves.
            self.looked = False
            return
        begun = len(chunks)
        super()._admit(chunks, budget, reserved, now_ticks, running)
        if len(chunks) > begun:
            self._waited_iters = 0

    def _holds_back(self, wait: BatchWait, chunks: list[Chunk], budget: int) -> bool:
        """Whether a step that decodes would start too few prompts, and they have not waited long enough.

        A request that memory held back has waited as well.
        """
        if chunks or not self.batch.size or self._waited_iters >= wait.timeout_iters:
            return False
        return self.batch.size * self.limits.decode_tokens + self._prompt_tokens(budget) < wait.enough_tokens

    def _prompt_tokens(self, budget: int) -> int:
        """Tokens of the waiting prompts that fit a budget, first come first served."""
        total = 0
        for position in range(len(self.waiting)):
            index = self.waiting[position]
            tokens = self.prompt[index] + self.generated[index]
            if total + tokens > budget:
                break
            total += tokens
        return total


class GuaranteedNoEvictScheduler(MaxUtilizationScheduler):
    """``GUARANTEED_NO_EVICT``: start a request only if it and all running ones can end without losing a block."""

    def __init__(self, parts: SchedulerParts, wait: BatchWait | None = None) -> None:
        super().__init__(parts, wait)
        self._ends: dict[int, int] = {}
        """Most bytes that each running request will ever hold, shared ones included."""
        self._ends_total = 0

    def fits(self, sequence: SequenceState, need_bytes: int, pinned_bytes: int, reserved_bytes: int) -> bool:
        """Whether the blocks to the end of it are free beside those to the end of all running ones."""
        del need_bytes, reserved_bytes
        whole = self._end_bytes(sequence.index) - self.shared_bytes(sequence) + pinned_bytes
        return whole + self._promised_bytes() <= self.free

    def note_seated(self, sequence: SequenceState) -> None:
        """Promise a request all that it will ever hold."""
        super().note_seated(sequence)
        self._ends[sequence.index] = self._end_bytes(sequence.index)
        self._ends_total += self._ends[sequence.index]

    def give_back(self, sequence: SequenceState, held_bytes: int) -> None:
        """Return a sequence's own bytes, its shared units, and what it was promised."""
        super().give_back(sequence, held_bytes)
        self._ends_total -= self._ends.pop(sequence.index)

    def _end_bytes(self, index: int) -> int:
        return self.prefill_bytes(self.prompt[index] + self.output[index])

    def _promised_bytes(self) -> int:
        """Bytes that running requests may still take: what they hold at most, less what they hold."""
        held = self.limits.pool_bytes - self.free
        if self.sharing is not None:
            # A unit shared by several counts once for each, as it does in what each will hold.
            cache = self.sharing.cache
            held += (cache.uses - cache.pinned_units) * cache.unit_bytes
        return self._ends_total - held
