"""Which ways of sharing a model over devices can be run, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator

from kvsim.errors import IncompatibleScenario
from kvsim.scenario import Scenario
from kvsim.specs.device import DeviceSpec
from kvsim.specs.model import ModelSpec


def check_parallelism(scenario: Scenario, model: ModelSpec, device: DeviceSpec) -> None:
    """Raise IncompatibleScenario naming the first field that does not fit the model, the device or another field."""
    reason = next(_reasons(scenario, model, device), None)
    if reason is not None:
        raise IncompatibleScenario(reason)


def _reasons(scenario: Scenario, model: ModelSpec, device: DeviceSpec) -> Iterator[str]:
    tensor, stages, data = (scenario.tensor_parallel_size, scenario.pipeline_parallel_size, scenario.data_parallel_size)
    in_step = data if model.moe is not None else 1
    if model.num_attention_heads % tensor:
        heads = model.num_attention_heads
        yield f"tensor_parallel_size: {tensor} does not divide the {heads} attention heads of {model.name}"
    if stages > model.num_layers:
        yield f"pipeline_parallel_size: {stages} stages are more than the {model.num_layers} layers of {model.name}"
    has_link = device.scale_up_link is not None or device.host_link is not None
    for field, ranks in (
        ("tensor_parallel_size", tensor),
        ("pipeline_parallel_size", stages),
        ("data_parallel_size", in_step),
    ):
        if ranks > 1 and not has_link:
            yield f"{field}: {ranks} needs a link between devices, and {device.name} has no figure for one"
    if scenario.enable_expert_parallel:
        yield from _expert_reasons(model, tensor * data, data)
    if in_step > 1 and stages > 1:
        yield (
            f"data_parallel_size: {data} ranks that share experts are not modelled together with "
            f"pipeline_parallel_size {stages}; use one of the two, or replicas"
        )
    engine = scenario.engine
    if engine.kind != "vllm" and (stages > 1 or in_step > 1):
        yield f"engine.kind: {engine.kind} is modelled with replicas and tensor_parallel_size, experts among them, only"
    if in_step > 1 and engine.all_kv_tiers:
        field = "kv_offloading_size" if engine.kv_offloading_size is not None else "kv_tiers"
        yield f"engine.{field}: not modelled for {data} data parallel ranks that share experts; leave it out"


def _expert_reasons(model: ModelSpec, ranks: int, data: int) -> Iterator[str]:
    if model.moe is None:
        yield f"enable_expert_parallel: {model.name} has no experts; leave it out"
    elif ranks > model.moe.num_experts:
        yield (
            f"enable_expert_parallel: {ranks} ranks (tensor_parallel_size x data_parallel_size {data}) are more than "
            f"the {model.moe.num_experts} experts of {model.name}"
        )
