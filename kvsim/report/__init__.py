"""The answer: one value that JSON, Parquet, terminal and dashboard all show. Nothing here computes."""

from __future__ import annotations

from typing import Literal

from kvsim.report.adaptive import AdaptiveAction, AdaptiveUse, ClassUse, LevelUse, PolicyOutcome
from kvsim.report.costs import BasisShare, Cost, Effects, Energy, TimeShare
from kvsim.report.figure import Figure
from kvsim.report.memory import KvCapacity, MemoryTerm, TiersUse, TierUse
from kvsim.report.pools import DisaggregationReport, PoolReport, TransferReport
from kvsim.report.provenance import KernelUsed, Provenance, Quality, QualityNote, TaskClass
from kvsim.report.serving import Counts, Latency, LatencyStats, SpeculationOutcome, Throughput
from kvsim.scenario import Scenario
from kvsim.specs.base import Spec

SCHEMA_VERSION = 1


class Report(Spec):
    """Everything kvsim answers about one scenario. ``method`` tells a simulation from a closed-form estimate."""

    schema_version: int = SCHEMA_VERSION
    method: Literal["simulation", "estimate"]
    strategy: str
    scenario: Scenario
    kv: KvCapacity
    memory: tuple[MemoryTerm, ...]
    duration_s: Figure
    queue_delay_mean_s: Figure
    request_overhead_s: Figure
    """Time of a request outside the engine, in TTFT and E2EL; queueing for the front end comes on top."""
    latency: Latency
    throughput: Throughput
    counts: Counts
    tiers: TiersUse | None = None
    """None without tiers, in an estimate, and where no prefix can be shared."""
    time_split: tuple[TimeShare, ...]
    bottleneck: str
    effects: Effects
    cost: Cost
    energy: Energy
    quality: Quality
    adaptive: AdaptiveUse | None = None
    """What an adaptive compression did; None where one compression serves every request."""
    coverage: tuple[BasisShare, ...]
    provenance: Provenance
    speculation: SpeculationOutcome | None = None
    """None where the engine decodes without drafts."""
    disaggregation: DisaggregationReport | None = None
    """Per pool; ``kv``, ``memory`` and the decode side of ``effects`` are then of the decode pool."""


__all__ = [
    "SCHEMA_VERSION",
    "AdaptiveAction",
    "AdaptiveUse",
    "BasisShare",
    "ClassUse",
    "Cost",
    "Counts",
    "DisaggregationReport",
    "Effects",
    "Energy",
    "Figure",
    "KernelUsed",
    "KvCapacity",
    "Latency",
    "LatencyStats",
    "LevelUse",
    "MemoryTerm",
    "PolicyOutcome",
    "PoolReport",
    "Provenance",
    "Quality",
    "QualityNote",
    "Report",
    "SpeculationOutcome",
    "TaskClass",
    "Throughput",
    "TierUse",
    "TiersUse",
    "TimeShare",
    "TransferReport",
]
