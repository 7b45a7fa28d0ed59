"""Every term of one prefill and one decode step, with its formula, its band and where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvsim.closed_form import prefill_split, variable_ticks
from kvsim.cost.basis import DECODE, component_basis, kernel_notes, pricings, weakest
from kvsim.cost.calibrated import CalibratedGemm
from kvsim.cost.estimator import PricedGemm
from kvsim.cost.priors import EDGES, PriorTable, look_up
from kvsim.cost.projection import DecodeKernel, attention_kernels
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.memory import MemoryPlan, plan_or, waterfall
from kvsim.ops import Component
from kvsim.specs.base import Basis
from kvsim.units import TICKS_PER_SECOND

Phase = Literal["memory", "prefill", "decode", "transfer"]


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
            f"{deployment.model.name} on {deployment.parallelism.num_devices} x {deployment.device.name}, "
            f"{deployment.compression.name}: prompt of {prompt_tokens} tokens; decode batch {batch} at {context} tokens"
        ),
        terms=(
            *_memory_terms(deployment, plan),
            *_prefill_terms(deployment, steps, prompt_tokens),
            *_decode_terms(deployment, steps, prompt_tokens, generated_tokens, batch),
        ),
        notes=(*deployment.notes, *kernel_notes(deployment)),
    )


def _memory_terms(deployment: Deployment, plan: MemoryPlan) -> list[Term]:
    plans = [plan, *(plan_or(plan, deployment, edge) for edge in EDGES[1:])]
    edges = [{term.name: term.size_bytes for term in waterfall(priced, deployment)} for priced in plans]
    sources = {
        "system": _source(deployment, deployment.priors.usable_memory_fraction),
        **{term.name: term.source for term in plan.terms},
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


def _prefill_terms(deployment: Deployment, steps: list[StepModel], prompt_tokens: int) -> list[Term]:
    splits = [prefill_split(step, prompt_tokens) for step in steps]
    priors = deployment.priors
    rows = {
        Component.WEIGHTS: ("linear layers: launch + smooth max(bytes moved/BW, FLOPs/rate)", priors.matmul_efficiency),
        Component.ATTENTION: (
            "2·heads·(k+v dim)·query-key pairs / (peak · plateau · n/(n + n_half)) + launch",
            priors.prefill_attention_efficiency,
        ),
        Component.COMPRESSION: ("quantise new tokens, unpack earlier chunks, score and compact", None),
        Component.COMMUNICATION: (_collectives_formula(deployment), _link_prior(deployment)),
        Component.OVERHEAD: ("4 elementwise kernels a layer: launch + bytes/bandwidth", priors.elementwise_launch_s),
    }
    terms = []
    bases = component_basis(deployment)
    for component, (formula, table) in rows.items():
        values = [split[component] for split in splits]
        source = _source(deployment, table) if table is not None else _compression_source(deployment)
        fitted = _fitted_source(deployment, component)
        if fitted:
            source = f"{fitted}; priors: {source}"
        shown = f"fitted kernels, and where none is: {formula}" if fitted else formula
        terms.append(_term("prefill", component.value, shown, values, bases[component], source))
    return terms


def _fitted_source(deployment: Deployment, component: Component) -> str:
    """Name the fitted kernels of a component's prefill; empty where priors price all of it."""
    used = (one.kernel for one in pricings(deployment) if one.component is component and one.operation != DECODE)
    return "; ".join(kernel.source for kernel in dict.fromkeys(used) if kernel is not None)


def _decode_terms(
    deployment: Deployment, steps: list[StepModel], prompt_tokens: int, generated_tokens: int, batch: int
) -> list[Term]:
    priors, parallel = deployment.priors, deployment.parallelism
    whole_batch, factor, batch = batch, parallel.lane_factor(batch), parallel.sequences_per_lane(batch)
    terms = _gemm_terms(deployment, steps, batch)

    def add(
        name: str, formula: str, read: Callable[[StepModel], float], basis: Basis, source: str, *, always: bool = True
    ) -> None:
        values = [read(step) for step in steps]
        if always or values[0]:
            terms.append(_term("decode", name, formula, values, basis, source))

    def variable(step: StepModel, *, unpack: bool) -> float:
        whole, part = variable_ticks(step, prompt_tokens, generated_tokens)
        return whole_batch * factor * (part if unpack else whole - part) / TICKS_PER_SECOND

    has_experts = deployment.model.moe is not None and deployment.engine_fit is None
    floors = [kernels.floor for kernels in attention_kernels(deployment)]
    caches = [kernels.decode for kernels in attention_kernels(deployment)]
    add(
        "attention floor",
        "layers x (launch + batch x per-sequence)",
        lambda step: float(step.decode_fixed_seconds(batch)[0]),
        *_decode_source(floors, _source(deployment, priors.attention_launch_s), Basis.DATASHEET),
    )
    add(
        "attention over KV",
        "attended tokens x layers x max(bytes/BW, FLOPs/rate)",
        lambda step: variable(step, unpack=False),
        *_decode_source(caches, _source(deployment, priors.streaming_efficiency), _estimated_basis(deployment)),
    )
    scores_anew = _scores_anew(deployment)
    add(
        "unpacking KV, scoring tokens" if scores_anew else "unpacking KV",
        "attended tokens x layers x (smooth max with elements/unpack rate - the above"
        + (" + query times keys once more)" if scores_anew else ")"),
        lambda step: variable(step, unpack=True),
        *_decode_source([*caches, None] if scores_anew else caches, _compression_source(deployment), Basis.LITERATURE),
        always=False,
    )
    add(
        "encoding new tokens",
        "quantise, rotate or project one token a sequence, and rotate queries",
        lambda step: float(step.decode_fixed_seconds(batch)[1]),
        Basis.LITERATURE,
        _source(deployment, priors.vector_efficiency),
        always=False,
    )
    add(
        "collectives",
        _collectives_formula(deployment),
        lambda step: float(step.token_terms(batch).communication_s),
        component_basis(deployment)[Component.COMMUNICATION],
        _fitted_source(deployment, Component.COMMUNICATION) or _source(deployment, _link_prior(deployment)),
        always=False,
    )
    add(
        "gathering logits",
        "latency + (r-1)/r·sequences·vocabulary·2 B/link",
        lambda step: float(step.gather_seconds(batch)),
        Basis.DATASHEET,
        _source(deployment, priors.gather_latency_s),
        always=False,
    )
    add(
        "sampling",
        _sampling_formula(deployment),
        lambda step: float(step.sampling_seconds(batch)),
        Basis.LITERATURE if deployment.sampling.truncates else Basis.DATASHEET,
        _source(deployment, priors.vocabulary_sort_s if deployment.sampling.truncates else priors.elementwise_launch_s),
        always=False,
    )
    add(
        "elementwise",
        "4 kernels a layer: launch + bytes/BW"
        + (", and per MoE layer what is around its products" if has_experts else ""),
        lambda step: float(step.token_terms(batch).overhead_s),
        component_basis(deployment)[Component.OVERHEAD],
        _source(deployment, priors.elementwise_launch_s)
        + (f"; {_source(deployment, priors.moe_layer_s)}" if has_experts else ""),
    )
    return terms


def _collectives_formula(deployment: Deployment) -> str:
    """What ranks exchange in one turn."""
    parallel = deployment.parallelism
    parts = ["all-reduces a step x (latency + 2(r-1)/r·bytes/link)"] if parallel.tensor > 1 else []
    if parallel.data > 1:
        backend = deployment.engine.all2all_backend
        parts.append(f"a dispatch and a combine per MoE layer over {parallel.data} ranks ({backend})")
    if parallel.pipeline > 1:
        parts.append(f"{parallel.pipeline} sends of hidden states and residual")
    return " + ".join(parts) or "one rank exchanges nothing"


def _sampling_formula(deployment: Deployment) -> str:
    """How tokens are drawn, with what."""
    sampling = deployment.sampling
    if sampling.is_greedy:
        known = "greedy" if sampling.temperature is not None else "greedy, as nothing else is stated"
        return f"{known}: cast to fp32, largest logit: launches + sequences·vocabulary·bytes/BW"
    stated = ", ".join(f"{name} {value:g}" for name, value in sampling.model_dump(exclude_none=True).items())
    how = "sorting the vocabulary" if sampling.truncates and not deployment.engine.use_flashinfer_sampler else "no sort"
    return f"{stated}: scale, softmax, draw; {how}"


def _gemm_terms(deployment: Deployment, steps: list[StepModel], batch: int) -> list[Term]:
    """Linear layers, over the rows that a captured step really has, and the LM head over the sequences alone."""
    rows = int(steps[0].padded(batch))
    terms = []
    for index, gemm in enumerate(steps[0].gemms):
        values = [float(step.gemms[index].seconds(rows)) for step in steps]
        terms.append(_gemm_term(deployment, gemm, rows, values))
    head = [float(step.head_seconds(batch)) for step in steps]
    return [*terms, _gemm_term(deployment, steps[0].head, batch, head)]


def _gemm_term(deployment: Deployment, priced: PricedGemm | CalibratedGemm, rows: int, values: list[float]) -> Term:
    gemm = priced.gemm
    if isinstance(priced, CalibratedGemm):
        kernel = priced.kernel
        beyond = kernel.outside(m=rows, n=gemm.n, k=gemm.k)
        source = f"{kernel.source}{'; beyond its ' + ', '.join(beyond) if beyond else ''}"
        return _term(
            "decode", gemm.name, f"{gemm.count} x kernel({rows} x {gemm.k} x {gemm.n})", values, kernel.basis, source
        )
    formula = f"{gemm.count} x (launch + smooth max(weights+activations/BW, 2·{rows}·{gemm.k}·{gemm.n} FLOPs/rate))"
    priors = deployment.priors
    grouped = gemm.num_experts > 0 and deployment.engine_fit is None
    source = _source(deployment, priors.grouped_streaming_efficiency if grouped else priors.weight_streaming_efficiency)
    return _term("decode", gemm.name, formula, values, _estimated_basis(deployment), source)


def _decode_source(kernels: list[DecodeKernel | None], prior: str, prior_basis: Basis) -> tuple[Basis, str]:
    """Basis and source of decode attention: kernels with the error of making them affine, and priors where one is."""
    fitted = dict.fromkeys(kernel for kernel in kernels if kernel is not None)
    parts = [
        f"{one.kernel.source}; made affine within {one.price.median_error:.1%} median, {one.price.p90_error:.1%} p90"
        for one in fitted
    ]
    bases = [one.kernel.basis for one in fitted]
    if None in kernels or not kernels:
        parts.append(f"priors: {prior}" if fitted else prior)
        bases.append(prior_basis)
    return weakest(bases), "; ".join(parts)


def _scores_anew(deployment: Deployment) -> bool:
    """Whether a decode step does work of its own per attended token to score it (TOVA)."""
    return any(
        one.selection is not None and one.selection.decode_score_work(one.group, deployment.model) is not None
        for one in deployment.layer_classes
    )


def _term(phase: Phase, name: str, formula: str, values: list[float], basis: Basis, source: str) -> Term:
    return Term(phase, name, formula, values[0], "s", min(values), max(values), basis, source)


def _source(deployment: Deployment, table: PriorTable) -> str:
    fit, priors = deployment.engine_fit, deployment.priors
    replaced = (
        priors.streaming_efficiency,
        priors.weight_streaming_efficiency,
        priors.matmul_efficiency,
        priors.prefill_attention_efficiency,
        priors.elementwise_launch_s,
    )
    if fit is not None and any(table is one for one in replaced):
        return f"{fit.note} ({fit.id})"
    return look_up(table, deployment.device).source


def _estimated_basis(deployment: Deployment) -> Basis:
    """Basis of what no fitted kernel prices: the engine-level fit's, or the datasheet's."""
    return deployment.engine_fit.basis if deployment.engine_fit is not None else Basis.DATASHEET


def _link_prior(deployment: Deployment) -> PriorTable:
    has_own_link = deployment.device.scale_up_link is not None
    return deployment.priors.link_efficiency if has_own_link else deployment.priors.host_link_efficiency


def _compression_source(deployment: Deployment) -> str:
    for layer_class in deployment.layer_classes:
        family = layer_class.encoding.unpack_family
        if family is not None:
            return _source(deployment, deployment.priors.unpack_ops_per_element[family])
    return "bytes and FLOPs of the method over the device's rates"
