"""TensorRT-LLM: in-flight batching under a capacity policy.

Sources: TensorRT-LLM 1.2 ``_torch/pyexecutor/scheduler/scheduler.py`` (``GuaranteedNoEvictPolicy``,
``MaxUtilizationPolicy``), ``cpp/tensorrt_llm/batch_manager/capacityScheduler.cpp`` and ``microBatchScheduler.cpp``:
prompts are cut to whole blocks (``chunkUnitSize`` is ``tokens_per_block``), first come first served.
"""

from __future__ import annotations

from kvsim.sim.batch import SequenceState
from kvsim.sim.scheduling.base import SchedulerParts
from kvsim.sim.scheduling.in_flight import InFlightScheduler
from kvsim.sim.tiers.reload import Reload


class MaxUtilizationScheduler(InFlightScheduler):
    """``MAX_UTILIZATION``: start a request once its prompt fits, pause the one started last where blocks run out."""

    def chunk_tokens(self, left: int, budget: int) -> int:
        """Whole blocks of a prompt that is cut."""
        tokens = super().chunk_tokens(left, budget)
        return tokens if tokens == left else tokens // self.limits.block_size * self.limits.block_size


class GuaranteedNoEvictScheduler(MaxUtilizationScheduler):
    """``GUARANTEED_NO_EVICT``: start a request only if it and all running ones can end without losing a block."""

    def __init__(self, parts: SchedulerParts) -> None:
        super().__init__(parts)
        self._ends: dict[int, int] = {}
        """Most bytes that each running request will ever hold, shared ones included."""
        self._ends_total = 0

    def fits(self, sequence: SequenceState, need_bytes: int, pinned_bytes: int, reserved_bytes: int) -> bool:
        """Whether the blocks to the end of it are free beside those to the end of all running ones."""
        del need_bytes, reserved_bytes
        whole = self._end_bytes(sequence.index) - self.shared_bytes(sequence) + pinned_bytes
        return whole + self._promised_bytes() <= self.free

    def seat(
        self,
        sequence: SequenceState,
        need_bytes: int,
        pinned_bytes: int,
        cached_tokens: int,
        now_ticks: int,
        reload: Reload | None = None,
    ) -> None:
        """Promise a request all that it will ever hold."""
        super().seat(sequence, need_bytes, pinned_bytes, cached_tokens, now_ticks, reload)
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
