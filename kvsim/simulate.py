"""The one path: scenario to report, by simulation or in closed form, alone or strategy beside strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

from kvsim import __version__
from kvsim.adaptation import adaptive_use, policy_outcome, reduced_share
from kvsim.analysis import EdgeModels, LoadShape, capacity, effects, load_shape, price_edges, resident_bytes
from kvsim.catalog import DATASHEET, at_field, look_up, resolve
from kvsim.cost.basis import kernel_notes, pricings
from kvsim.cost.priors import EDGES, Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.errors import IncompatibleScenario, InvalidSpec, KvsimError, RequestDoesNotFit, UnknownName
from kvsim.explain import Explanation, Term, explain_deployment
from kvsim.memory import MemoryPlan, plan_memory, plan_or, waterfall
from kvsim.pool import block_bytes, longest_prompt
from kvsim.quality import published_quality
from kvsim.report import Counts, Figure, KernelUsed, PolicyOutcome, Provenance, Quality, Report
from kvsim.requests import RequestTable
from kvsim.scenario import ADAPTIVE, STATIC, Scenario
from kvsim.specs.workload import WorkloadSpec
from kvsim.summary import (
    Outcome,
    band,
    cost,
    counts,
    coverage,
    energy,
    latency,
    outcome,
    request_overhead,
    throughput,
    time_split,
    weakest_basis,
)
from kvsim.tier_use import tiers_use, with_tiers
from kvsim.tiers import tier_notes
from kvsim.workload_catalog import load_workload
from kvsim.workloads import build_requests

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Comparison:
    """One strategy of a comparison: its report, or why there is none."""

    strategy: str
    report: Report | None
    reason: str | None
    error: KvsimError | None = None
    """What ``reason`` is the text of."""


@dataclass(frozen=True)
class Prepared:
    """A scenario ready to run."""

    scenario: Scenario
    deployment: Deployment
    requests: RequestTable
    plan: MemoryPlan
    max_model_len: int
    notes: tuple[str, ...]

    @cached_property
    def load(self) -> LoadShape:
        """Mean lengths and rate of the workload."""
        return load_shape(self.requests)


def simulate(scenario: Scenario, *, base_dir: Path | None = None, progress: Progress | None = None) -> Report:
    """Play ``scenario`` request by request.

    Raises a ScenarioError for wrong input and an InfeasibleScenario where nothing fits. ``progress`` is called with
    the share done, from 0 to 1.
    """
    from kvsim.sim.run import run_requests

    prepared = prepare(scenario, base_dir=base_dir)
    results = []
    edges = _edges(scenario)
    held = _held_levels(prepared)
    parts = len(edges) + len(held)
    for position, edge in enumerate(edges):
        result = run_requests(
            prepared.deployment,
            prepared.requests,
            _plan_at(prepared, edge),
            prepared.max_model_len,
            routing=scenario.routing,
            edge=edge,
            progress=_part(progress, position, parts),
        )
        results.append((result, outcome(result, prepared.requests, scenario.slo, edge)))
    central = results[0][0]
    outcomes = tuple(one for _, one in results)
    if not outcomes[0].completed:
        msg = (
            f"no request completed: all {len(prepared.requests)} need more than the {prepared.max_model_len} tokens "
            "that one sequence may hold here"
        )
        raise RequestDoesNotFit(msg)
    used = 1.0 - min(record.min_free_bytes for record in central.records) / central.pool_bytes
    batch = _mean_batch(outcomes[0], prepared)
    models = price_edges(prepared.deployment, edges)
    report = assemble(prepared, models, outcomes, "simulation", counts(central, prepared.requests), used, batch)
    if central.tiers is not None:
        return with_tiers(report, tiers_use(central.tiers, prepared.deployment))
    if prepared.deployment.adaptive is None:
        return report
    basis = weakest_basis(report.time_split)
    mine = policy_outcome(ADAPTIVE, "", central, outcomes[0], basis, reduced_share(central))
    beside = [
        _hold(scenario, level, base_dir, _part(progress, len(edges) + position, parts))
        for position, level in enumerate(held)
    ]
    use = adaptive_use(central, prepared.deployment, prepared.requests, (mine, *beside), basis)
    return report.model_copy(update={"adaptive": use})


def _held_levels(prepared: Prepared) -> range:
    """Levels to simulate beside an adaptive run."""
    adaptive = prepared.deployment.adaptive
    return range(len(adaptive.levels) if adaptive is not None and adaptive.baselines else 0)


def _hold(scenario: Scenario, level: int, base_dir: Path | None, progress: Progress | None) -> PolicyOutcome:
    """What one level gives if it serves every request, on the same requests; central edge."""
    from kvsim.sim.run import run_requests

    name = f"{STATIC}{level}"
    one = scenario.with_strategy(name)
    try:
        prepared = prepare(one, base_dir=base_dir)
    except KvsimError as error:
        return PolicyOutcome(policy=name, compression=one.strategy, reason=str(error))
    deployment, requests = prepared.deployment, prepared.requests
    result = run_requests(
        deployment, requests, prepared.plan, prepared.max_model_len, routing=scenario.routing, progress=progress
    )
    numbers = outcome(result, requests, scenario.slo, Edge.CENTRAL)
    basis = weakest_basis(time_split(numbers, deployment))
    reduced = Figure(value=1.0 if level else 0.0)
    return policy_outcome(name, one.strategy, result, numbers, basis, reduced)


def estimate(scenario: Scenario, *, base_dir: Path | None = None) -> Report:
    """Answer ``scenario`` in closed form: mean lengths, steady state, no queue. Percentiles are unknown."""
    from kvsim.estimate import estimate_counts, estimate_outcomes

    prepared = prepare(scenario, base_dir=base_dir)
    _refuse_adaptive(prepared)
    if prepared.max_model_len < prepared.load.prompt_tokens + prepared.load.output_tokens:
        msg = (
            f"the mean request of {prepared.load.prompt_tokens} + {prepared.load.output_tokens} tokens exceeds the "
            f"{prepared.max_model_len} tokens that one sequence may hold here"
        )
        raise RequestDoesNotFit(msg)
    models = price_edges(prepared.deployment, _edges(scenario))
    plans = {edge: _plan_at(prepared, edge) for edge in models.mine}
    outcomes, batch = estimate_outcomes(models.mine, plans, prepared.load)
    tally = estimate_counts(prepared.requests, batch)
    return assemble(prepared, models, outcomes, "estimate", tally, None, round(batch))


def _refuse_adaptive(prepared: Prepared) -> None:
    """A steady state has no bursts to adapt to, and one step explains one compression."""
    if prepared.deployment.adaptive is not None:
        msg = (
            "adaptive: a closed form has no queue and no bursts, so it cannot say when a policy acts; use kvsim "
            "simulate, or hold one level with --set 'adaptive.policy={kind: static, level: 0}'"
        )
        raise IncompatibleScenario(msg)


def _edges(scenario: Scenario) -> tuple[Edge, ...]:
    return EDGES if scenario.bands else EDGES[:1]


def compare(
    scenario: Scenario,
    strategies: Sequence[str],
    *,
    base_dir: Path | None = None,
    method: Literal["simulation", "estimate"] = "simulation",
    progress: Progress | None = None,
) -> tuple[Comparison, ...]:
    """Run ``scenario`` under each strategy, on the same requests; a strategy that cannot run says why.

    With ``native`` among the strategies, the others' queueing effect is filled in.
    """
    variants = [scenario.with_strategy(name) for name in strategies]
    # What no strategy can mend is an error of the whole comparison, not a row.
    look_up(scenario, base_dir=base_dir)
    _load_requests(scenario, base_dir)
    rows: list[Comparison] = []
    for position, (name, one) in enumerate(zip(strategies, variants, strict=True)):
        try:
            if method == "estimate":
                report = estimate(one, base_dir=base_dir)
            else:
                report = simulate(one, base_dir=base_dir, progress=_part(progress, position, len(strategies)))
        except KvsimError as error:
            rows.append(Comparison(name, None, str(error), error))
            continue
        rows.append(Comparison(name, report, None))
    return _with_queueing_effect(tuple(rows))


def explain(scenario: Scenario, *, base_dir: Path | None = None) -> Explanation:
    """List every term of memory, one prefill and one decode step of ``scenario`` at its workload's mean lengths."""
    from kvsim.estimate import estimate_outcomes

    prepared = prepare(scenario, base_dir=base_dir)
    _refuse_adaptive(prepared)
    load = prepared.load
    steps = price_edges(prepared.deployment, EDGES[:1]).mine
    _, batch = estimate_outcomes(steps, {Edge.CENTRAL: prepared.plan}, load)
    return explain_deployment(
        prepared.deployment, prepared.plan, load.prompt_tokens, load.output_tokens // 2, max(1, round(batch))
    )


def _with_queueing_effect(rows: tuple[Comparison, ...]) -> tuple[Comparison, ...]:
    native = next((r.report for r in rows if r.report is not None and r.report.strategy == "native"), None)
    if native is None or native.queue_delay_mean_s.value is None:
        return rows
    base_s = native.queue_delay_mean_s.value
    filled = []
    for row in rows:
        report = row.report
        if report is not None and report.queue_delay_mean_s.value:
            basis = report.queue_delay_mean_s.basis
            figure = Figure(value=base_s / report.queue_delay_mean_s.value, basis=basis)
            report = report.model_copy(
                update={"effects": report.effects.model_copy(update={"queueing_effect": figure})}
            )
        filled.append(Comparison(row.strategy, report, row.reason, row.error))
    return tuple(filled)


def prepare(scenario: Scenario, *, base_dir: Path | None = None) -> Prepared:
    """Resolve names, build the requests, divide the memory."""
    deployment = resolve(scenario, base_dir=base_dir)
    requests = _load_requests(scenario, base_dir)
    plan = plan_memory(deployment, block_bytes(deployment))
    limit = scenario.engine.max_model_len or deployment.model.max_position_embeddings
    fits = longest_prompt(deployment, plan.num_blocks * plan.block_bytes, limit)
    _check_classes(scenario, requests)
    notes = [*deployment.notes, *kernel_notes(deployment), *requests.notes]
    if deployment.engine_fit is not None:
        notes.append(f"{deployment.device.name} is calibrated by an engine-level fit ({deployment.engine_fit.id})")
    elif deployment.calibration is None and scenario.calibration != DATASHEET:
        notes.append(f"no kernel of {deployment.device.name} is calibrated: priced from its datasheet and priors")
    if requests.prefix_hashes is not None and scenario.engine.enable_prefix_caching and not deployment.prefix_caching:
        evicting = next(one for one in deployment.variants if one.compression.selection.evicts)
        notes.append(
            f"prefix caching is off: {evicting.compression.name} evicts tokens, so a cached prompt cannot be reused"
        )
    notes += tier_notes(deployment, shares_prefixes=requests.prefix_hashes is not None)
    if scenario.engine.max_model_len is not None and fits < scenario.engine.max_model_len:
        msg = (
            f"engine.max_model_len: one sequence of {scenario.engine.max_model_len} tokens does not fit the KV pool; "
            f"the longest that fits is {fits}"
        )
        raise RequestDoesNotFit(msg)
    if fits < limit:
        notes.append(f"the KV pool holds one sequence of {fits} tokens, less than the model's {limit}")
    if not scenario.engine.enable_chunked_prefill:
        fits = min(fits, scenario.engine.max_num_batched_tokens)
    notes += _level_notes(deployment, requests)
    longest = int((requests.prompt_tokens + requests.output_tokens).max())
    if longest > fits:
        notes.append(f"requests longer than {fits} tokens (the longest has {longest}) are rejected, and counted")
    return Prepared(scenario, deployment, requests, plan, fits, tuple(notes))


def _check_classes(scenario: Scenario, requests: RequestTable) -> None:
    for name in scenario.adaptive.classes if scenario.adaptive is not None else ():
        if name not in requests.class_names:
            if not requests.class_names:
                msg = f"adaptive.classes.{name}: the workload has no request classes; give workload.classes"
                raise InvalidSpec(msg)
            kind = "request class"
            raise UnknownName(kind, name, requests.class_names, where="adaptive.classes")


def _level_notes(deployment: Deployment, requests: RequestTable) -> list[str]:
    """Levels that hold no less than the one before: pressure would not fall there."""
    if deployment.adaptive is None:
        return []
    load = load_shape(requests)
    rates = build_rates(deployment.device, deployment.priors, Edge.CENTRAL)
    held = [resident_bytes(StepModel(variant, rates), load) for variant in deployment.levels]
    return [
        f"adaptive: level {level} ({deployment.adaptive.levels[level].name}) holds no less of a mean sequence than the "
        "level before, so tightening to it frees nothing"
        for level in range(1, len(held))
        if held[level] >= held[level - 1]
    ]


def _load_requests(scenario: Scenario, base_dir: Path | None) -> RequestTable:
    with at_field("workload"):
        workload = load_workload(scenario.workload) if isinstance(scenario.workload, str) else scenario.workload
    return _requests(workload, scenario.seed, base_dir)


@lru_cache(maxsize=8)
def _requests(workload: WorkloadSpec, seed: int, base_dir: Path | None) -> RequestTable:
    return build_requests(workload, seed=seed, base_dir=base_dir)


def _plan_at(prepared: Prepared, edge: Edge) -> MemoryPlan:
    """The pool at an edge of the memory priors; the central one where even one sequence would not fit."""
    plan = plan_or(prepared.plan, prepared.deployment, edge)
    pool_bytes = plan.num_blocks * plan.block_bytes
    if longest_prompt(prepared.deployment, pool_bytes, prepared.max_model_len) < prepared.max_model_len:
        return prepared.plan
    return plan


def _part(progress: Progress | None, position: int, parts: int) -> Progress | None:
    if progress is None:
        return None
    return lambda share: progress((position + share) / parts)


def _mean_batch(one: Outcome, prepared: Prepared) -> int:
    """Sequences decoding at once, averaged over decode time: the batch that the effects are stated at."""
    decode_s = sum(one.decode.values())
    mean = one.itl.mean_s
    if not decode_s or not mean:
        return 1
    sequences = one.itl.count * mean / (decode_s + sum(one.prefill.values()))
    return max(1, min(round(sequences), prepared.deployment.max_running))


def assemble(
    prepared: Prepared,
    models: EdgeModels,
    outcomes: tuple[Outcome, ...],
    method: Literal["simulation", "estimate"],
    tally: Counts,
    peak_kv_utilization: float | None,
    batch: int,
) -> Report:
    """Put a report together from outcomes at the edges."""
    deployment, load = prepared.deployment, prepared.load
    shares = time_split(outcomes[0], deployment)
    basis = weakest_basis(shares)
    return Report(
        method=method,
        strategy=prepared.scenario.strategy,
        scenario=prepared.scenario,
        kv=capacity(models, prepared.plan, load, peak_kv_utilization),
        memory=waterfall(prepared.plan, deployment),
        duration_s=band(outcomes, lambda one: one.duration_s, basis),
        queue_delay_mean_s=band(outcomes, lambda one: one.queue_delay_mean_s, basis),
        request_overhead_s=request_overhead(deployment, tuple(one.edge for one in outcomes)),
        latency=latency(outcomes, basis),
        throughput=throughput(outcomes, basis),
        counts=tally,
        time_split=shares,
        bottleneck=_bottleneck(outcomes[0], peak_kv_utilization),
        effects=effects(models, load, batch),
        cost=cost(deployment, outcomes, basis),
        energy=energy(deployment, outcomes),
        quality=published_quality(deployment.compression) if deployment.adaptive is None else Quality(),
        coverage=coverage(shares),
        provenance=_provenance(prepared),
    )


_BOTTLENECKS = {
    ("prefill", "weights"): "compute of prompts",
    ("prefill", "attention"): "attention over prompts",
    ("decode", "weights"): "streaming of weights",
    ("decode", "attention"): "streaming of KV cache",
    ("prefill", "compression"): "compressing prompts",
    ("decode", "compression"): "unpacking of KV cache",
    ("prefill", "communication"): "collectives",
    ("decode", "communication"): "collectives",
    ("prefill", "overhead"): "kernel launches",
    ("decode", "overhead"): "kernel launches",
}
FULL_POOL = 0.98
IDLE_ENGINE = 0.6


def _bottleneck(one: Outcome, peak_kv_utilization: float | None) -> str:
    """What holds the run back: an empty queue, a full pool, or the largest part of the busy time."""
    times = {("prefill", c.value): s for c, s in one.prefill.items()}
    times |= {("decode", c.value): s for c, s in one.decode.items()}
    largest = _BOTTLENECKS[max(times, key=lambda key: times[key])]
    if peak_kv_utilization is not None and peak_kv_utilization > FULL_POOL:
        return f"KV capacity, then {largest}"
    busy = one.phases.busy_s / one.phases.total_s if one.phases.total_s else 0.0
    if busy < IDLE_ENGINE:
        return f"load (engine busy {busy:.0%}), then {largest}"
    return largest


def _provenance(prepared: Prepared) -> Provenance:
    deployment = prepared.deployment
    return Provenance(
        kvsim_version=__version__,
        scenario_sha256=prepared.scenario.fingerprint(),
        calibration=_calibration_name(deployment),
        kernels=_kernels(deployment),
        device=deployment.device.name,
        model=deployment.model.name,
        model_source=deployment.model.source,
        workload_source=prepared.requests.source,
        notes=prepared.notes,
    )


def _calibration_name(deployment: Deployment) -> str:
    if deployment.calibration is not None:
        return deployment.calibration.name
    if deployment.engine_fit is not None:
        return f"engine level, {deployment.engine_fit.device} {deployment.engine_fit.id}"
    return deployment.priors.name


def _kernels(deployment: Deployment) -> tuple[KernelUsed, ...]:
    used = (
        (pricing.operation, member)
        for pricing in pricings(deployment)
        if pricing.kernel is not None
        for member in pricing.kernel.members
    )
    return tuple(
        KernelUsed(
            operation=operation,
            kernel=kernel.artefact.kernel,
            version=kernel.artefact.version,
            artefact=kernel.artefact_id,
            basis=kernel.basis,
        )
        for operation, kernel in dict.fromkeys(used)
    )


__all__ = ["Comparison", "Explanation", "Prepared", "Term", "compare", "estimate", "explain", "prepare", "simulate"]
