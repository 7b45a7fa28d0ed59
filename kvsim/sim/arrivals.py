"""When requests reach which replica. Arrivals are delivered lazily, which is exact.

A replica's state changes only at its own step boundaries, so routing an arrival at the next boundary of any replica
gives the decision that would have been taken at the moment of arrival.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from typing import Final, Literal, Protocol

import simpy

from kvsim.requests import UNSCHEDULED, RequestTable

NEVER: Final = 2**62


class Queue(Protocol):
    """Where the router leaves requests."""

    def append(self, index: int, /) -> None:
        """Add an arrival."""


class Replica(Protocol):
    """What the router needs to know of a replica."""

    @property
    def waiting(self) -> Queue:
        """Requests delivered and not yet admitted."""

    load: int
    """Requests routed to it that have not ended."""


class ArrivalSource:
    """Feeds requests to replicas in time order, and releases the ones that wait for another to end."""

    def __init__(
        self, env: simpy.Environment, requests: RequestTable, routing: Literal["round_robin", "least_loaded"]
    ) -> None:
        self._env = env
        self.released = env.event()
        """Fires when a request was released or the last one ended; idle replicas wait for it."""
        self.outstanding = len(requests)
        order = [int(i) for i in requests.arrival_ticks.argsort(kind="stable")]
        self._ticks: list[int] = requests.arrival_ticks.tolist()
        self._delay: list[int] = requests.delay_ticks.tolist()
        self._queue = [i for i in order if self._ticks[i] != UNSCHEDULED]
        self._next = 0
        self._released: list[tuple[int, int]] = []
        self._children: defaultdict[int, list[int]] = defaultdict(list)
        for index, parent in enumerate(requests.parent.tolist()):
            if self._ticks[index] == UNSCHEDULED:
                self._children[parent].append(index)
        self._routing = routing
        self._turn = 0
        self.replicas: list[Replica] = []
        self.arrived_ticks: list[int] = list(self._ticks)
        self.is_dynamic = bool(self._children)
        """Whether requests may appear that no one can foresee."""
        self.next_ticks = self._peek()

    def _peek(self) -> int:
        static = self._ticks[self._queue[self._next]] if self._next < len(self._queue) else NEVER
        released = self._released[0][0] if self._released else NEVER
        return min(static, released)

    def settle(self, index: int, now_ticks: int) -> None:
        """Request ``index`` ended: schedule what waited for it."""
        self.outstanding -= 1
        children = self._children.get(index)
        if children:
            for child in children:
                at_ticks = now_ticks + self._delay[child]
                self.arrived_ticks[child] = at_ticks
                heapq.heappush(self._released, (at_ticks, child))
            self.next_ticks = self._peek()
        if children or not self.outstanding:
            released, self.released = self.released, self._env.event()
            released.succeed()

    def deliver(self, now_ticks: int) -> None:
        """Route every arrival up to ``now_ticks``."""
        queue, ticks = self._queue, self._ticks
        if not self.is_dynamic and len(self.replicas) == 1:
            self._deliver_to_only(now_ticks)
            return
        while self.next_ticks <= now_ticks:
            if self._released and self._released[0][0] == self.next_ticks:
                index = heapq.heappop(self._released)[1]
            else:
                index = queue[self._next]
                self._next += 1
            self._route(index)
            if not self._released:
                self.next_ticks = ticks[queue[self._next]] if self._next < len(queue) else NEVER
            else:
                self.next_ticks = self._peek()

    def _deliver_to_only(self, now_ticks: int) -> None:
        """Nothing to route and nothing released: a slice of the queue."""
        queue, ticks, position = self._queue, self._ticks, self._next
        waiting = self.replicas[0].waiting
        while position < len(queue) and ticks[queue[position]] <= now_ticks:
            waiting.append(queue[position])
            position += 1
        self._next = position
        self.next_ticks = ticks[queue[position]] if position < len(queue) else NEVER

    def _route(self, index: int) -> None:
        replicas = self.replicas
        if len(replicas) == 1:
            replicas[0].waiting.append(index)
            return
        if self._routing == "round_robin":
            chosen = replicas[self._turn % len(replicas)]
            self._turn += 1
        else:
            chosen = min(replicas, key=lambda replica: replica.load)
        chosen.load += 1
        chosen.waiting.append(index)
