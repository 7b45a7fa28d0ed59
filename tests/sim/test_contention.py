"""Compression beside the engine's steps (``compression_stream: side``) shares the device, and loses nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_invariants import audited, check_run, check_schedulers
from sim_cases import MS, Case, build_case, cases, closed_tables, deploy, gap_counts, open_tables, step_model, table

from kvsim.cost.priors import Edge
from kvsim.requests import UNSCHEDULED
from kvsim.scenario import Slo
from kvsim.sim.observer import RunObserver
from kvsim.sim.run import RunResult
from kvsim.summary import outcome
from kvsim.units import TICKS_PER_SECOND

SNAPKV = "snapkv(compression_ratio=0.5,window_size=16)"
STREAMS = ("inline", "side")


def case_with(stream: str, strategy: str = "snapkv:0.5", *, prompts: tuple[int, ...] = (4000, 9000, 9000)) -> Case:
    """A short prompt that decodes while long ones are compressed."""
    arrivals = [0, *(300 * MS * i for i in range(1, len(prompts)))]
    requests = table(arrivals, list(prompts), [400] * len(prompts))
    return build_case(deploy(strategy=strategy, compression_stream=stream), requests)


def play(case: Case) -> RunResult:
    with audited() as schedulers:
        result = case.play()
    check_run(case, result)
    check_schedulers(schedulers)
    return result


@pytest.mark.parametrize("strategy", ["snapkv:0.5", "h2o:0.5", "pyramidkv:0.5"])
def test_first_tokens_do_not_wait_for_side_compaction(strategy: str) -> None:
    """Inline compaction delays the first token by its length; beside the steps it comes after the first token."""
    inline, side = (play(case_with(stream, strategy)) for stream in STREAMS)
    assert all(s <= i for s, i in zip(side.log.first_token, inline.log.first_token, strict=True))
    compress = step_model(case_with("side", strategy).deployment).sequences.profile(4000).compress_ticks
    assert compress > 0
    assert inline.log.first_token[0] - side.log.first_token[0] == compress


def test_every_step_is_counted_also_where_all_its_sequences_come_back_from_compaction() -> None:
    """The observer sees each step as it begins; the report counts them from what was written down."""
    case = case_with("side", prompts=(4000,))
    observer = RunObserver()
    result = case.play(observer=observer)
    (watch,) = observer.replicas
    assert result.records[0].steps == sum(run.steps for run in watch.steps) == 1 + 399


def test_overlap_slows_steps_and_is_counted() -> None:
    inline, side = (play(case_with(stream)) for stream in STREAMS)
    assert inline.records[0].contention_ticks == 0
    assert inline.records[0].aside_ticks == 0
    (record,) = side.records
    assert record.contention_ticks > 0
    assert record.aside_ticks == sum(
        step_model(case_with("side").deployment).sequences.profile(p).compress_ticks for p in (4000, 9000, 9000)
    )


def test_the_same_work_is_done_on_either_stream() -> None:
    """Compression's ticks are the same, where they run differs; no token is lost or gained."""
    inline, side = (play(case_with(stream)).records[0] for stream in STREAMS)
    assert inline.prefill.compression == side.prefill.compression
    assert inline.prefilled_tokens == side.prefilled_tokens
    assert sum(gap_counts(play(case_with("inline"))).values()) == sum(gap_counts(play(case_with("side"))).values())


def test_an_overlapped_step_is_slower_than_the_same_step_alone() -> None:
    """The first request's steps while the second one's prompt is compacted, beside its very first step."""
    case = case_with("side", prompts=(500, 9000))
    result = play(case)
    (record,) = result.records
    alone_ticks = play(replace(case, requests=table([0], [500], [400]))).records[0].runs[0][2]
    lasted = [first for steps, size, first, _ in record.runs if size == 1 and steps == 1]
    assert max(lasted[1:]) > 1.5 * alone_ticks
    assert 0 < record.contention_ticks < sum(lasted)


def test_side_compaction_of_a_lone_request_costs_its_own_length() -> None:
    """Nothing else runs: the wait for the second token is the compaction and one step."""
    inline, side = (play(case_with(stream, prompts=(9000,))) for stream in STREAMS)
    assert side.log.finished[0] == inline.log.finished[0]
    assert side.records[0].contention_ticks == 0
    assert len(side.records[0].gaps) == 1


@pytest.mark.parametrize("strategy", ["native", "fp8", "streaming_llm:256"])
def test_strategies_without_work_at_the_end_of_a_prompt_do_not_care(strategy: str) -> None:
    inline, side = (play(case_with(stream, strategy)) for stream in STREAMS)
    assert inline.log == side.log
    assert gap_counts(inline) == gap_counts(side)


SIDE_CASES = cases(
    models=st.sampled_from(("llama-3.1-8b", "gpt-oss-20b")),
    strategies=st.sampled_from((SNAPKV, "h2o:20", "h2o:400", "h2o:400")),
    tables=st.one_of(open_tables(), open_tables(max_tokens=300), closed_tables()),
    stream="side",
)


@given(case=SIDE_CASES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_laws_hold_beside_compaction(case: Case) -> None:
    play(case)


def test_a_dry_pool_preempts_beside_compaction_too() -> None:
    """Decoding goes on while a prompt is compacted; its blocks come from the same pool."""
    requests = table([0, 0, 40 * MS], [60, 60, 30_000], [600, 600, 3])
    deployment = deploy(strategy="h2o:0.5", compression_stream="side")
    preemptions = [play(build_case(deployment, requests, spare_blocks=s)).records[0].preemptions for s in range(24)]
    assert any(preemptions)


@pytest.mark.parametrize("first", [13, 14, 15, 16])
def test_a_prompt_preempted_right_after_its_compaction_loses_no_time(first: int) -> None:
    """Its next gap runs from its latest token, over the compaction and the preemption (checked by ``check_run``)."""
    deployment = deploy(strategy="h2o:400", compression_stream="side", max_num_batched_tokens=64, max_num_seqs=8)
    preemptions = 0
    for second in range(15, 34):
        case = build_case(deployment, table([0, 4 * MS], [first, second], [20, 20]), spare_blocks=0)
        preemptions += play(case).records[0].preemptions
    assert preemptions


def test_a_released_request_wakes_an_idle_replica() -> None:
    """A second turn that is released while its replica sleeps until a far arrival is served at once."""
    hour = 3600 * 1000 * MS
    requests = table(
        [0, UNSCHEDULED, UNSCHEDULED, hour], [50] * 4, [5] * 4, parents=[-1, 0, 1, -1], delays=[0, 10 * MS, 10 * MS, 0]
    )  # fmt: skip
    log = play(build_case(deploy(replicas=2), requests)).log
    assert log.scheduled[:3] == log.arrived[:3]


def test_a_released_request_wakes_a_replica_that_waits_for_a_compaction() -> None:
    deployment = deploy(strategy="h2o:0.5", compression_stream="side", replicas=2)
    long = play(build_case(deployment, table([0], [30_000], [2]))).log
    during = long.first_token[0] + 5 * MS
    requests = table([0, during, UNSCHEDULED], [30_000, 10, 10], [2, 1, 1], parents=[-1, -1, 1])
    log = play(build_case(deployment, requests)).log
    assert log.finished[0] > log.arrived[2]
    assert log.scheduled[2] == log.arrived[2] == log.finished[1]


def test_an_engine_is_never_busier_than_the_clock() -> None:
    """Time that a compaction and a step share is one time: busy time is at most the time that passed."""
    requests = table([200 * MS * i for i in range(12)], [9000] * 12, [400] * 12)
    case = build_case(deploy(strategy="h2o:0.5", compression_stream="side"), requests)
    result = case.play()
    phases = outcome(result, requests, Slo(), Edge.CENTRAL).phases
    assert phases.busy_s <= result.end_ticks / TICKS_PER_SECOND * (1 + 1e-9)
