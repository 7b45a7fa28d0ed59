"""When requests reach which replica. Arrivals are delivered lazily, which is exact.

A replica's state changes only at its own step boundaries, so routing an arrival at the next boundary of any replica
gives the decision that would have been taken at the moment of arrival. Clients send through a front end, which hands
requests to the replicas in the order in which they were sent.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

import numpy as np
import simpy

from kvsim.cost.front_end import FrontEnd
from kvsim.requests import UNSCHEDULED, IntArray, RequestTable
from kvsim.sim.routing import Replica, Router
from kvsim.units import seconds_to_ticks

NEVER: Final = 2**62


@dataclass(frozen=True)
class FrontEndTicks:
    """The front end on the clock, in ticks."""

    ingress: int = 0
    """From its turn to the engine."""
    egress: int = 0
    interval: int = 0
    """Least time between the turns of two requests."""


def front_end_ticks(front: FrontEnd) -> FrontEndTicks:
    """Round a front end to the clock."""
    return FrontEndTicks(
        seconds_to_ticks(front.ingress_s), seconds_to_ticks(front.egress_s), seconds_to_ticks(front.interval_s)
    )


class ArrivalSource:
    """Feeds requests to replicas in time order, and releases the ones that wait for another to end."""

    def __init__(self, env: simpy.Environment, requests: RequestTable, router: Router, front: FrontEndTicks) -> None:
        self._env = env
        self.released = env.event()
        """Fires when a request was released or the last one ended; idle replicas wait for it."""
        self.outstanding = len(requests)
        order = requests.arrival_ticks.argsort(kind="stable")
        order = order[requests.arrival_ticks[order] != UNSCHEDULED]
        self._front = front
        self._delay: list[int] = requests.delay_ticks.tolist()
        self.queue: list[int] = order.tolist()
        self.position = 0
        self._turn_ticks = 0
        """Earliest turn of the next request at the front end."""
        self._released: list[tuple[int, int]] = []
        self._children: defaultdict[int, list[int]] = defaultdict(list)
        for index in np.flatnonzero(requests.arrival_ticks == UNSCHEDULED).tolist():
            self._children[int(requests.parent[index])].append(index)
        self._router = router
        self.replicas: list[Replica] = []
        self.sent_ticks: list[int] = requests.arrival_ticks.tolist()
        """When clients sent each request; a released one's is known once it is released."""
        self.arrived_ticks: list[int] = _arrivals(requests.arrival_ticks, order, front).tolist()
        """When each reached the engine; worked out on delivery where requests are released."""
        self.is_dynamic = bool(self._children)
        """Whether requests may appear that no one can foresee."""
        self.next_ticks = self._peek()

    @property
    def reads_caches(self) -> bool:
        """Whether a request's replica depends on what the replicas' prefix caches hold when it comes."""
        return len(self.replicas) > 1 and self._router.reads_caches

    def _peek(self) -> int:
        """When the next request reaches an engine."""
        sent = self.sent_ticks[self.queue[self.position]] if self.position < len(self.queue) else NEVER
        if self._released and self._released[0][0] < sent:
            sent = self._released[0][0]
        return max(sent, self._turn_ticks) + self._front.ingress if sent < NEVER else NEVER

    def settle(self, index: int, now_ticks: int) -> None:
        """Request ``index`` ended in the engine: schedule what waited for its last token to reach the client."""
        self.outstanding -= 1
        children = self._children.get(index)
        if children:
            for child in children:
                at_ticks = now_ticks + self._front.egress + self._delay[child]
                self.sent_ticks[child] = at_ticks
                heapq.heappush(self._released, (at_ticks, child))
            self.next_ticks = self._peek()
        if children or not self.outstanding:
            released, self.released = self.released, self._env.event()
            released.succeed()

    def deliver(self, now_ticks: int) -> None:
        """Route every arrival up to ``now_ticks``."""
        if not self.is_dynamic:
            self._deliver_foreseen(now_ticks)
            return
        while self.next_ticks <= now_ticks:
            queue, following = self.queue, self.position
            static = self.sent_ticks[queue[following]] if following < len(queue) else NEVER
            if self._released and self._released[0][0] <= static:
                index = heapq.heappop(self._released)[1]
            else:
                index = queue[following]
                self.position += 1
            self.arrived_ticks[index] = self.next_ticks
            self._turn_ticks = self.next_ticks - self._front.ingress + self._front.interval
            self._route(index)
            self.next_ticks = self._peek()

    def go_to(self, position: int) -> None:
        """Take everything before ``position`` of the queue as delivered; nothing is released."""
        self.position = position
        self.next_ticks = self.arrived_ticks[self.queue[position]] if position < len(self.queue) else NEVER

    def _deliver_foreseen(self, now_ticks: int) -> None:
        """Nothing is released: a slice of the queue."""
        queue, ticks, position = self.queue, self.arrived_ticks, self.position
        only = self.replicas[0].waiting if len(self.replicas) == 1 else None
        while position < len(queue) and ticks[queue[position]] <= now_ticks:
            if only is not None:
                only.append(queue[position])
            else:
                self._route(queue[position])
            position += 1
        self.position = position
        self.next_ticks = ticks[queue[position]] if position < len(queue) else NEVER

    def _route(self, index: int) -> None:
        replicas = self.replicas
        if len(replicas) == 1:
            replicas[0].waiting.append(index)
            return
        chosen = replicas[self._router.choose(index, replicas)]
        chosen.load += 1
        chosen.waiting.append(index)


def _arrivals(sent_ticks: IntArray, order: IntArray, front: FrontEndTicks) -> IntArray:
    """When requests reach the engine if none is released: turns in order of sending, ``interval`` apart at least."""
    arrived = sent_ticks.copy()
    if len(order):
        waited = np.arange(len(order), dtype=np.int64) * front.interval
        arrived[order] = np.maximum.accumulate(sent_ticks[order] - waited) + waited + front.ingress
    return arrived
