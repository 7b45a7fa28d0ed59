"""vLLM V1: in-flight batching with preemption by recomputation, first come first served or by priority.

Sources: vLLM 0.15 ``v1/core/sched/scheduler.py`` (``Scheduler.schedule``). ``max_num_partial_prefills`` and
``max_long_partial_prefills`` exist as options, but V1 refuses any value but 1 (``arg_utils._check_feature_supported``:
"Concurrent Partial Prefill is not supported"), so kvsim has no such options.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvsim.sim.batch import SequenceState
from kvsim.sim.scheduling.in_flight import InFlightScheduler
from kvsim.sim.scheduling.parts import SchedulerParts
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

    def urgency(self, sequence: SequenceState) -> tuple[int, ...]:
        """What decides who gives way: the largest. Prompts in progress may be older than decoding sequences."""
        return (sequence.admitted,)

    def take_from_leaving(self) -> bool:
        """Take blocks from a sequence that ends with the running step where it is the next to give way."""
        held = [position for position, entry in enumerate(self.leaving) if entry[2] is not None]
        if not held:
            return False
        last = max(held, key=lambda position: self.urgency(self.leaving[position][1]))
        order, sequence, held_bytes = self.leaving[last]
        running = (*self.prefilling, *self.batch.active.values())
        if held_bytes is None or any(self.urgency(one) > self.urgency(sequence) for one in running):
            return False
        self.give_back(sequence, held_bytes)
        self.leaving[last] = (order, sequence, None)
        return True

    def victim(self) -> SequenceState:
        """The running request that is to give way first."""
        running = [*self.prefilling, *self.batch.active.values()]
        return max(running, key=self.urgency) if running else super().victim()


class PriorityScheduler(ThresholdScheduler):
    """``scheduling_policy: priority``: the lowest value first, and the highest value, latest arrival gives way first.

    A waiting request never takes blocks from a running one: only running ones that need a block do.
    """

    reorders = True

    def __init__(self, parts: SchedulerParts, threshold_tokens: int) -> None:
        super().__init__(parts, threshold_tokens)
        self._priority: Sequence[int] = parts.priority or [0] * len(self.prompt)
        self.waiting = PriorityQueue(self._priority, self.log.arrived)

    def urgency(self, sequence: SequenceState) -> tuple[int, ...]:
        """Priority, then arrival."""
        index = sequence.index
        return self._priority[index], self.log.arrived[index], index
