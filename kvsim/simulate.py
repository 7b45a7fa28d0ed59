"""The one path: scenario to report, by simulation or in closed form, alone or strategy beside strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvsim import __version__
from kvsim.adaptation import adaptive_use, policy_outcome, reduced_share
from kvsim.analysis import EdgeModels, LoadShape, capacity, effects, load_shape, price_edges, resident_bytes
from kvsim.catalog import DATASHEET, at_field, at_level, look_up, resolve
from kvsim.cost.basis import kernel_notes, pricings, weakest
from kvsim.cost.priors import EDGES, Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.disaggregation import SplitDeployment, pool_scenario, resolve_split
from kvsim.errors import IncompatibleScenario, InvalidSpec, KvsimError, RequestDoesNotFit, UnknownName
from kvsim.explain import Explanation, Term, explain_deployment
from kvsim.explain_split import explain_split
from kvsim.memory import MemoryPlan, plan_memory, plan_or, slot_tokens, waterfall
from kvsim.pool import block_bytes, longest_sequence
from kvsim.pool_summary import disaggregation
from kvsim.quality import published_quality
from kvsim.report import Counts, Figure, KernelUsed, PolicyOutcome, Provenance, Quality, Report
from kvsim.requests import RequestTable
from kvsim.scenario import ADAPTIVE, STATIC, Scenario
from kvsim.sim.run import RunResult
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
    speculation,
    throughput,
    time_split,
    weakest_basis,
)
from kvsim.tier_use import tiers_use, with_tiers
from kvsim.tiers import tier_notes
from kvsim.workload_catalog import load_workload
from kvsim.workloads import build_requests

if TYPE_CHECKING:
    from kvsim.sim.observer import RunObserver

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
    split: SplitDeployment | None = None
    """Both pools where there are two; ``deployment`` and ``plan`` are then the decode pool's."""

    @cached_property
    def load(self) -> LoadShape:
        """Mean lengths and rate of the workload."""
        return load_shape(self.requests)


def simulate(
    scenario: Scenario,
    *,
    base_dir: Path | None = None,
    progress: Progress | None = None,
    observer: RunObserver | None = None,
) -> Report:
    """Play ``scenario`` request by request.

    Raises a ScenarioError for wrong input and an InfeasibleScenario where nothing fits. ``progress`` is called with
    the share done, from 0 to 1; ``observer`` watches the central estimate's run.
    """
    prepared = prepare(scenario, base_dir=base_dir)
    results = []
    edges = _edges(scenario)
    held = _held_levels(prepared)
    parts = len(edges) + len(held)
    for position, edge in enumerate(edges):
        watched = observer if edge is Edge.CENTRAL else None
        result = _play(prepared, edge, _part(progress, position, parts), watched)
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
    batch = _mean_batch(outcomes[0], prepared) if prepared.split is None else _mean_decode_batch(central)
    models = price_edges(prepared.deployment, edges)
    report = assemble(prepared, models, outcomes, "simulation", counts(central, prepared.requests), used, batch)
    report = report.model_copy(update={"speculation": speculation(central, scenario.engine.speculative_config)})
    if central.tiers is not None:
        return with_tiers(report, tiers_use(central.tiers, prepared.deployment))
    if prepared.split is not None:
        return _with_pools(report, prepared, prepared.split, central, outcomes, batch)
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
    name = f"{STATIC}{level}"
    one = scenario.with_strategy(name)
    try:
        prepared = prepare(one, base_dir=base_dir)
    except KvsimError as error:
        return PolicyOutcome(policy=name, compression=one.strategy, reason=str(error))
    deployment, requests = prepared.deployment, prepared.requests
    result = _play(prepared, Edge.CENTRAL, progress, None)
    numbers = outcome(result, requests, scenario.slo, Edge.CENTRAL)
    basis = weakest_basis(time_split(numbers, deployment))
    reduced = Figure(value=1.0 if level else 0.0)
    return policy_outcome(name, one.strategy, result, numbers, basis, reduced)


def _play(prepared: Prepared, edge: Edge, progress: Progress | None, observer: RunObserver | None) -> RunResult:
    from kvsim.sim.run import run_requests

    scenario, split = prepared.scenario, prepared.split
    if split is None:
        return run_requests(
            prepared.deployment,
            prepared.requests,
            _plan_at(prepared, edge),
            prepared.max_model_len,
            routing=scenario.routing,
            thresholds=scenario.router,
            edge=edge,
            seed=scenario.seed,
            progress=progress,
            observer=observer,
        )
    from kvsim.sim.disaggregated import Pool, run_disaggregated

    prefill = replace(prepared, deployment=split.prefill, plan=split.prefill_plan)
    return run_disaggregated(
        Pool(split.prefill, _plan_at(prefill, edge)),
        Pool(split.decode, _plan_at(prepared, edge)),
        split.crossing(edge),
        prepared.requests,
        prepared.max_model_len,
        routing=scenario.routing,
        thresholds=scenario.router,
        edge=edge,
        progress=progress,
        observer=observer,
    )


def _with_pools(
    report: Report,
    prepared: Prepared,
    split: SplitDeployment,
    central: RunResult | None,
    outcomes: tuple[Outcome, ...],
    batch: int,
) -> Report:
    """Add the section on both pools, and take from the prefill pool what the decode pool cannot tell."""
    shares = tuple(
        mine.model_copy(update={"basis": weakest([mine.basis, other.basis])})
        for mine, other in zip(report.time_split, time_split(outcomes[0], split.prefill), strict=True)
    )
    basis = weakest_basis(shares)
    tax = effects(price_edges(split.prefill, _edges(prepared.scenario)), prepared.load, batch).prefill_tax
    quality = report.quality if split.coding is None else published_quality(split.coding.compression)
    return report.model_copy(
        update={
            "time_split": shares,
            "coverage": coverage(shares),
            "effects": report.effects.model_copy(update={"prefill_tax": tax}),
            "cost": cost(split.decode, outcomes, basis, split.prefill),
            "energy": energy(split.decode, outcomes, split.prefill),
            "quality": quality,
            "provenance": _provenance_of_both(report, split),
            "disaggregation": disaggregation(split, central, outcomes, basis),
        }
    )


def _provenance_of_both(report: Report, split: SplitDeployment) -> Provenance:
    first, second = split.prefill.device.name, split.decode.device.name
    device = first if first == second else f"{first} (prefill) and {second} (decode)"
    kernels = tuple(dict.fromkeys((*_kernels(split.prefill), *report.provenance.kernels)))
    return report.provenance.model_copy(update={"device": device, "kernels": kernels})


def _mean_decode_batch(result: RunResult) -> int:
    """Sequences in a decode step, averaged over the decode pool's steps."""
    runs = [run for record in result.records[result.prefill_replicas :] for run in record.runs]
    steps = sum(run[0] for run in runs)
    return max(1, round(sum(run[0] * run[1] for run in runs) / steps)) if steps else 1


def estimate(scenario: Scenario, *, base_dir: Path | None = None) -> Report:
    """Answer ``scenario`` in closed form: mean lengths, steady state, no queue. Percentiles are unknown."""
    from kvsim.estimate import estimate_counts, estimate_outcomes
    from kvsim.estimate_split import estimate_split_outcomes

    if scenario.engine.speculative_config is not None:
        msg = "engine.speculative_config: the closed form has no drafts; use simulate, or leave it out"
        raise IncompatibleScenario(msg)
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
    split = prepared.split
    if split is not None:
        prefill = price_edges(split.prefill, _edges(scenario)).mine
        outcomes, batch = estimate_split_outcomes(split, prefill, models.mine, plans, prepared.load)
    else:
        outcomes, batch = estimate_outcomes(models.mine, plans, prepared.load)
    tally = estimate_counts(prepared.requests, batch)
    report = assemble(prepared, models, outcomes, "estimate", tally, None, round(batch))
    return report if split is None else _with_pools(report, prepared, split, None, outcomes, round(batch))


def _refuse_adaptive(prepared: Prepared) -> None:
    """A steady state has no bursts to adapt to, and one step explains one compression."""
    if prepared.deployment.adaptive is not None:
        also = " and --set adaptive.requantize=null" if prepared.deployment.adaptive.requantize is not None else ""
        msg = (
            "adaptive: a closed form has no queue and no bursts, so it cannot say when a policy acts; use kvsim "
            f"simulate, or hold one level with --set 'adaptive.policy={{kind: static, level: 0}}'{also}"
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
    from kvsim.estimate_split import estimate_split_outcomes

    prepared = prepare(scenario, base_dir=base_dir)
    _refuse_adaptive(prepared)
    load = prepared.load
    steps = price_edges(prepared.deployment, EDGES[:1]).mine
    if prepared.split is not None:
        prompts = price_edges(prepared.split.prefill, EDGES[:1]).mine
        _, batch = estimate_split_outcomes(prepared.split, prompts, steps, {Edge.CENTRAL: prepared.plan}, load)
        return explain_split(prepared.split, load.prompt_tokens, load.output_tokens // 2, max(1, round(batch)))
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
    if scenario.disaggregation is not None and scenario.adaptive is not None:
        level = scenario.adaptive.only_level
        if level is None:
            msg = (
                "adaptive: KV of several levels is not sent between pools; leave out disaggregation, or hold one level"
            )
            raise IncompatibleScenario(msg)
        scenario = at_level(scenario, level)
    split = resolve_split(scenario, base_dir=base_dir)
    if split is not None:
        return _prepare_split(scenario, split, base_dir)
    return _prepare_pool(scenario, resolve(scenario, base_dir=base_dir), base_dir)


def _prepare_split(scenario: Scenario, split: SplitDeployment, base_dir: Path | None) -> Prepared:
    """Both pools; a sequence must fit either of them."""
    spec = split.spec
    prefill = _prepare_pool(pool_scenario(scenario, spec.prefill), split.prefill, base_dir)
    decode = _prepare_pool(pool_scenario(scenario, spec.decode), split.decode, base_dir)
    return Prepared(
        scenario,
        split.decode,
        decode.requests,
        decode.plan,
        min(prefill.max_model_len, decode.max_model_len),
        tuple(dict.fromkeys((*split.notes, *prefill.notes, *decode.notes))),
        split,
    )


def _prepare_pool(scenario: Scenario, deployment: Deployment, base_dir: Path | None) -> Prepared:
    requests = _load_requests(scenario, base_dir)
    plan = plan_memory(deployment, block_bytes(deployment))
    limit = scenario.engine.max_model_len or deployment.model.max_position_embeddings
    limit = min(limit, slot_tokens(deployment) or limit)
    fits = longest_sequence(deployment, plan.num_blocks * plan.block_bytes, limit)
    _check_classes(scenario, requests)
    notes = [*deployment.notes, *kernel_notes(deployment), *requests.notes]
    if scenario.routing == "prefix_aware" and (requests.prefix_hashes is None or not deployment.prefix_caching):
        notes.append("prefix_aware routing goes by load alone: no prefix can be cached here")
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
    config = scenario.engine.speculative_config
    if config is not None and config.num_speculative_tokens:
        notes.append(
            f"{config.num_speculative_tokens} drafts a step by {config.method}, {config.mean_length:.3g} tokens "
            "expected of each; capacity counts the drafter's KV; effects against native compare steps without drafts"
        )
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
    if longest_sequence(prepared.deployment, pool_bytes, prepared.max_model_len) < prepared.max_model_len:
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
