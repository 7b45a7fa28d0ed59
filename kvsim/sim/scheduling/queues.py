"""A waiting queue in order of priority."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


class PriorityQueue:
    """Lowest priority value first, then the earliest arrival, then the lower number.

    Source: vLLM 0.15 ``v1/core/sched/request_queue.py``, ``PriorityRequestQueue``; putting a request back at the head
    is adding it.
    """

    def __init__(self, priority: Sequence[int], arrived_ticks: Sequence[int]) -> None:
        self._priority = priority
        self._arrived = arrived_ticks
        self._heap: list[tuple[int, int, int]] = []

    def append(self, index: int) -> None:
        """Add a request where its priority puts it."""
        heapq.heappush(self._heap, (self._priority[index], self._arrived[index], index))

    appendleft = append

    def popleft(self) -> int:
        """Take the next one out."""
        return heapq.heappop(self._heap)[2]

    def clear(self) -> None:
        """Take all out."""
        self._heap.clear()

    def __getitem__(self, position: int) -> int:
        """The request at a position of the heap; 0 is the next."""
        return self._heap[position][2]

    def __len__(self) -> int:
        return len(self._heap)
