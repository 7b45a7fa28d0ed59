"""vLLM V1: in-flight batching with preemption by recomputation, first come first served or by priority.

Sources: vLLM 0.15 ``v1/core/sched/scheduler.py`` (``Scheduler.schedule``). ``max_num_partial_prefills`` and
``max_long_partial_prefills`` exist as options, but V1 refuses any value but 1 (``arg_utils._check_feature_supported``:
"Concurrent Partial Prefill is not supported"), so kvsim has no such options.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvsim.errors import InvariantViolation
from kvsim.sim.batch import SequenceState
from kvsim.sim.scheduling.base import Scheduler, SchedulerParts
from kvsim.sim.scheduling.in_flight import InFlightScheduler
from kvsim.sim.scheduling.queues import PriorityQueue


class VllmScheduler(InFlightScheduler):
    """First come first served; the sequence admitted last gives way first."""

    admits_plainly = True


class ThresholdScheduler(InFlightScheduler):
    """The same with ``long_prefill_token_threshold``: no prompt takes more than that of a step, so several progress."""

    def __init__(self, parts: SchedulerParts, threshold_tokens: int) -> None:
        super().__init__(parts)
        self._threshold = threshold_tokens or parts.limits.max_model_len

    def chunk_tokens(self, left: int, budget: int) -> int:
        """Cut before the budget is looked at: a prompt within neither is cut to the smaller."""
        return super().chunk_tokens(min(left, self._threshold), budget)

    def take_from_leaving(self) -> bool:
        """Who ends with the running step anyway loses nothing, so such blocks are taken before any others."""
        return Scheduler.take_from_leaving(self)

    def victim(self) -> SequenceState:
        """Prompts in progress may be older than decoding ones, so the order of admission decides."""
        running = [*self.prefilling, *self.batch.active.values()]
        if not running:
            return super().victim()
        return max(running, key=lambda sequence: sequence.admitted)


class PriorityScheduler(ThresholdScheduler):
    """``scheduling_policy: priority``: the lowest value first, and the highest value, latest arrival gives way first.

    A waiting request never takes blocks from a running one: only running ones that need a block do.
    """

    reorders = True

    def __init__(self, parts: SchedulerParts, threshold_tokens: int) -> None:
        super().__init__(parts, threshold_tokens)
        self._priority: Sequence[int] = parts.priority or [0] * len(self.prompt)
        self.waiting = PriorityQueue(self._priority, self.log.arrived)

    def victim(self) -> SequenceState:
        """The running request that was least urgent and came last."""
        running = [*self.prefilling, *self.batch.active.values()]
        if not running:
            msg = "the pool is exhausted although nothing runs"
            raise InvariantViolation(msg)
        priority, arrived = self._priority, self.log.arrived
        return max(running, key=lambda one: (priority[one.index], arrived[one.index], one.index))
