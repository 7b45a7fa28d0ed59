"""Where a device's memory goes: weights, the engine's own, and the KV pool, with each engine's meaning of the fraction.

vLLM (0.15.1 ``determine_available_memory``)
    pool = ``gpu_memory_utilization`` x total - weights - profiled peak - non-torch memory (- CUDA graphs since 0.21).
SGLang (docs, hyperparameter tuning)
    ``mem_fraction_static`` = (weights + pool) / capacity; activations and graphs take from the rest.
TensorRT-LLM (docs, ``KvCacheConfig``)
    pool = ``free_gpu_memory_fraction`` x what weights and buffers leave free.
llama.cpp (``llama-context.cpp``)
    ``ctx_size`` cells, divided among slots (``max_num_seqs``); no fraction. Without ``ctx_size``: all that is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvsim.cost.priors import Edge, look_up
from kvsim.deployment import Deployment
from kvsim.engine_memory import EngineTerm, engine_terms, rank_weight_bytes
from kvsim.errors import InfeasibleScenario, WeightsDoNotFit
from kvsim.pool import prompt_bytes
from kvsim.report import MemoryTerm
from kvsim.specs.base import Basis
from kvsim.units import format_bytes

SGLANG_FRACTION = 0.88
"""SGLang's fallback; on a GPU that it knows it derives a share near this one from chunk and graph sizes."""
TENSORRT_LLM_FRACTION = 0.9
ROUNDING = 1.0001


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device (one rank of the largest stage)."""

    total_bytes: int
    usable_bytes: float
    budget_bytes: float
    """What the engine may use, by its own rule."""
    terms: tuple[EngineTerm, ...]
    """Weights first, then what the engine takes for itself."""
    pool_bytes: float
    block_bytes: int
    """One block of ``block_size`` tokens of a growing sequence, all layers."""
    num_blocks: int

    @property
    def weight_bytes(self) -> float:
        """Weights of one rank."""
        return self.terms[0].size_bytes

    @property
    def runtime_bytes(self) -> float:
        """Everything of the engine's that is neither weights nor KV."""
        return sum(term.size_bytes for term in self.terms[1:])


def plan_memory(deployment: Deployment, block_bytes: int, edge: Edge = Edge.CENTRAL) -> MemoryPlan:
    """Divide a device's memory; raise WeightsDoNotFit where no block is left."""
    device, engine = deployment.device, deployment.engine
    usable = device.capacity_bytes * look_up(deployment.priors.usable_memory_fraction, device).efficiency(edge)
    terms = engine_terms(deployment, edge)
    taken = sum(term.size_bytes for term in terms)
    budget, pool = _budget_and_pool(deployment, usable, terms)
    blocks = int(pool // block_bytes) if pool > 0 else 0
    if engine.num_gpu_blocks_override is not None:
        blocks = engine.num_gpu_blocks_override
        pool = float(blocks * block_bytes)
    if taken + pool > usable * ROUNDING and pool > 0:
        raise InfeasibleScenario(_too_large(deployment, usable, terms, pool))
    if blocks < 1:
        if engine.kv_cache_memory_bytes is not None:
            msg = (
                f"engine.kv_cache_memory_bytes: {format_bytes(engine.kv_cache_memory_bytes)} is less than one KV block "
                f"of {format_bytes(block_bytes)}, all layers of {engine.block_size} tokens; give more, or leave it out"
            )
            raise InfeasibleScenario(msg)
        raise WeightsDoNotFit(_no_room(deployment, usable, terms, budget))
    return MemoryPlan(device.capacity_bytes, usable, budget, terms, pool, block_bytes, blocks)


def _budget_and_pool(deployment: Deployment, usable: float, terms: tuple[EngineTerm, ...]) -> tuple[float, float]:
    """What the engine may use and what is left of it for KV, by the engine's own rule."""
    engine = deployment.engine
    weights, taken = terms[0].size_bytes, sum(term.size_bytes for term in terms)
    if engine.kind == "vllm":
        budget = usable * engine.gpu_memory_utilization
        if engine.kv_cache_memory_bytes is not None:
            return budget, float(engine.kv_cache_memory_bytes)
        return budget, budget - taken
    if engine.kind == "sglang":
        budget = usable * (engine.mem_fraction_static or SGLANG_FRACTION)
        return budget, budget - weights
    if engine.kind == "tensorrt_llm":
        fraction = engine.free_gpu_memory_fraction or TENSORRT_LLM_FRACTION
        return usable, fraction * (usable - taken)
    if engine.ctx_size is not None:
        slots = engine.max_num_seqs
        return usable, float(slots * prompt_bytes(deployment, engine.ctx_size // slots))
    return usable, usable - taken


def plan_or(central: MemoryPlan, deployment: Deployment, edge: Edge) -> MemoryPlan:
    """The plan at an edge of the memory priors; the central one where nothing fits there."""
    try:
        return plan_memory(deployment, central.block_bytes, edge)
    except InfeasibleScenario:
        return central


def slot_tokens(deployment: Deployment) -> int | None:
    """Longest sequence that one slot of llama.cpp holds; None where slots do not limit."""
    engine = deployment.engine
    return None if engine.ctx_size is None else engine.ctx_size // engine.max_num_seqs


def _too_large(deployment: Deployment, usable: float, terms: tuple[EngineTerm, ...], pool: float) -> str:
    advice = {
        "vllm": "lower engine.num_gpu_blocks_override or engine.kv_cache_memory_bytes",
        "sglang": "lower engine.mem_fraction_static, which leaves activations what it does not take",
        "tensorrt_llm": "lower engine.free_gpu_memory_fraction",
        "llamacpp": "lower engine.ctx_size",
    }[deployment.engine.kind]
    taken = " + ".join(f"{term.name} {format_bytes(term.size_bytes)}" for term in terms)
    return (
        f"{deployment.model.name} on {deployment.device.name}: a KV pool of {format_bytes(pool)} beside {taken} "
        f"exceeds the usable {format_bytes(usable)}; {advice}"
    )


def _no_room(deployment: Deployment, usable: float, terms: tuple[EngineTerm, ...], budget: float) -> str:
    weights, taken = terms[0].size_bytes, sum(term.size_bytes for term in terms)
    runtime = taken - weights
    advice = _larger_share(deployment, taken, usable) or _more_ranks(deployment, runtime, budget)
    return (
        f"{deployment.model.name} does not fit on {deployment.parallelism.num_devices} x {deployment.device.name}: "
        f"weights {format_bytes(weights)} + engine {format_bytes(runtime)} = {format_bytes(taken)} per device, and the "
        f"engine may use {format_bytes(budget)} of {format_bytes(usable)}, so no KV block is left; "
        f"{advice}, or take quantised weights"
    )


def _larger_share(deployment: Deployment, taken: float, usable: float) -> str | None:
    """The engine's share to raise, where weights and engine are well within the device; None where they are not."""
    share = {"vllm": "gpu_memory_utilization", "sglang": "mem_fraction_static"}.get(deployment.engine.kind)
    return f"raise engine.{share}" if share is not None and taken < usable * 0.9 else None


def _more_ranks(deployment: Deployment, runtime: float, budget: float) -> str:
    """The tensor parallel size to take instead: one that divides the heads, on devices that have a link."""
    enough, device = replace(deployment.parallelism, tensor=2 * deployment.tensor_parallel_size), deployment.device
    has_link = device.scale_up_link is not None or device.host_link is not None
    while has_link and deployment.model.num_attention_heads % enough.tensor == 0:
        if rank_weight_bytes(deployment.model, enough) + runtime <= budget * 0.95:
            return f"tensor_parallel_size: {enough.tensor} would hold the weights"
        enough = replace(enough, tensor=2 * enough.tensor)
    return "choose a smaller model"


def waterfall(plan: MemoryPlan, deployment: Deployment) -> tuple[MemoryTerm, ...]:
    """Terms that add up to the device's memory."""
    spare = plan.usable_bytes - plan.weight_bytes - plan.runtime_bytes - plan.pool_bytes
    system = MemoryTerm(
        name="system",
        size_bytes=plan.total_bytes - plan.usable_bytes,
        basis=Basis.LITERATURE,
        formula="capacity x (1 - usable fraction of the device or its class)",
    )
    engine = [
        MemoryTerm(name=term.name, size_bytes=term.size_bytes, basis=term.basis, formula=term.formula)
        for term in plan.terms
    ]
    pool = MemoryTerm(
        name="kv_pool", size_bytes=plan.pool_bytes, basis=Basis.LITERATURE, formula=_pool_formula(deployment)
    )
    free = MemoryTerm(name="free", size_bytes=spare, basis=Basis.LITERATURE, formula="usable - all of the above")
    return system, *engine, pool, free


def _pool_formula(deployment: Deployment) -> str:
    engine = deployment.engine
    if engine.num_gpu_blocks_override is not None:
        return f"num_gpu_blocks_override ({engine.num_gpu_blocks_override}) x block"
    if engine.kv_cache_memory_bytes is not None:
        return "kv_cache_memory_bytes"
    slots = engine.max_num_seqs
    return {
        "vllm": f"gpu_memory_utilization ({engine.gpu_memory_utilization:g}) x usable - weights - engine's terms",
        "sglang": f"mem_fraction_static ({engine.mem_fraction_static or SGLANG_FRACTION:g}) x usable - weights",
        "tensorrt_llm": f"free_gpu_memory_fraction ({engine.free_gpu_memory_fraction or TENSORRT_LLM_FRACTION:g}) "
        "x (usable - weights - engine's terms)",
        "llamacpp": f"{slots} slots of {engine.ctx_size // slots} tokens" if engine.ctx_size else "all that is left",
    }[engine.kind]
