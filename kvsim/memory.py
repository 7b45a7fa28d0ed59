"""Where a device's memory goes: weights, the engine's own, and the KV pool, with each engine's meaning of the fraction.

Sources: vLLM 0.15.1 ``determine_available_memory`` (utilisation x total - weights - profiled peak - non-torch memory);
llama.cpp takes what it needs and has no fraction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvsim.cost.priors import Edge, Prior, look_up
from kvsim.deployment import Deployment
from kvsim.errors import InfeasibleScenario, WeightsDoNotFit
from kvsim.parallelism import Parallelism
from kvsim.report import MemoryTerm
from kvsim.specs.base import Basis
from kvsim.specs.model import ModelSpec
from kvsim.units import format_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device (one rank of the largest stage)."""

    total_bytes: int
    usable_bytes: float
    budget_bytes: float
    """What the engine may use, by its own rule."""
    weight_bytes: float
    runtime_bytes: float
    pool_bytes: float
    block_bytes: int
    """One block of ``block_size`` tokens of a growing sequence, all layers."""
    num_blocks: int


def plan_memory(deployment: Deployment, block_bytes: int, edge: Edge = Edge.CENTRAL) -> MemoryPlan:
    """Divide a device's memory; raise WeightsDoNotFit where no block is left."""
    device, engine = deployment.device, deployment.engine
    usable = device.capacity_bytes * look_up(deployment.priors.usable_memory_fraction, device).efficiency(edge)
    weights = rank_weight_bytes(deployment.model, deployment.parallelism)
    runtime = runtime_prior(deployment).cost(edge)
    budget = usable * engine.gpu_memory_utilization if engine.kind == "vllm" else usable
    pool = float(engine.kv_cache_memory_bytes or budget - weights - runtime)
    if engine.num_gpu_blocks_override is not None:
        blocks = engine.num_gpu_blocks_override
        pool = float(blocks * block_bytes)
    else:
        blocks = int(pool // block_bytes) if pool > 0 else 0
    if weights + runtime + pool > usable * 1.0001 and pool > 0:
        msg = (
            f"{deployment.model.name} on {device.name}: a KV pool of {format_bytes(pool)} beside "
            f"{format_bytes(weights)} of weights exceeds the usable {format_bytes(usable)}; lower "
            "engine.num_gpu_blocks_override or engine.kv_cache_memory_bytes"
        )
        raise InfeasibleScenario(msg)
    if blocks < 1:
        raise WeightsDoNotFit(_no_room(deployment, usable, weights, runtime, budget))
    return MemoryPlan(device.capacity_bytes, usable, budget, weights, runtime, pool, block_bytes, blocks)


def rank_weight_bytes(model: ModelSpec, parallel: Parallelism) -> float:
    """Weights of one rank of the largest stage.

    Tensor parallel ranks slice everything. Experts are sliced over data parallel ranks as well, or whole on as many
    ranks; everything else is whole on each data parallel rank. Stages share embedding and LM head as they do layers.
    """
    share = parallel.stage_share(model.num_layers) / parallel.tensor
    if model.moe is None or (parallel.expert_ranks == parallel.tensor and not parallel.expert):
        return model.weight_bytes * share
    rest = (model.weight_bytes - model.expert_bytes) * share
    ranks = parallel.expert_ranks
    held = -(-model.moe.num_experts // ranks) / model.moe.num_experts if parallel.expert else 1.0 / ranks
    return rest + model.expert_bytes * held * parallel.stage_share(model.num_layers)


def plan_or(central: MemoryPlan, deployment: Deployment, edge: Edge) -> MemoryPlan:
    """The plan at an edge of the memory priors; the central one where nothing fits there."""
    try:
        return plan_memory(deployment, central.block_bytes, edge)
    except InfeasibleScenario:
        return central


def runtime_prior(deployment: Deployment) -> Prior:
    """Memory of the engine itself, by engine and model kind."""
    table = deployment.priors.runtime_memory_bytes
    if deployment.engine.kind == "llamacpp":
        return table["single_stream"]
    return table["moe" if deployment.model.moe else "dense"]


def _no_room(deployment: Deployment, usable: float, weights: float, runtime: float, budget: float) -> str:
    needed = weights + runtime
    parallel, ranks = deployment.parallelism, deployment.tensor_parallel_size
    enough = parallel
    while rank_weight_bytes(deployment.model, enough) + runtime > budget * 0.95 and enough.tensor < 1024:
        enough = replace(enough, tensor=2 * enough.tensor)
    more = enough.tensor > ranks
    hint = f"tensor_parallel_size: {enough.tensor} would hold the weights" if more else "choose a smaller model"
    return (
        f"{deployment.model.name} does not fit on {parallel.num_devices} x {deployment.device.name}: weights "
        f"{format_bytes(weights)} + engine {format_bytes(runtime)} = {format_bytes(needed)} per device, and the engine "
        f"may use {format_bytes(budget)} of {format_bytes(usable)}, so no KV block is left; {hint}, "
        "or quantised weights"
    )


def _weights_formula(deployment: Deployment) -> str:
    parallel, model = deployment.parallelism, deployment.model
    formula = f"parameters x bits / 8 / tensor_parallel_size ({parallel.tensor})"
    if parallel.pipeline > 1:
        formula += f" x {parallel.stage_layers(model.num_layers)} of {model.num_layers} layers"
    if model.moe is not None and parallel.expert:
        held = -(-model.moe.num_experts // parallel.expert_ranks)
        formula += f"; {held} of {model.moe.num_experts} experts, whole"
    elif parallel.data > 1:
        formula += f"; experts / {parallel.expert_ranks}"
    return formula


def waterfall(plan: MemoryPlan, deployment: Deployment) -> tuple[MemoryTerm, ...]:
    """Terms that add up to the device's memory."""
    fraction = deployment.engine.gpu_memory_utilization if deployment.engine.kind == "vllm" else 1.0
    spare = plan.usable_bytes - plan.weight_bytes - plan.runtime_bytes - plan.pool_bytes
    return (
        MemoryTerm(
            name="system",
            size_bytes=plan.total_bytes - plan.usable_bytes,
            basis=Basis.LITERATURE,
            formula="capacity x (1 - usable fraction of the device class)",
        ),
        MemoryTerm(
            name="weights",
            size_bytes=plan.weight_bytes,
            basis=Basis.DATASHEET,
            formula=_weights_formula(deployment),
        ),
        MemoryTerm(
            name="engine",
            size_bytes=plan.runtime_bytes,
            basis=Basis.LITERATURE,
            formula="activations at the profiling peak + non-torch memory",
        ),
        MemoryTerm(
            name="kv_pool",
            size_bytes=plan.pool_bytes,
            basis=Basis.LITERATURE,
            formula=f"{fraction:g} x usable - weights - engine",
        ),
        MemoryTerm(name="free", size_bytes=spare, basis=Basis.LITERATURE, formula="usable - all of the above"),
    )
