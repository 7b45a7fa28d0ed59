"""The one path: scenario to report, by simulation or in closed form, alone or strategy beside strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvsim.adaptation import adaptive_use, policy_outcome, reduced_share
from kvsim.analysis import price_edges
from kvsim.assemble import assemble, with_pools
from kvsim.catalog import look_up
from kvsim.cost.priors import EDGES, Edge
from kvsim.errors import IncompatibleScenario, KvsimError, RequestDoesNotFit
from kvsim.explain import Explanation, explain_deployment
from kvsim.explain_split import explain_split
from kvsim.prepare import Prepared, check_mean_request, load_requests, plan_at, prepare
from kvsim.report import Figure, PolicyOutcome, Report
from kvsim.scenario import ADAPTIVE, STATIC, Scenario
from kvsim.sim.run import RunResult
from kvsim.summary import Outcome, counts, outcome, speculation, time_split, weakest_basis
from kvsim.tier_use import tiers_use, with_tiers

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
    edges = prepared.edges
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
        return with_pools(report, prepared, prepared.split, central, outcomes, batch)
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
            plan_at(prepared, edge),
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
        Pool(split.prefill, plan_at(prefill, edge)),
        Pool(split.decode, plan_at(prepared, edge)),
        split.crossing(edge),
        prepared.requests,
        prepared.max_model_len,
        routing=scenario.routing,
        thresholds=scenario.router,
        edge=edge,
        progress=progress,
        observer=observer,
    )


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
    check_mean_request(prepared.load, prepared.max_model_len)
    models = price_edges(prepared.deployment, prepared.edges)
    plans = {edge: plan_at(prepared, edge) for edge in models.mine}
    split = prepared.split
    if split is not None:
        prefill = price_edges(split.prefill, prepared.edges).mine
        outcomes, batch = estimate_split_outcomes(split, prefill, models.mine, plans, prepared.load)
    else:
        outcomes, batch = estimate_outcomes(models.mine, plans, prepared.load)
    tally = estimate_counts(prepared.requests, batch)
    report = assemble(prepared, models, outcomes, "estimate", tally, None, round(batch))
    return report if split is None else with_pools(report, prepared, split, None, outcomes, round(batch))


def _refuse_adaptive(prepared: Prepared) -> None:
    """A steady state has no bursts to adapt to, and one step explains one compression."""
    if prepared.deployment.adaptive is not None:
        also = " and --set adaptive.requantize=null" if prepared.deployment.adaptive.requantize is not None else ""
        msg = (
            "adaptive: a closed form has no queue and no bursts, so it cannot say when a policy acts; use kvsim "
            f"simulate, or hold one level with --set 'adaptive.policy={{kind: static, level: 0}}'{also}"
        )
        raise IncompatibleScenario(msg)


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
    load_requests(scenario, base_dir)
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
