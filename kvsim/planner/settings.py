"""Engine settings and layouts that a plan tries on one device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from kvsim.errors import IncompatibleScenario, InvalidSpec
from kvsim.parallel_checks import check_parallelism
from kvsim.planner.request import PlanRequest, Search
from kvsim.scenario import Scenario
from kvsim.specs.device import DeviceSpec
from kvsim.specs.engine import EngineSpec
from kvsim.specs.engine_options import OWNERS
from kvsim.specs.model import ModelSpec

SMALL_KINDS: Final = ("edge", "mobile")
"""Devices that one person uses: llama.cpp, and one of them, unless the request says otherwise."""
SERVER_DEVICES: Final = 8
SERVER_SETTINGS: Final[dict[str, tuple[Any, ...]]] = {
    "max_num_seqs": (256, 64, 1024),
    "max_num_batched_tokens": (8192, 2048),
    "gpu_memory_utilization": (0.92, 0.95),
}
SMALL_SETTINGS: Final[dict[str, tuple[Any, ...]]] = {
    "max_num_seqs": (1, 2, 4, 8),
    "max_num_batched_tokens": (2048, 512),
}
AXES: Final = (
    "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "enable_chunked_prefill", "block_size",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How many devices share a replica, and how many replicas there are."""

    tensor_parallel_size: int
    replicas: int


@dataclass(frozen=True)
class SettingSpace:
    """Layouts and engines to try on a device; the first of each is where every strategy is tried."""

    layouts: tuple[Layout, ...]
    engines: tuple[EngineSpec, ...]
    refused: tuple[str, ...]
    """Why some settings are no engine, each once."""


def base_engine(request: PlanRequest, device: DeviceSpec) -> EngineSpec:
    """Options that all candidates on a device share."""
    if request.engine is not None:
        return request.engine
    kind = "llamacpp" if device.kind in SMALL_KINDS else "vllm"
    return EngineSpec.model_validate({"kind": kind})


def setting_space(request: PlanRequest, scenario: Scenario, model: ModelSpec, device: DeviceSpec) -> SettingSpace:
    """Every combination of settings that the device's engine has, and every layout that the model and links allow."""
    refused: dict[str, None] = {}
    layouts = tuple(_layouts(request.search, scenario, model, device, refused))
    engines = tuple(_engines(request, device, refused))
    return SettingSpace(layouts, engines, tuple(refused))


def _layouts(
    search: Search, scenario: Scenario, model: ModelSpec, device: DeviceSpec, refused: dict[str, None]
) -> Iterator[Layout]:
    most = search.max_devices or (1 if device.kind in SMALL_KINDS else SERVER_DEVICES)
    domain = device.scale_up_domain.value if device.scale_up_domain is not None else most
    for ranks in search.tensor_parallel_size or _powers(min(most, domain)):
        try:
            check_parallelism(scenario.model_copy(update={"tensor_parallel_size": ranks}), model, device)
        except IncompatibleScenario as error:
            refused[str(error)] = None
            continue
        for replicas in search.replicas or _powers(most // ranks):
            if ranks * replicas <= most:
                yield Layout(ranks, replicas)


def _powers(most: int) -> tuple[int, ...]:
    return tuple(2**power for power in range(most.bit_length())) if most else ()


def _engines(request: PlanRequest, device: DeviceSpec, refused: dict[str, None]) -> Iterator[EngineSpec]:
    base = base_engine(request, device)
    usual = EngineSpec.model_validate({"kind": base.kind})
    given = {name: value for name, value in base if name != "kind" and value != getattr(usual, name)}
    own = SMALL_SETTINGS if base.kind == "llamacpp" else SERVER_SETTINGS
    axes: dict[str, tuple[Any, ...]] = {}
    for name in AXES:
        asked = getattr(request.search, name)
        if asked is None and base.kind not in OWNERS.get(name, (base.kind,)):
            continue
        # What the request's engine states is not varied, unless the search says so itself.
        axes[name] = asked or ((getattr(base, name),) if name in given else own.get(name, (getattr(base, name),)))
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        reason = _too_few_tokens(base.kind, chosen)
        try:
            if reason is None:
                yield EngineSpec.model_validate({"kind": base.kind, **given, **chosen})
        except ValueError as error:
            reason = str(error).splitlines()[-1]
        if reason is not None:
            refused[reason] = None


def _too_few_tokens(kind: str, chosen: dict[str, Any]) -> str | None:
    sequences, tokens = chosen["max_num_seqs"], chosen["max_num_batched_tokens"]
    if kind == "sglang" or tokens >= sequences:
        return None
    return f"max_num_batched_tokens {tokens} is less than max_num_seqs {sequences}"


def check_settings(request: PlanRequest, device: DeviceSpec, space: SettingSpace) -> None:
    """Raise InvalidSpec where nothing is left to try on a device."""
    if not space.layouts:
        why = f": {space.refused[0]}" if space.refused else ""
        msg = f"search: no layout of {request.model} on {device.name} is left{why}"
        raise InvalidSpec(msg)
    if not space.engines:
        msg = f"search: no engine setting is left for {device.name}: {space.refused[0]}"
        raise InvalidSpec(msg)
