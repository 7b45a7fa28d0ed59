"""The question that a plan answers: one frozen value that command line, YAML file and dashboard build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from kvsim.compression import parse_compression
from kvsim.errors import UnknownName
from kvsim.report import TaskClass
from kvsim.scenario import Slo
from kvsim.specs.base import Spec
from kvsim.specs.engine import EngineSpec
from kvsim.specs.price import Price
from kvsim.specs.workload import WorkloadSpec
from kvsim.units import Bytes, UsdPerHour, Watts

TASK_CLASSES: Final[tuple[str, ...]] = tuple(name for name in get_args(TaskClass) if name != "unstated")
SHORT_NAMES: Final[Mapping[str, str]] = {
    "retrieval": "long-context retrieval",
    "understanding": "long-context understanding",
    "language": "language modelling",
}
"""Shorter spelling -> class of tasks."""

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


def task_class(name: str) -> str:
    """Class of tasks that ``name`` means; raise UnknownName for none."""
    plain = name.strip().lower().replace("_", " ").replace("-", " ")
    for known in (*TASK_CLASSES, *SHORT_NAMES):
        if known.replace("-", " ") == plain:
            return SHORT_NAMES.get(known, known)
    kind = "class of tasks"
    raise UnknownName(kind, name, (*TASK_CLASSES, *SHORT_NAMES))


def _named_floors(value: Any) -> Any:
    return {task_class(str(name)): share for name, share in value.items()} if isinstance(value, dict) else value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value


Floors = Annotated[dict[str, Share], BeforeValidator(_named_floors)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_many), Field(min_length=1)]


class Budget(Spec):
    """What a deployment may cost at most; None is no limit."""

    usd_per_hour: UsdPerHour | None = None
    """All devices together. A device without a price cannot be shown to be within it and is refused."""
    watts: Watts | None = None
    """TDP of all devices together. A device whose TDP no source states is refused."""
    device_memory: Bytes | None = None
    """Of one device: weights, what the engine takes for itself, and the KV pool."""
    sequence_kv: Bytes | None = None
    """KV of one sequence of the workload's mean lengths, on all devices that share it."""


class Search(Spec):
    """Where to look. None is the planner's own choice, which docs/plan.md states."""

    strategies: Names | None = None
    """Names of strategies; None builds them from all parts that kvsim has: each alone, and pairs of two parts."""
    also: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = ()
    """Names of further strategies beside those; one that only selects tokens is also tried with every encoding."""
    tensor_parallel_size: Counts | None = None
    replicas: Counts | None = None
    max_devices: Count | None = None
    """Most devices of one kind; None is 8, and 1 on phones and computers."""
    max_num_seqs: Counts | None = None
    max_num_batched_tokens: Counts | None = None
    gpu_memory_utilization: Annotated[tuple[Share, ...], BeforeValidator(_one_or_many), Field(min_length=1)] | None = (
        None
    )
    enable_chunked_prefill: tuple[bool, ...] | None = None
    block_size: Counts | None = None
    max_candidates: Count = 5000
    """Most candidates screened per device; every strategy is screened once whatever it says."""

    @model_validator(mode="after")
    def _known_strategies(self) -> Self:
        for name in (*(self.strategies or ()), *self.also):
            parse_compression(name)
        return self


class PlanRequest(Spec):
    """Which model, on which devices, under which load, within which limits.

    The smallest request is ``model``, ``devices`` and ``workload``.
    """

    model: str
    """Preset name, path of a ``config.json`` or its folder, or Hugging Face id."""
    devices: Names
    """Names or aliases of device specs."""
    workload: str | WorkloadSpec
    """Name of a workload preset, or an inline workload."""
    slo: Slo = Slo()
    """Held by the closed form's means when screening, and by 99th percentiles when simulating."""
    floors: Floors = Field(default_factory=dict)
    """Class of tasks to the least share of the uncompressed cache's published score."""
    unknown_quality: Literal["allow", "refuse"] = "allow"
    """Whether a strategy without a published score of a class with a floor stays, marked, or goes."""
    budget: Budget = Budget()
    search: Search = Search()
    engine: EngineSpec | None = None
    """Options that all candidates share; None is llama.cpp on phones and computers and vLLM elsewhere."""
    prices: tuple[Price, ...] = ()
    """Instead of the price list, for the devices that they name."""
    calibration: str = "default"
    seed: Annotated[int, Field(ge=0)] = 0
    simulate: Annotated[int, Field(ge=0, le=500)] = 16
    """How many points of the screen's Pareto set are simulated, for what only a simulation knows; 0 for none."""

    @model_validator(mode="after")
    def _each_device_once(self) -> Self:
        repeated = next((name for name in self.devices if self.devices.count(name) > 1), None)
        if repeated is not None:
            msg = f"devices: {repeated!r} stands there twice"
            raise ValueError(msg)
        return self
