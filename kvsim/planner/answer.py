"""The answer of a plan: one value that terminal, JSON, Parquet and dashboard show."""

from __future__ import annotations

from kvsim.edge import EdgeAnswer
from kvsim.planner.crossovers import Crossover
from kvsim.planner.flags import Command
from kvsim.planner.quality import Retained, Risk
from kvsim.planner.reasons import Comparison
from kvsim.planner.request import PlanRequest
from kvsim.scenario import Scenario
from kvsim.specs.base import Spec

SCHEMA_VERSION = 1


class Estimated(Spec):
    """What the closed form says of a point, as ``kvsim estimate`` does."""

    output_throughput: float
    mean_ttft_s: float
    mean_tpot_s: float | None
    mean_e2el_s: float
    usd_per_hour: float | None
    usd_per_million_total_tokens: float | None
    joules_per_total_token: float | None
    tdp_w: float | None
    """Of all devices."""
    engine_utilization: float
    mean_batch: float
    sequences_that_fit: float
    sequence_kv_bytes: float
    device_memory_bytes: float


class Simulated(Spec):
    """What a simulation says of a point, as ``kvsim simulate`` does; p99 of fewer than 100 samples is None."""

    output_throughput: float | None
    p99_ttft_s: float | None
    p99_tpot_s: float | None
    p99_e2el_s: float | None
    mean_ttft_s: float | None
    usd_per_million_total_tokens: float | None
    joules_per_total_token: float | None
    preemptions: int


class PlanPoint(Spec):
    """One way to serve the load that holds every limit."""

    name: str
    in_set: bool
    """Whether it is of the set over all devices; a device's pick may be dominated by another device's."""
    device: str
    strategy: str
    tensor_parallel_size: int
    replicas: int
    num_devices: int
    settings: dict[str, float | int | bool]
    """Engine options that the search varies."""
    estimated: Estimated
    simulated: Simulated | None = None
    risk: Risk | None
    """None where the small model did not measure exactly this strategy."""
    quality: tuple[Retained, ...]
    """One per class of tasks with a floor."""
    marks: tuple[str, ...] = ()
    """What is unknown of it."""
    also: tuple[str, ...] = ()
    """Other settings with the same figures on every axis; the first of them is shown."""
    limit: str
    compared: tuple[Comparison, ...] = ()
    commands: tuple[Command, ...] = ()
    """Of engines that ship the strategy and run on the device; the priced engine's first."""
    runs_on: str | None = None
    """The priced engine where it ships the strategy and its source names the device's vendor."""
    not_shipped: str | None = None
    """Why there is no command of the priced engine; None where there is one."""
    scenario: Scenario
    """For ``kvsim simulate``: its figures are those of this point."""


class RefusalCount(Spec):
    """Candidates of a device that miss a limit."""

    limit: str
    count: int
    example: str


class DevicePlan(Spec):
    """What one device offers, whatever the others do."""

    device: str
    title: str
    runs_today: PlanPoint | None = None
    """Cheapest per token of what the engine ships for this vendor, by device time where no price is known, then of
    least risk; None where nothing of that holds every limit."""
    cheapest: PlanPoint | None = None
    """The same of all strategies, shipped or not; None where nothing holds every limit."""
    why: str
    facts: tuple[str, ...] = ()
    """What of the hardware decides between formats."""
    beside: str | None = None
    """Price and device time of what runs today, beside the device on which that is cheapest; None for that device and
    where there is nothing to compare."""
    alone: EdgeAnswer | None = None
    """On a phone, laptop or board: what the pick gives its one user, as ``kvsim edge`` says; None on servers."""
    screened: int
    feasible: int
    refused: tuple[RefusalCount, ...] = ()
    crossovers: tuple[Crossover, ...] = ()


class Plan(Spec):
    """The Pareto set over throughput, time to first token, dollars, joules and risk, and what it rests on."""

    schema_version: int = SCHEMA_VERSION
    request: PlanRequest
    points: tuple[PlanPoint, ...]
    devices: tuple[DevicePlan, ...]
    screened: int
    """Candidates that the closed form answered for."""
    feasible: int
    on_screen_front: int
    """Points of the Pareto set by the closed form, equal ones once."""
    simulated: int
    refused_in_simulation: tuple[RefusalCount, ...] = ()
    not_tried: tuple[RefusalCount, ...] = ()
    """Pairs of parts that are no strategy, and settings that are no engine, with the reason."""
    notes: tuple[str, ...] = ()
