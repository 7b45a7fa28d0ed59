"""Every term of one prefill and one decode step, with its formula, its band and where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvsim.closed_form import prefill_split, variable_ticks
from kvsim.cost.estimator import all_reduce_seconds, gemm_seconds
from kvsim.cost.priors import Edge, PriorTable, look_up
from kvsim.cost.rates import build_rates
from kvsim.cost.shapes import Gemm, forward_gemms, lm_head
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.memory import MemoryPlan, plan_memory, waterfall
from kvsim.ops import Component
from kvsim.specs.base import DTYPE_BITS, Basis, Dtype
from kvsim.units import TICKS_PER_SECOND

Phase = Literal["memory", "prefill", "decode"]
EDGES = (Edge.CENTRAL, Edge.OPTIMISTIC, Edge.PESSIMISTIC)


@dataclass(frozen=True)
class Term:
    """One addend of memory or time; values in SI units."""

    phase: Phase
    name: str
    formula: str
    value: float
    unit: str
    low: float | None
    high: float | None
    basis: Basis
    source: str


@dataclass(frozen=True)
class Explanation:
    """All terms of one deployment at a stated prompt, batch and context."""

    title: str
    terms: tuple[Term, ...]
    notes: tuple[str, ...]


def explain_deployment(
    deployment: Deployment, plan: MemoryPlan, prompt_tokens: int, generated_tokens: int, batch: int
) -> Explanation:
    """List memory, the prefill of one prompt and one decode step of ``batch`` such sequences."""
    steps = [StepModel(deployment, build_rates(deployment.device, deployment.priors, edge)) for edge in EDGES]
    context = prompt_tokens + generated_tokens
    return Explanation(
        title=(
            f"{deployment.model.name} on {deployment.tensor_parallel_size} x {deployment.device.name}, "
            f"{deployment.compression.name}: prompt of {prompt_tokens} tokens; decode batch {batch} at {context} tokens"
        ),
        terms=(
            *_memory_terms(deployment, plan),
            *_prefill_terms(deployment, steps, prompt_tokens),
            *_decode_terms(deployment, steps, prompt_tokens, generated_tokens, batch),
        ),
        notes=deployment.notes,
    )


def _memory_terms(deployment: Deployment, plan: MemoryPlan) -> list[Term]:
    edges = []
    for edge in EDGES:
        priced = plan if edge is Edge.CENTRAL else _plan_or_central(deployment, plan, edge)
        edges.append({term.name: term.size_bytes for term in waterfall(priced, deployment)})
    sources = {
        "system": _source(deployment, deployment.priors.usable_memory_fraction),
        "weights": deployment.model.source,
        "engine": deployment.priors.runtime_memory_bytes["moe" if deployment.model.moe else "dense"].source,
        "kv_pool": "difference of the terms above",
        "free": "difference of the terms above",
    }
    return [
        Term(
            "memory",
            term.name,
            term.formula,
            term.size_bytes,
            "bytes",
            min(edge[term.name] for edge in edges),
            max(edge[term.name] for edge in edges),
            term.basis,
            sources[term.name],
        )
        for term in waterfall(plan, deployment)
    ]


def _plan_or_central(deployment: Deployment, plan: MemoryPlan, edge: Edge) -> MemoryPlan:
    from kvsim.errors import InfeasibleScenario

    try:
        return plan_memory(deployment, plan.block_bytes, edge)
    except InfeasibleScenario:
        return plan


def _prefill_terms(deployment: Deployment, steps: list[StepModel], prompt_tokens: int) -> list[Term]:
    splits = [prefill_split(step, prompt_tokens) for step in steps]
    priors = deployment.priors
    rows = {
        Component.WEIGHTS: ("linear layers: launch + max(bytes moved, FLOPs)", priors.matmul_efficiency),
        Component.ATTENTION: (
            "2·heads·(k+v dim)·query-key pairs / (peak · plateau · n/(n + n_half)) + launch",
            priors.prefill_attention_efficiency,
        ),
        Component.COMPRESSION: ("quantise new tokens, unpack earlier chunks, score and compact", None),
        Component.COMMUNICATION: ("2 all-reduces a layer: latency + 2(r-1)/r·bytes/link", priors.link_efficiency),
        Component.OVERHEAD: ("4 elementwise kernels a layer: launch + bytes/bandwidth", priors.elementwise_launch_s),
    }
    terms = []
    for component, (formula, table) in rows.items():
        values = [split[component] for split in splits]
        basis = Basis.LITERATURE if component is Component.COMPRESSION else Basis.DATASHEET
        source = _source(deployment, table) if table is not None else _compression_source(deployment)
        terms.append(_term("prefill", component.value, formula, values, basis, source))
    return terms


def _decode_terms(
    deployment: Deployment, steps: list[StepModel], prompt_tokens: int, generated_tokens: int, batch: int
) -> list[Term]:
    priors, ranks = deployment.priors, deployment.tensor_parallel_size
    terms = []
    for gemm in (*forward_gemms(deployment.model, ranks), lm_head(deployment.model, ranks)):
        values = [_gemm(step, gemm, batch) for step in steps]
        formula = f"{gemm.count} x (launch + max(weights+activations/BW, 2·{batch}·{gemm.k}·{gemm.n} FLOPs))"
        source = _source(deployment, priors.weight_streaming_efficiency)
        terms.append(_term("decode", gemm.name, formula, values, Basis.DATASHEET, source))

    def add(
        name: str, formula: str, read: Callable[[StepModel], float], basis: Basis, source: str, *, always: bool = True
    ) -> None:
        values = [read(step) for step in steps]
        if always or values[0]:
            terms.append(_term("decode", name, formula, values, basis, source))

    def variable(step: StepModel, *, unpack: bool) -> float:
        whole, part = variable_ticks(step, prompt_tokens, generated_tokens)
        return batch * (part if unpack else whole - part) / TICKS_PER_SECOND

    hidden_bytes = batch * deployment.model.hidden_size * DTYPE_BITS[deployment.model.dtype] / 8
    layers = deployment.model.num_layers
    add(
        "attention floor",
        "layers x (launch + batch x per-sequence)",
        lambda step: float(step.decode_fixed_seconds(batch)[0][0]),
        Basis.DATASHEET,
        _source(deployment, priors.attention_launch_s),
    )
    add(
        "attention over KV",
        "attended tokens x layers x max(bytes/BW, FLOPs/rate)",
        lambda step: variable(step, unpack=False),
        Basis.DATASHEET,
        _source(deployment, priors.streaming_efficiency),
    )
    add(
        "unpacking KV",
        "attended tokens x layers x (smooth max with elements/unpack rate - the above)",
        lambda step: variable(step, unpack=True),
        Basis.LITERATURE,
        _compression_source(deployment),
        always=False,
    )
    add(
        "encoding new tokens",
        "quantise, rotate or project one token a sequence, and rotate queries",
        lambda step: float(step.decode_fixed_seconds(batch)[1][0]),
        Basis.LITERATURE,
        _source(deployment, priors.vector_efficiency),
        always=False,
    )
    add(
        "all-reduce",
        "2 x layers x (latency + 2(r-1)/r·bytes/link)",
        lambda step: float(2 * layers * all_reduce_seconds(hidden_bytes, ranks, step.rates)),
        Basis.DATASHEET,
        _source(deployment, priors.link_efficiency),
        always=False,
    )
    add(
        "elementwise",
        "4 kernels a layer: launch + bytes/BW",
        lambda step: float(step.token_terms(batch).overhead_s[0]),
        Basis.DATASHEET,
        _source(deployment, priors.elementwise_launch_s),
    )
    return terms


def _gemm(step: StepModel, gemm: Gemm, batch: int) -> float:
    model = step.deployment.model
    if gemm.name == "lm_head":
        return float(step.head_seconds(batch)[0])
    compute = model.weight_dtype if step.rates.device.supports(model.weight_dtype) else Dtype.BF16
    rows = float(step.padded(batch))
    return float(gemm_seconds(gemm, rows, step.rates, weight_bits=model.weight_bits, compute=compute))


def _term(phase: Phase, name: str, formula: str, values: list[float], basis: Basis, source: str) -> Term:
    return Term(phase, name, formula, values[0], "s", min(values), max(values), basis, source)


def _source(deployment: Deployment, table: PriorTable) -> str:
    return look_up(table, deployment.device).source


def _compression_source(deployment: Deployment) -> str:
    for layer_class in deployment.layer_classes:
        family = layer_class.encoding.unpack_family
        if family is not None:
            return _source(deployment, deployment.priors.unpack_ops_per_element[family])
    return "bytes and FLOPs of the method over the device's rates"
