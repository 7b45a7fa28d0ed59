"""The question: one frozen value that CLI, YAML, dashboard, service and sweep all build."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Self

from pydantic import Field, model_validator

from kvsim import __version__
from kvsim.adaptive import Adaptive
from kvsim.compression import Compression, NamedCompression, parse_compression
from kvsim.errors import InvalidSpec, UnknownName
from kvsim.specs.base import Spec
from kvsim.specs.disaggregation import Disaggregation
from kvsim.specs.engine import EngineSpec
from kvsim.specs.price import Price
from kvsim.specs.routing import RouterThresholds, Routing
from kvsim.specs.workload import WorkloadSpec
from kvsim.units import Seconds


class Slo(Spec):
    """Service-level objectives; a request is good when it meets all that are set."""

    ttft_s: Seconds | None = None
    tpot_s: Seconds | None = None
    e2el_s: Seconds | None = None

    @property
    def is_set(self) -> bool:
        """Whether any objective is named."""
        return any(limit is not None for limit in (self.ttft_s, self.tpot_s, self.e2el_s))


ADAPTIVE = "adaptive"
"""Name of an adaptive scenario's own policy among strategies."""
STATIC = "static:"
"""``static:1`` is level 1 of an adaptive scenario, held throughout."""


class Scenario(Spec):
    """Which model, on which device, under which load, with which KV compression.

    The smallest scenario is ``model``, ``device`` and ``workload``; everything else has an engine's default.
    """

    model: str
    """Preset name, path of a ``config.json`` or its folder, or Hugging Face id."""
    device: str
    """Name or alias of a device spec."""
    workload: str | WorkloadSpec
    """Name of a workload preset, or an inline workload."""
    compression: NamedCompression = Compression()
    """A strategy's name (``fp8``, ``snapkv+kivi-2``), or selection and encoding with their parameters."""
    adaptive: Adaptive | None = None
    """Several compressions between which a policy chooses during the run, instead of ``compression``."""
    engine: EngineSpec = EngineSpec()
    tensor_parallel_size: Annotated[int, Field(gt=0)] = 1
    pipeline_parallel_size: Annotated[int, Field(gt=0)] = 1
    """Stages of consecutive layers, each on its own devices."""
    data_parallel_size: Annotated[int, Field(gt=0)] = 1
    """Ranks with their own sequences and KV pool. They share the experts of a model that has them, and run in step;
    of a dense model each is a replica."""
    enable_expert_parallel: bool = False
    """Keep experts whole, spread over tensor and data parallel ranks, instead of slicing each of them."""
    replicas: Annotated[int, Field(gt=0)] = 1
    calibration: str = "default"
    """Fitted kernels that the cost model uses: the shipped set ``default`` or another by name, one's own set by the
    path of its YAML file, or ``datasheet`` for none. Devices that a set lacks are priced from their datasheet."""
    routing: Routing = "round_robin"
    router: RouterThresholds = RouterThresholds()
    """Thresholds of ``prefix_aware`` routing."""
    disaggregation: Disaggregation | None = None
    """Prompts and decoding on pools of their own, in place of ``replicas``."""
    slo: Slo = Slo()
    price: Price | None = None
    """Overrides the price list."""
    seed: Annotated[int, Field(ge=0)] = 0
    bands: bool = True
    """Also simulate the optimistic and the pessimistic edge of every estimate, for the report's bands."""

    @model_validator(mode="after")
    def _one_way_to_compress(self) -> Self:
        if self.adaptive is not None and self.compression != Compression():
            msg = "compression and adaptive exclude each other: name the compression as one of adaptive.levels"
            raise ValueError(msg)
        return self

    @property
    def strategy(self) -> str:
        """Name of what compresses: a strategy's, ``adaptive``, or the strategy of the only level that it may choose."""
        if self.adaptive is None:
            return self.compression.name
        level = self.adaptive.only_level
        return ADAPTIVE if level is None else self.adaptive.levels[level].name

    def with_strategy(self, name: str) -> Scenario:
        """The same question of another strategy: by its name, ``adaptive``, or ``static:`` and a level.

        Raises
        ------
        UnknownName, InvalidSpec
            There is no such strategy or level.
        """
        if name != ADAPTIVE and not name.startswith(STATIC):
            return self.model_copy(update={"compression": parse_compression(name), "adaptive": None})
        if self.adaptive is None:
            msg = f"strategy {name!r} needs a scenario with adaptive levels"
            raise InvalidSpec(msg)
        if name == ADAPTIVE:
            return self.model_copy(update={"adaptive": self.adaptive.model_copy(update={"baselines": False})})
        known = [f"{STATIC}{level}" for level in range(len(self.adaptive.levels))]
        if name not in known:
            kind = "level"
            raise UnknownName(kind, name, known)
        held = self.adaptive.held_at(int(name.removeprefix(STATIC)))
        return self.model_copy(update={"adaptive": held})

    @property
    def num_devices(self) -> int:
        """Devices of all replicas and pools."""
        others = self.pipeline_parallel_size * self.data_parallel_size
        if self.disaggregation is None:
            return self.tensor_parallel_size * others * self.replicas
        pools = (self.disaggregation.prefill, self.disaggregation.decode)
        return others * sum(pool.replicas * (pool.tensor_parallel_size or self.tensor_parallel_size) for pool in pools)

    def fingerprint(self) -> str:
        """Hash of the canonical scenario and kvsim's version; equal scenarios give equal reports."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{__version__}\n{canonical}".encode()).hexdigest()
