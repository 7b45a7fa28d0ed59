"""Candidates that were chosen, described: figures, reasons, what is unknown, and how to run them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from kvsim.compression import Compression
from kvsim.model_catalog import hub_id
from kvsim.planner.answer import Estimated, PlanPoint, Simulated
from kvsim.planner.feasible import Refusal
from kvsim.planner.flags import commands, not_shipped, shipped_by
from kvsim.planner.front import Standing, pareto
from kvsim.planner.quality import retained, risk
from kvsim.planner.reasons import compare_with, limit_of
from kvsim.planner.request import PlanRequest
from kvsim.planner.screen import Candidate, Screened, Screener
from kvsim.planner.search import DeviceSearch, rounded, standing
from kvsim.planner.settings import AXES
from kvsim.planner.strategies import baselines
from kvsim.report import Report
from kvsim.specs.engine_options import OWNERS

Doubts = Callable[[Screened], bool]
"""Whether a point that was not simulated probably misses a target."""


@dataclass(frozen=True)
class Described:
    """What the search ended with."""

    left: list[Screened]
    """Feasible candidates, less those that missed a limit when simulated."""
    heads: list[Screened]
    """Pareto set of these by the closed form, equal ones once."""
    others: dict[int, tuple[Screened, ...]]
    """Equal ones, by the head's id."""
    reports: dict[int, Report]
    """Simulations, by the candidate's id."""
    missed: list[tuple[Screened, Refusal]]

    @cached_property
    def is_doubtful(self) -> Doubts:
        """Who probably misses a target."""
        return doubts(self.missed, self.reports)

    def final(self) -> list[Screened]:
        """The plan's points: of those simulated the ones that no other dominates there, then the unsimulated.

        Last are those whose like missed a target.
        """
        played = [one for one in self.heads if id(one) in self.reports]
        kept = [played[index] for index in pareto([simulated_standing(one, self.reports[id(one)]) for one in played])]
        kept.sort(key=lambda one: (one.usd_per_million is None, cheapness(one)))
        unplayed = (one for one in self.heads if id(one) not in self.reports)
        return [*kept, *sorted(unplayed, key=self.is_doubtful)]


def simulated_standing(one: Screened, report: Report) -> Standing:
    """A point on the axes of the simulation: throughput, p99 TTFT, dollars, joules, risk."""
    closed = standing(one)
    ttft = report.latency.ttft.p99_s.value
    rates, dollars, joules = report.throughput, report.cost, report.energy
    usd, energy = dollars.usd_per_million_total_tokens.value, joules.joules_per_total_token.value
    costs = (
        -rounded(rates.output_throughput.value or 0.0),
        float("inf") if ttft is None else rounded(ttft),
        closed.costs[2] if usd is None else rounded(usd),
        closed.costs[3] if energy is None else rounded(energy),
    )
    return Standing(costs, closed.risk, closed.strategy, closed.world)


def cheapness(one: Screened) -> tuple[float, float, float]:
    """What a device's pick is chosen by, in this order.

    Dollars per token to a percent, or device time where no price is known; risk, an unknown one last; time to first
    token.
    """
    known = risk(one.candidate.strategy)
    price = one.usd_per_million if one.usd_per_million is not None else one.device_s_per_token
    return round(100 * math.log(price)), float("inf") if known is None else rounded(known.kl_nats), rounded(one.ttft_s)


def plan_point(
    name: str | None,
    one: Screened,
    request: PlanRequest,
    screener: Screener,
    search: DeviceSearch,
    described: Described,
) -> PlanPoint:
    """Describe one point; ``name`` is None for one that is not in the set."""
    candidate, strategy = one.candidate, one.candidate.strategy
    known, quality = risk(strategy), tuple(retained(strategy, task) for task in request.floors)
    report = described.reports.get(id(one))
    marks = [f"quality unknown on {held.task_class}" for held in quality if held.share is None]
    marks += ["risk not measured on the small model"] if known is None else []
    marks += ["price unknown"] if one.usd_per_million is None else []
    marks += ["energy unknown"] if one.joules_per_token is None else []
    marks += ["not simulated"] if report is None else []
    marks += ["like points missed a target"] if described.is_doubtful(one) else []
    return PlanPoint(
        name=name or f"{candidate.device} alone",
        in_set=name is not None,
        device=candidate.device,
        strategy=strategy.name,
        tensor_parallel_size=candidate.layout.tensor_parallel_size,
        replicas=candidate.layout.replicas,
        num_devices=candidate.layout.tensor_parallel_size * candidate.layout.replicas,
        settings=_settings(candidate),
        estimated=_estimated(one),
        simulated=None if report is None else _simulated(report),
        risk=known,
        quality=quality,
        marks=tuple(marks),
        also=tuple(_spoken(other.candidate) for other in described.others.get(id(one), ())),
        limit=limit_of(one, search.device, screener),
        compared=tuple(compare_with(one, baseline, screener) for baseline in baselines(candidate.engine.kind)),
        commands=commands(candidate, search.device, hub_id(request.model), one.longest_tokens),
        runs_on=shipped_by(candidate, search.device.vendor),
        not_shipped=not_shipped(candidate),
        scenario=screener.scenario(candidate),
    )


def _settings(candidate: Candidate) -> dict[str, float | int | bool]:
    engine = candidate.engine
    return {name: getattr(engine, name) for name in AXES if engine.kind in OWNERS.get(name, (engine.kind,))}


def _spoken(candidate: Candidate) -> str:
    layout = candidate.layout
    settings = ", ".join(f"{name} {value}" for name, value in _settings(candidate).items())
    return f"tensor_parallel_size {layout.tensor_parallel_size}, replicas {layout.replicas}, {settings}"


def _estimated(one: Screened) -> Estimated:
    return Estimated(
        output_throughput=one.output_throughput,
        mean_ttft_s=one.ttft_s,
        mean_tpot_s=one.tpot_s,
        mean_e2el_s=one.e2el_s,
        usd_per_hour=one.usd_per_hour,
        usd_per_million_total_tokens=one.usd_per_million,
        joules_per_total_token=one.joules_per_token,
        tdp_w=one.watts_tdp,
        engine_utilization=one.utilization,
        mean_batch=one.batch,
        sequences_that_fit=one.sequences_that_fit,
        sequence_kv_bytes=one.sequence_kv_bytes,
        device_memory_bytes=one.device_memory_bytes,
    )


def _simulated(report: Report) -> Simulated:
    latency = report.latency
    return Simulated(
        output_throughput=report.throughput.output_throughput.value,
        p99_ttft_s=latency.ttft.p99_s.value,
        p99_tpot_s=latency.tpot.p99_s.value,
        p99_e2el_s=latency.e2el.p99_s.value,
        mean_ttft_s=latency.ttft.mean_s.value,
        usd_per_million_total_tokens=report.cost.usd_per_million_total_tokens.value,
        joules_per_total_token=report.energy.joules_per_total_token.value,
        preemptions=report.counts.preemptions,
    )


def doubts(missed: Iterable[tuple[Screened, Refusal]], reports: Mapping[int, Report]) -> Doubts:
    """Who probably misses a target: not simulated, and a like point that should be faster missed it.

    Like points have one device, layout and engine. Doubt decides what is simulated and picked, and no point's standing.
    """
    fastest: dict[tuple[object, ...], float] = {}
    for one, refusal in missed:
        key, mean = (*one.candidate._replace(strategy=Compression()), refusal.limit), _mean(one, refusal.limit)
        fastest[key] = min(mean, fastest.get(key, mean))

    def is_doubtful(one: Screened) -> bool:
        like = one.candidate._replace(strategy=Compression())
        return id(one) not in reports and any(
            _mean(one, limit) >= fastest.get((*like, limit), float("inf")) for limit in _TARGETS
        )

    return is_doubtful


_TARGETS: Final = {"TTFT target": "ttft_s", "TPOT target": "tpot_s", "E2EL target": "e2el_s"}


def _mean(one: Screened, limit: str) -> float:
    return getattr(one, _TARGETS[limit], None) or 0.0 if limit in _TARGETS else 0.0
