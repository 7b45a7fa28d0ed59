"""The simulator equals a plain per-step, per-block reference, to the tick."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_engine import PlainReplica, Price, Request, play
from sim_cases import (
    Case,
    build_case,
    cases,
    closed_tables,
    deploy,
    gap_counts,
    open_tables,
    routed_cases,
    step_model,
    table,
    tight_cases,
)  # fmt: skip
from test_coalescing import assert_same

from kvsim.cost.tables import build_tables
from kvsim.sim import build
from kvsim.units import TICKS_PER_SECOND

SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
NATIVE = st.sampled_from(("native", "fp8"))
MODELS = st.sampled_from(("llama-3.1-8b", "qwen2.5-0.5b"))


def price_of(case: Case) -> Price:
    """Price of a step of ``case``: the tables, one price per attended token, prefill attention chunk by chunk."""
    step, engine = step_model(case.deployment), case.deployment.engine
    tables = build_tables(step, engine.max_num_batched_tokens, engine.max_num_seqs)
    host_work = build.host_work_ticks(step)

    def price(decoding: Sequence[int], prompts: Sequence[tuple[int, int]], completed: int) -> int:
        size, tokens = len(decoding), sum(chunk for chunk, _ in prompts)
        ticks = step.sequences.token_ticks * sum(cached + 1 for cached in decoding)
        ticks += tables.base[size + tokens] + tables.head[size + completed]
        if size:
            ticks += tables.attention_fixed[size] + tables.compression_fixed[size]
        if prompts:
            ticks += tables.append[tokens] + (0 if size else tables.append_launch)
        for chunk, cached in prompts:
            ticks += sum(round(float(s) * TICKS_PER_SECOND) for s in step.prefill_attention_seconds(chunk, cached))
        host_ticks = host_work[size + len(prompts)]
        return max(ticks, host_ticks) if engine.schedules_ahead else ticks + host_ticks

    return price


def assert_equals_plain(case: Case) -> None:
    """Compare every tick and count."""
    given_requests, engine = case.requests, case.deployment.engine
    rows = zip(given_requests.prompt_tokens, given_requests.output_tokens, given_requests.arrival_ticks, strict=True)
    requests = [Request(i, int(p), int(o), arrived=int(a)) for i, (p, o, a) in enumerate(rows)]
    price = price_of(case)
    replicas = [
        PlainReplica(
            blocks=case.plan.num_blocks, block_size=engine.block_size, max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens, max_model_len=case.max_model_len,
            chunked=engine.enable_chunked_prefill, price=price, ahead=engine.schedules_ahead,
            caching=engine.enable_prefix_caching,
        )
        for _ in range(case.deployment.replicas)
    ]  # fmt: skip
    parents, delays = given_requests.parent.tolist(), given_requests.delay_ticks.tolist()
    play(requests, parents, delays, replicas, least_loaded=case.routing != "round_robin")
    result = case.play()
    log = result.log
    for request in requests:
        i = request.index
        told = (log.arrived[i], log.scheduled[i], log.first_token[i], log.finished[i], log.rejected[i])
        assert told == (request.arrived, request.scheduled, request.first_token, request.finished, request.rejected), i
    for replica, record in zip(replicas, result.records, strict=True):
        assert len(replica.free) == replica.total
        assert (record.preemptions, record.recomputed_tokens) == (replica.preemptions, replica.recomputed)
        assert record.prefilled_tokens == replica.prefilled
    assert gap_counts(result) == sum((replica.gaps for replica in replicas), Counter())


@given(case=cases(models=MODELS, strategies=NATIVE, tables=st.one_of(open_tables(), closed_tables())))
@settings(SETTINGS, max_examples=200)
def test_equals_the_plain_engine(case: Case) -> None:
    if case.deployment.replicas > 1 and case.is_dynamic:
        # Two replicas that end steps in the same tick may release requests in either order.
        return
    assert_equals_plain(case)


@given(case=tight_cases())
@settings(SETTINGS, max_examples=150)
def test_equals_the_plain_engine_under_memory_pressure(case: Case) -> None:
    assert_equals_plain(case)


@given(
    case=cases(models=MODELS, strategies=NATIVE, tables=st.one_of(open_tables(), closed_tables())),
    share=st.floats(0.8, 1.3),
)
@settings(SETTINGS, max_examples=60)
def test_equals_the_plain_engine_where_the_host_is_as_slow_as_the_device(case: Case, share: float) -> None:
    """Host work that growing steps overtake, or never do."""
    if case.deployment.replicas > 1 and case.is_dynamic:
        return
    engine = case.deployment.engine
    step = build_tables(step_model(case.deployment), engine.max_num_batched_tokens, engine.max_num_seqs).step
    work = [round(share * ticks) for ticks in step]
    with mock.patch.object(build, "host_work_ticks", return_value=work):
        assert_equals_plain(case)
        assert_same(case.play(), case.play(coalesce=False))


@given(case=routed_cases())
@settings(SETTINGS, max_examples=100)
def test_routes_as_the_plain_engine(case: Case) -> None:
    assert_equals_plain(case)


def test_a_prompt_thrown_out_before_its_end_was_scheduled_when_it_was_first_scheduled() -> None:
    """Preempted in mid-prompt, then taken whole: the time of its first chunk counts (``QueueTime`` in vLLM)."""
    deployment = deploy(max_num_batched_tokens=24, max_num_seqs=16, block_size=8)
    requests = table([0] * 9, [1] * 8 + [18], [2] * 4 + [5] * 4 + [2])
    case = build_case(deployment, requests, spare_blocks=7)
    assert case.plan.num_blocks == 10
    result = case.play()
    assert result.records[0].preemptions == 1
    assert result.log.scheduled[8] == 0
    assert_equals_plain(case)
