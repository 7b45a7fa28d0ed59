"""How fast a plan's screen is, and how much of it is sharing. Absolute speed is never asserted."""

from __future__ import annotations

import time

from bench_cases import simpy_timeouts_per_s

from kvsim.errors import KvsimError
from kvsim.planner import PlanRequest, plan
from kvsim.planner.find import _scenario
from kvsim.planner.screen import Screener
from kvsim.planner.search import search_device
from kvsim.planner.strategies import strategy_space
from kvsim.simulate import estimate

CANDIDATES, TARGET_S = 5_000, 10.0
BESIDE = 12
"""One candidate in so many is also estimated alone, for the ratio."""


def request(device: str = "h100-sxm") -> PlanRequest:
    return PlanRequest(
        model="llama-3.1-8b", devices=(device,), workload="chat", simulate=0, search={"max_candidates": CANDIDATES}
    )


def test_screening_five_thousand_candidates(benchmark):
    """One process; strategies are built from all parts, and 5,000 candidates are screened on one device."""
    asked = request()

    def screen() -> tuple[Screener, list]:
        screener = Screener(_scenario(asked))
        found = search_device(asked, "h100-sxm", _scenario(asked), screener, strategy_space(), lambda count: None)
        return screener, found

    screener, found = benchmark.pedantic(screen, rounds=3, warmup_rounds=1)
    assert found.answered == CANDIDATES
    seconds = benchmark.stats.stats.min
    some = found.screened[::BESIDE]
    start = time.perf_counter()
    for one in some:
        try:
            estimate(screener.scenario(one.candidate))
        except KvsimError:  # what cannot run takes time too
            continue
    alone_s = (time.perf_counter() - start) / len(some)
    benchmark.extra_info.update(
        seconds_per_5000=round(seconds / found.answered * 5_000, 2),
        target_s=TARGET_S,
        ms_per_candidate=round(seconds / found.answered * 1e3, 3),
        ms_by_estimate_alone=round(alone_s * 1e3, 3),
        times_faster_than_estimate=round(alone_s * found.answered / seconds, 1),
        step_models=screener.priced,
        simpy_timeouts_per_s=round(simpy_timeouts_per_s()),
    )


def test_a_whole_plan(benchmark):
    """Screen, Pareto set, reasons and crossovers of one device, without simulation."""
    answer = benchmark.pedantic(plan, args=(request(),), rounds=2, warmup_rounds=1)
    assert answer.screened == CANDIDATES
    benchmark.extra_info.update(seconds=round(benchmark.stats.stats.min, 2), points=len(answer.points))
