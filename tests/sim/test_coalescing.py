"""Coalesced decode runs equal stepping through them, and every run obeys the laws of conservation and order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_invariants import audited, check_run, check_schedulers
from sim_cases import (
    STRATEGIES,
    Case,
    cases,
    closed_tables,
    gap_counts,
    open_tables,
    routed_cases,
    shared_tables,
    talk_tables,
    tight_cases,
)  # fmt: skip

from kvsim.requests import UNSCHEDULED, RequestTable
from kvsim.sim.run import RunResult

QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def assert_same(coalesced: RunResult, stepped: RunResult) -> None:
    """Equal in every tick, token and byte; only how runs are cut may differ."""
    assert coalesced.log == stepped.log
    assert coalesced.end_ticks == stepped.end_ticks
    for one, other in zip(coalesced.records, stepped.records, strict=True):
        for field in (
            "prefill", "decode", "preemptions", "recomputed_tokens", "cached_prompt_tokens", "prefilled_tokens",
            "steps", "max_running", "max_waiting", "min_free_bytes", "contention_ticks", "prompts", "aside_ticks",
        ):  # fmt: skip
            assert getattr(one, field) == getattr(other, field), field
    assert gap_counts(coalesced) == gap_counts(stepped)


def play_both(case: Case) -> RunResult:
    with audited() as schedulers:
        coalesced, stepped = case.play(), case.play(coalesce=False)
    check_run(case, coalesced)
    assert_same(coalesced, stepped)
    check_schedulers(schedulers)
    return coalesced


@given(case=cases())
@settings(QUICK, max_examples=200)
def test_coalesced_equals_per_step(case: Case) -> None:
    play_both(case)


@pytest.mark.parametrize("tables", [open_tables(), closed_tables(), shared_tables(), talk_tables()])
def test_coalesced_equals_per_step_on_each_kind_of_arrival(tables: st.SearchStrategy[RequestTable]) -> None:
    native = cases(models=st.just("llama-3.1-8b"), strategies=st.just("native"), tables=tables)

    @given(case=native)
    @settings(QUICK, max_examples=60)
    def check(case: Case) -> None:
        play_both(case)

    check()


@given(case=tight_cases(st.sampled_from(STRATEGIES)))
@settings(QUICK, max_examples=80)
def test_coalesced_equals_per_step_under_memory_pressure(case: Case) -> None:
    play_both(case)


@given(case=tight_cases(tables=st.one_of(shared_tables(), talk_tables())))
@settings(QUICK, max_examples=120)
def test_coalesced_equals_per_step_while_the_prefix_cache_is_evicted(case: Case) -> None:
    play_both(case)


@given(case=routed_cases())
@settings(QUICK, max_examples=60)
def test_coalesced_replicas_equal_stepped_ones(case: Case) -> None:
    play_both(case)


@given(case=cases(models=st.just("llama-3.1-8b"), strategies=st.just("native"), tables=open_tables()), data=st.data())
@settings(QUICK, max_examples=60)
def test_arrivals_at_the_very_end_of_a_step(case: Case, data: st.DataObject) -> None:
    """A request that comes exactly when a step ends is seen by the next one, whichever way steps are taken."""
    log = case.play(coalesce=False).log
    ends = sorted({t for t in log.first_token + log.finished if t >= 0})
    if not ends:
        return
    when = data.draw(st.lists(st.sampled_from(ends), min_size=1, max_size=3))
    table = case.requests
    arrivals = np.concatenate([table.arrival_ticks, when])
    order = np.argsort(arrivals, kind="stable")
    picked = np.arange(len(arrivals)) % len(table)

    def rows(values: np.ndarray) -> np.ndarray:
        return values[picked][order]

    late = RequestTable(
        arrival_ticks=arrivals[order], prompt_tokens=rows(table.prompt_tokens), output_tokens=rows(table.output_tokens),
        delay_ticks=np.zeros_like(arrivals), parent=np.full_like(arrivals, UNSCHEDULED),
    )  # fmt: skip
    play_both(replace(case, requests=late))
