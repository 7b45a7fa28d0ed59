"""vLLM V1's loop in the plainest form: every step, every sequence, every block by itself. The oracle of the simulator.

Follows ``vllm/v1/core/sched/scheduler.py`` (``Scheduler.schedule``, ``update_from_output``) and
``kv_cache_manager.py`` (``allocate_slots``): running requests in order of admission, each preempting the last one
where no block is free; then, if nobody was preempted, the waiting queue in order of arrival. Asynchronous scheduling
follows ``v1/engine/core.py`` (``step_with_batch_queue`` with two batches) and ``AsyncScheduler``: a step is scheduled
while the one before it runs, whose tokens are counted as promised. Of prefix caching there is what a preempted request
finds of itself (``BlockPool``: free blocks in a queue, used from its front, freed last block first). Shared prefixes,
windows and compression are left out. Shares no code with kvsim.sim; only the price of a step is taken from the cost
model.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

Price = Callable[[Sequence[int], Sequence[tuple[int, int]], int], int]
"""(cached tokens of each decoding sequence, (chunk, cached tokens) of each prompt, prompts completed) -> ticks."""


@dataclass(eq=False)
class Request:
    index: int
    prompt: int
    output: int
    arrived: int = -1
    scheduled: int = -1
    first_token: int = -1
    finished: int = -1
    rejected: bool = False
    generated: int = 0
    promised: int = 0
    """Tokens that steps under way will give."""
    computed: int = 0
    target: int = 0
    """Tokens to compute as a prompt: after a preemption the output so far is part of it."""
    blocks: list[int] = field(default_factory=list)
    hashed: int = 0
    """Tokens whose full blocks can be found in the prefix cache."""
    latest_token: int = -1

    @property
    def known(self) -> int:
        """Tokens whose KV must be computed before the next token comes out."""
        return self.prompt + self.generated + self.promised

    @property
    def ends_under_way(self) -> bool:
        return self.generated + self.promised == self.output


class PlainReplica:
    """One engine with an explicit list of free blocks."""

    def __init__(
        self, *, blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int,
        chunked: bool, price: Price, ahead: bool, caching: bool,
    ) -> None:  # fmt: skip
        self.free = deque(range(blocks))
        """Free blocks, the one to be used next first."""
        self.content: dict[int, tuple[int, int]] = {}
        """What free blocks still hold: (request, position); prompts differ, so nobody else can use it."""
        self.total = blocks
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.budget = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.chunked = chunked
        self.price = price
        self.ahead = ahead
        self.caching = caching
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.step_ends: int | None = None
        self.tokens_to: list[Request] = []
        """Requests that get a token from the running step."""
        self.queued: tuple[int, list[Request]] | None = None
        """Ticks and tokens of the step scheduled behind the running one; no ticks where nothing could be scheduled."""
        self.scheduled: dict[Request, int] = {}
        self.gaps: Counter[int] = Counter()
        self.preemptions = 0
        self.recomputed = 0
        self.prefilled = 0

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)

    def _allocate(self, request: Request, tokens: int) -> bool:
        needed = -(-(request.computed + tokens) // self.block_size) - len(request.blocks)
        if needed > len(self.free):
            return False
        for _ in range(needed):
            block = self.free.popleft()
            self.content.pop(block, None)
            request.blocks.append(block)
        request.hashed = max(request.hashed, min(request.computed + tokens, request.prompt + request.generated))
        return True

    def _release(self, request: Request) -> None:
        full = request.hashed // self.block_size
        self.content |= {block: (request.index, place) for place, block in enumerate(request.blocks[:full])}
        self.free.extend(reversed(request.blocks))
        request.blocks.clear()
        request.hashed = 0

    def _found(self, request: Request) -> list[int]:
        """Leading blocks of a preempted request that are still there."""
        places = {held: block for block, held in self.content.items()}
        most, found = (request.known - 1) // self.block_size, []
        while self.caching and len(found) < most and (request.index, len(found)) in places:
            found.append(places[request.index, len(found)])
        return found

    def _preempt_last(self) -> Request:
        victim = self.running.pop()
        self._release(victim)
        self.waiting.insert(0, victim)
        if victim.ends_under_way:
            return victim
        self.preemptions += 1
        self.recomputed += victim.computed
        victim.computed = 0
        return victim

    def begin_step(self, now: int, hear: Callable[[list[Request]], None]) -> None:
        """Schedule and start steps; ``hear`` learns at once of requests that a plan rejected.

        A step without tokens takes no time.
        """
        if self.step_ends is None and self.queued is not None:
            self._start(self.queued, now)
            self.queued = None
        while self.step_ends is None and self.load:
            self._start(self._schedule(now, hear), now)
        if self.ahead and self.step_ends is not None and self.queued is None:
            self.queued = self._schedule(now, hear)

    def _start(self, step: tuple[int, list[Request]], now: int) -> None:
        ticks, self.tokens_to = step
        if ticks:
            self.step_ends = now + ticks

    def _schedule(self, now: int, hear: Callable[[list[Request]], None]) -> tuple[int, list[Request]]:
        rejected: list[Request] = []
        if not (preempted := self._schedule_running()):
            self._schedule_waiting(now, rejected)
        step = self._count() if self.scheduled else (0, [])
        assert step[0] or preempted or not self.load or self.step_ends is not None, "nothing runs although some wait"
        hear(rejected)
        return step

    def _schedule_running(self) -> bool:
        budget, preempted, position = self.budget, False, 0
        while position < len(self.running) and budget:
            request = self.running[position]
            position += 1
            if request.ends_under_way:
                continue
            tokens = min(request.known - request.computed, budget)
            while not self._allocate(request, tokens):
                preempted = True
                if self._preempt_last() is request:
                    return True
            self.scheduled[request] = tokens
            budget -= tokens
        return preempted

    def _schedule_waiting(self, now: int, rejected: list[Request]) -> None:
        budget = self.budget - sum(self.scheduled.values())
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if request.prompt + request.output > self.max_model_len:
                request.rejected = True
                rejected.append(self.waiting.pop(0))
                continue
            found = self._found(request)
            computed = len(found) * self.block_size
            tokens = min(request.known - computed, budget)
            cut = computed + tokens < request.known
            if (cut and not self.chunked) or -(-(computed + tokens) // self.block_size) > len(self.free):
                return
            for block in found:
                self.free.remove(block)
                del self.content[block]
            request.blocks, request.computed = found, computed
            self.recomputed -= computed
            assert self._allocate(request, tokens)
            self.running.append(self.waiting.pop(0))
            request.target = request.known
            if request.scheduled < 0:
                request.scheduled = now
            self.scheduled[request] = tokens
            budget -= tokens

    def _count(self) -> tuple[int, list[Request]]:
        """Price what was scheduled, and take its tokens as computed."""
        decoding, prompts, tokens_to = [], [], []
        for request, tokens in self.scheduled.items():
            if request.computed >= request.target:
                decoding.append(request.computed)
            else:
                prompts.append((tokens, request.computed))
                self.prefilled += tokens
            request.computed += tokens
            if request.computed == request.known:
                request.promised += 1
                tokens_to.append(request)
        self.scheduled = {}
        return self.price(decoding, prompts, len(tokens_to) - len(decoding)), tokens_to

    def end_step(self) -> list[Request]:
        """Hand out the step's tokens, also to requests preempted since; the requests that finished."""
        now, finished = self.step_ends, []
        assert now is not None
        for request in self.tokens_to:
            request.promised -= 1
            request.generated += 1
            if request in self.running:
                request.hashed = max(request.hashed, request.computed - request.promised)
            if request.latest_token < 0:
                request.first_token = now
            else:
                self.gaps[now - request.latest_token] += 1
            request.latest_token = now
            if request.generated == request.output:
                request.finished = now
                (self.running if request in self.running else self.waiting).remove(request)
                self._release(request)
                finished.append(request)
        self.step_ends, self.tokens_to = None, []
        return finished


class _Arrivals:
    """Requests on their way. At equal times releases come before others."""

    def __init__(self, requests: list[Request], parents: Sequence[int], delays: Sequence[int]) -> None:
        self.requests, self.parents, self.delays = requests, parents, delays
        self.queue = [(r.arrived, 1, r.index) for r in requests if parents[r.index] < 0]
        heapq.heapify(self.queue)

    def settle(self, ended: list[Request], now: int) -> None:
        """Release what waited for requests that ended."""
        for request in ended:
            for child in self.requests:
                if self.parents[child.index] == request.index:
                    child.arrived = now + self.delays[child.index]
                    heapq.heappush(self.queue, (child.arrived, 0, child.index))

    def until(self, now: int) -> Iterator[Request]:
        while self.queue and self.queue[0][0] <= now:
            yield self.requests[heapq.heappop(self.queue)[2]]


def play(  # noqa: C901 - the whole loop in one place
    requests: list[Request],
    parents: Sequence[int],
    delays: Sequence[int],
    replicas: list[PlainReplica],
    *,
    least_loaded: bool,
) -> None:
    """Run all requests to their end. At equal times arrivals come before the ends of steps."""
    arrivals = _Arrivals(requests, parents, delays)
    turns = itertools.cycle(replicas)

    def deliver(now: int) -> None:
        for request in arrivals.until(now):
            chosen = min(replicas, key=lambda r: r.load) if least_loaded else next(turns)
            chosen.waiting.append(request)

    def hear(rejected: list[Request]) -> None:
        if rejected:
            arrivals.settle(rejected, now)
            deliver(now)

    while True:
        times = [r.step_ends for r in replicas if r.step_ends is not None] + [a[0] for a in arrivals.queue[:1]]
        if not times:
            return
        now = min(times)
        deliver(now)
        for replica in replicas:
            if replica.step_ends == now:
                arrivals.settle(replica.end_step(), now)
        deliver(now)
        for replica in replicas:
            if replica.step_ends is None:
                replica.begin_step(now, hear)
