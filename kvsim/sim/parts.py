"""What a replica is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import simpy

from kvsim.cost.step import StepModel
from kvsim.cost.tables import StepTables
from kvsim.sim.arrivals import ArrivalSource
from kvsim.sim.recorder import RequestLog
from kvsim.sim.resources import SharedDevice
from kvsim.sim.scheduling import PrefixSharing, SchedulerLimits
from kvsim.sim.speculation import Speculation


@dataclass(frozen=True)
class PoolParts:
    """What all replicas of one deployment have in common."""

    lengths: tuple[list[int], list[int]]
    """Prompt and output tokens per request."""
    log: RequestLog
    step: StepModel
    tables: StepTables
    limits: SchedulerLimits
    token_ticks: int
    """Price of one attended token where it is the same for all; 0 where sequences are priced by their own profiles."""
    host_work: list[int]
    """Ticks of host work of a step, by its sequences."""
    priority: Sequence[int] | None = None
    """Per request, lower first; None where all are equal."""
    speculation: Speculation | None = None


@dataclass(frozen=True)
class ReplicaParts:
    """What one replica is built from."""

    env: simpy.Environment
    pool: PoolParts
    device: SharedDevice
    source: ArrivalSource
    sharing: PrefixSharing | None
    coalesce: bool
    """Whether runs of equal steps are taken as one."""
