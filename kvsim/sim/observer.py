"""Watches a run without changing it: when steps ran, what they did, what ran beside them, and how full the engine was.

An engine without an observer pays one comparison per planned run of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from kvsim.requests import RequestTable
    from kvsim.sim.engine import ReplicaEngine
    from kvsim.sim.resources import Activity, SharedDevice
    from kvsim.sim.run import RunResult
    from kvsim.sim.scheduling import Chunk

MAX_STEPS: Final = 400_000
"""Runs of steps kept per replica; the sums go on without the rest."""
MAX_SAMPLES: Final = 20_000
"""Samples kept per replica; beyond it every second one is dropped, again and again."""
STEP: Final = "step"
"""Name of an engine's step among the device's activities."""


@dataclass(slots=True)
class Sample:
    """State of a replica at one time; the last three are sums since the start."""

    ticks: int
    running: int
    waiting: int
    used_bytes: int
    preemptions: int
    cached_tokens: int


@dataclass(slots=True)
class StepRun:
    """Equal steps in a row, taken as one: a run of decode steps, or one step with prompts in it."""

    start_ticks: int
    end_ticks: int
    steps: int
    sequences: int
    """Decoding sequences."""
    prompts: int
    prompt_tokens: int


@dataclass(slots=True)
class SideActivity:
    """A transfer or a kernel beside the steps."""

    name: str
    start_ticks: int
    end_ticks: int
    alone_ticks: int


class ActivityWatch(Protocol):
    """Whoever is told what a shared device did."""

    def finished(self, activity: Activity) -> None:
        """Take note of an activity that is over."""


@dataclass
class LinkWatch:
    """Transfers over a link that no replica owns."""

    name: str
    beside: list[SideActivity] = field(default_factory=list)

    def finished(self, activity: Activity) -> None:
        """Note a transfer."""
        end = activity.finished_ticks
        if end is not None:
            self.beside.append(SideActivity(activity.name, activity.started_ticks, end, activity.alone_ticks))


@dataclass
class ReplicaWatch:
    """What one replica did. The engine calls `step`, `begins` and `idle`, its device `finished`."""

    number: int
    served_by: dict[int, int]
    """Replica of each request, shared by all watches."""
    pool_bytes: int
    name: str = "replica"
    steps: list[StepRun] = field(default_factory=list)
    beside: list[SideActivity] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    busy_ticks: int = 0
    """Length of all runs of steps, those not kept included."""
    unkept_steps: int = 0
    _planned: StepRun | None = None
    _running: StepRun | None = None
    """The step whose activity runs; another may be planned behind it."""
    _stride: int = 1
    _seen: int = 0

    def step(
        self,
        engine: ReplicaEngine,
        ticks: int,
        *,
        steps: int = 1,
        prompt_tokens: int = 0,
        prompts: Sequence[int] = (),
        running: int = 0,
    ) -> None:
        """Note a run of steps planned for ``ticks`` from the engine's clock on; ``prompts`` are the requests in it."""
        for index in prompts:
            self.served_by.setdefault(index, self.number)
        start = engine.now
        size = engine.batch.size
        self._planned = run = StepRun(start, start + ticks, steps, size, len(prompts), prompt_tokens)
        self.busy_ticks += ticks
        if len(self.steps) < MAX_STEPS:
            self.steps.append(run)
        else:
            self.unkept_steps += steps
        self._sample(engine, start, size + (running or len(prompts)))

    def begins(self, ticks: int) -> None:
        """The run planned last begins now: the one before it, whose end was not known, is over."""
        run = self._planned
        if run is None:
            return
        if self.samples and self.samples[-1].ticks == run.start_ticks:
            self.samples[-1].ticks = ticks
        run.end_ticks += ticks - run.start_ticks
        run.start_ticks = ticks
        self._running = run

    def finished(self, activity: Activity) -> None:
        """An activity of the shared device is over; a step's wait for copies before it began is part of the step."""
        end = activity.finished_ticks
        if end is None:
            return
        if activity.name != STEP:
            self.beside.append(SideActivity(activity.name, activity.started_ticks, end, activity.alone_ticks))
            return
        run = self._running or self._planned
        if run is not None:
            self.busy_ticks += end - run.end_ticks
            run.end_ticks = end
            self._running = None

    def idle(self, engine: ReplicaEngine) -> None:
        """No step can be taken until something comes."""
        self._sample(engine, engine.now, engine.batch.size)

    def end(self, engine: ReplicaEngine, ticks: int) -> None:
        """Note the state that the run leaves behind."""
        self.samples.append(self._state(engine, max(ticks, engine.now), engine.batch.size))

    def _sample(self, engine: ReplicaEngine, ticks: int, running: int) -> None:
        self._seen += 1
        if self._seen % self._stride:
            return
        self.samples.append(self._state(engine, ticks, running))
        if len(self.samples) >= MAX_SAMPLES:
            del self.samples[1::2]
            self._stride *= 2

    def _state(self, engine: ReplicaEngine, ticks: int, running: int) -> Sample:
        scheduler, record = engine.scheduler, engine.record
        used = self.pool_bytes - scheduler.free
        waiting = len(scheduler.waiting)
        return Sample(ticks, running, waiting, used, record.preemptions, record.cached_prompt_tokens)


@dataclass
class RunObserver:
    """Watches every replica of one run; empty until the run is over."""

    replicas: list[ReplicaWatch] = field(default_factory=list)
    links: list[LinkWatch] = field(default_factory=list)
    served_by: dict[int, int] = field(default_factory=dict)
    result: RunResult | None = None
    requests: RequestTable | None = None

    def watch(self, engine: ReplicaEngine, name: str = "replica") -> None:
        """Follow a replica from now on."""
        number = len(self.replicas)
        pool_bytes = engine.scheduler.limits.pool_bytes
        watch = ReplicaWatch(number, self.served_by, pool_bytes, f"{name} {number}")
        engine.observer = engine.device.observer = watch
        self.replicas.append(watch)

    def watch_pools(
        self, givers: Sequence[ReplicaEngine], takers: Sequence[ReplicaEngine], between: SharedDevice
    ) -> None:
        """Follow the replicas of a prefill and of a decode pool, and what moves between them."""
        for engine in givers:
            self.watch(engine, "prefill replica")
        for engine in takers:
            self.watch(engine, "decode replica")
        between.observer = LinkWatch("KV between pools")
        self.links.append(between.observer)

    def finish(self, engines: Sequence[ReplicaEngine], result: RunResult, requests: RequestTable) -> None:
        """Take the run's result, and the state in which it left the replicas."""
        self.result, self.requests = result, requests
        for watch, engine in zip(self.replicas, engines, strict=True):
            watch.end(engine, result.end_ticks)


def prompts_of(chunks: list[Chunk]) -> list[int]:
    """Requests of a step's chunks."""
    return [sequence.index for sequence, _ in chunks]
