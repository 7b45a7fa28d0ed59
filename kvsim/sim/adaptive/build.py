"""From an adaptive deployment to the engines of its replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import simpy

from kvsim.adaptive import Adaptive
from kvsim.requests import RequestTable
from kvsim.sim.adaptive.engine import AdaptiveEngine
from kvsim.sim.adaptive.prices import LevelPrices
from kvsim.sim.adaptive.scheduler import LevelSharing, level_sharing
from kvsim.sim.arrivals import ArrivalSource
from kvsim.sim.recorder import RequestLog
from kvsim.sim.resources import SharedDevice
from kvsim.sim.scheduling import SchedulerLimits


@dataclass(frozen=True)
class SharedUnits:
    """What replicas need to share prefixes among requests of one level."""

    unit_bytes: tuple[int, ...]
    """By level."""
    hashes: Sequence[tuple[int, ...]]
    unit_tokens: int


@dataclass(frozen=True)
class LevelBuilder:
    """Builds the engines of one adaptive run, all of the same prices."""

    adaptive: Adaptive
    prices: LevelPrices
    requests: RequestTable
    shared: SharedUnits | None
    """None where nothing is shared."""

    def engine(
        self,
        env: simpy.Environment,
        device: SharedDevice,
        source: ArrivalSource,
        lengths: tuple[list[int], list[int]],
        log: RequestLog,
        limits: SchedulerLimits,
        *,
        coalesce: bool,
        host_work: list[int],
    ) -> AdaptiveEngine:
        """One replica's engine."""
        classes, priority = self.requests.request_class, self.requests.priority
        return AdaptiveEngine(
            env,
            device,
            source,
            lengths,
            log,
            self.prices.steps[0],
            self.prices.tables[0],
            limits,
            sharing=self._sharing(),
            adaptive=self.adaptive,
            prices=self.prices,
            classes=(self.requests.class_names, None if classes is None else classes.tolist()),
            coalesce=coalesce,
            host_work=host_work,
            priority=None if priority is None else priority.tolist(),
        )

    def _sharing(self) -> LevelSharing | None:
        shared = self.shared
        return None if shared is None else level_sharing(shared.unit_bytes, shared.hashes, shared.unit_tokens)
