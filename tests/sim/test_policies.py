"""Laws of every engine's scheduler: nothing lost, no livelock, coalesced equals per-step, each one's own promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_cases import IN_ORDER, POLICIES, options, policy_cases, with_priorities
from run_invariants import audited, check_run, check_schedulers
from sim_cases import MS, Case, build_case, deploy, gap_counts, table

from kvsim.requests import RequestTable

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("policy", POLICIES)
@FEW
@given(data=st.data())
def test_nothing_is_lost_and_nobody_waits_for_ever(policy: str, data: st.DataObject) -> None:
    case = data.draw(policy_cases(policy))
    with audited() as schedulers:
        result = case.play()
    check_run(case, result, in_order=policy in IN_ORDER)
    check_schedulers(schedulers)


@pytest.mark.parametrize("policy", POLICIES)
@FEW
@given(data=st.data())
def test_coalesced_equals_step_by_step(policy: str, data: st.DataObject) -> None:
    case = data.draw(policy_cases(policy))
    fast, slow = case.play(), case.play(coalesce=False)
    assert fast.log == slow.log
    assert fast.end_ticks == slow.end_ticks
    assert gap_counts(fast) == gap_counts(slow)
    for one, other in zip(fast.records, slow.records, strict=True):
        assert (one.prefill, one.decode) == (other.prefill, other.decode)
        for name in ("preemptions", "recomputed_tokens", "cached_prompt_tokens", "min_free_bytes", "max_running"):
            assert getattr(one, name) == getattr(other, name), name


@FEW
@given(data=st.data(), policy=st.sampled_from(("trt-no-evict", "trt-no-evict-chunked", "llamacpp", "llamacpp-slots")))
def test_who_was_let_in_is_never_sent_away(data: st.DataObject, policy: str) -> None:
    result = data.draw(policy_cases(policy)).play()
    assert sum(record.preemptions for record in result.records) == 0


def crowd(policy: str, *, spare: int, count: int = 12, output: int = 60, apart: int = 0) -> Case:
    """Equal requests, ``apart`` ticks between them, on a pool for one and ``spare`` blocks more."""
    deployment = deploy(**options(policy, max_num_batched_tokens=512, max_num_seqs=8))
    requests = table([apart * i for i in range(count)], [32] * count, [output] * count)
    return build_case(deployment, requests, spare_blocks=spare)


@pytest.mark.parametrize("policy", ["vllm-priority", "vllm-threshold", "sglang", "sglang-mixed", "sglang-bold",
                                    "trt-max-utilization"])  # fmt: skip
def test_a_tight_pool_makes_these_give_way(policy: str) -> None:
    tokens = 3 * 632
    spare = tokens if policy in ("sglang", "sglang-bold") else tokens // 16
    result = crowd(policy, spare=spare, output=600, apart=100 * MS).play()
    assert result.records[0].preemptions > 0


def test_guaranteed_no_evict_runs_as_many_as_fit_to_their_end() -> None:
    case = crowd("trt-no-evict", spare=24)
    # 92 tokens are 12 blocks of 8: three such requests fit 36 blocks.
    assert case.plan.num_blocks == 36
    assert case.play().records[0].max_running == 3


def test_no_evict_reserves_shared_blocks_once() -> None:
    hashes = tuple(tuple(range(4)) for _ in range(3))
    requests = table([0, 900 * MS, 900 * MS], [66] * 3, [30] * 3, hashes=hashes)
    deployment = deploy(kind="tensorrt_llm", tokens_per_block=16, max_num_batched_tokens=512, max_num_seqs=8)
    # One alone needs 6 blocks, 4 of them shared by the others.
    case = build_case(deployment, replace(requests, arrival_ticks=np.array([0, 1, 1])), spare_blocks=4)
    assert case.plan.num_blocks == 10
    result = case.play()
    assert result.records[0].max_running == 3
    assert result.records[0].cached_prompt_tokens == 2 * 64


def test_a_waiting_request_of_higher_priority_goes_first() -> None:
    case = crowd("vllm-priority", spare=10_000, count=20, output=5)
    values = [index % 4 for index in range(20)]
    log = with_priorities(case, values).play().log
    order = sorted(range(20), key=lambda index: (log.scheduled[index], values[index]))
    assert [values[index] for index in order] == sorted(values)


def test_the_least_urgent_gives_way_first() -> None:
    """Without a waiting queue the urgent ones never lose their blocks."""
    case = crowd("vllm-priority", spare=10, count=3)
    urgent_first, urgent_last = with_priorities(case, [0, 1, 2]).play(), with_priorities(case, [2, 1, 0]).play()
    assert urgent_first.records[0].preemptions > 0
    assert np.argmax(urgent_first.log.finished) == 2
    assert np.argmax(urgent_last.log.finished) == 0
    assert urgent_first.log.finished[0] == urgent_last.log.finished[2]


@FEW
@given(data=st.data())
def test_equal_priorities_are_first_come_first_served(data: st.DataObject) -> None:
    drawn = data.draw(policy_cases("vllm-priority"))
    case = with_priorities(drawn, [1] * len(drawn.requests))
    engine = case.deployment.engine.model_copy(update={"scheduling_policy": "fcfs"})
    plain = replace(case, deployment=replace(case.deployment, engine=engine))
    if case.requests.prefix_hashes is None and not case.is_dynamic:
        assert case.play().log.scheduled == plain.play().log.scheduled


def test_a_threshold_lets_a_short_prompt_pass_a_long_one() -> None:
    requests = table([0, 1], [4000, 20], [3, 3])

    def first_token(**more: int) -> int:
        case = build_case(deploy(max_num_batched_tokens=512, max_num_seqs=8, **more), requests)
        return case.play().log.first_token[1]

    assert first_token(long_prefill_token_threshold=256) < first_token() / 3


def test_a_threshold_that_no_prompt_reaches_changes_nothing() -> None:
    requests = table([0, 1, 2], [90, 20, 70], [30, 40, 3])
    options = {"max_num_batched_tokens": 100, "max_num_seqs": 3}
    plain = build_case(deploy(**options), requests, spare_blocks=3).play()
    cut = build_case(deploy(**options, long_prefill_token_threshold=90), requests, spare_blocks=3).play()
    assert plain.log == cut.log


# --- SGLang ---------------------------------------------------------------------------------------------------------


def test_sglang_stops_decoding_for_prompts_and_mixed_chunks_do_not() -> None:
    requests = table([0, 400 * MS], [30, 8000], [200, 2])

    def longest_gap(*, mixed: bool) -> int:
        deployment = deploy(kind="sglang", chunked_prefill_size=500, enable_mixed_chunk=mixed, max_running_requests=8)
        result = build_case(deployment, requests).play()
        assert bool(result.records[0].held_back) is not mixed
        return max(gap_counts(result))

    # 16 chunks in a row against one.
    assert longest_gap(mixed=False) > 10 * longest_gap(mixed=True)


def test_sglang_is_bolder_with_less_conservativeness() -> None:
    running = [
        build_case(
            deploy(kind="sglang", schedule_conservativeness=factor, max_running_requests=64),
            table([i * MS for i in range(40)], [64] * 40, [400] * 40), spare_blocks=2500,
        ).play().records[0].max_running
        for factor in (0.0, 1.0)
    ]  # fmt: skip
    assert running[0] > running[1]


def test_sglang_looks_for_requests_once_in_so_many_decode_steps() -> None:
    latecomer = table([0, 400 * MS], [30, 30], [2000, 5])
    prompt, late = first_token_delays(latecomer, kind="sglang", changed={"scheduler_recv_interval": 50})
    assert prompt == 0
    assert 0 < late < 50


def test_sglang_receives_at_once_where_it_is_idle() -> None:
    burst = table([0, 0, 900 * MS], [30, 30, 30], [5, 5, 5])
    assert first_token_delays(burst, kind="sglang", changed={"scheduler_recv_interval": 50}) == [0, 0, 0]


# --- TensorRT-LLM's waiting -----------------------------------------------------------------------------------------


def first_token_delays(requests: RequestTable, *, kind: str, changed: dict[str, Any]) -> list[float]:
    """How much later first tokens come with some options, in steps of one decoding sequence."""
    plain, other = (
        build_case(deploy(kind=kind, max_num_seqs=8, **more), requests).play() for more in ({}, changed)
    )  # fmt: skip
    step = min(gap_counts(plain))
    return [(late - early) / step for early, late in zip(plain.log.first_token, other.log.first_token, strict=True)]


WAITS = {"batch_wait_timeout_iters": 20, "batch_wait_max_tokens_ratio": 0.9}


def test_a_prompt_waits_for_company_for_so_many_steps() -> None:
    latecomer = table([0, 400 * MS], [30, 30], [2000, 5])
    first, late = first_token_delays(latecomer, kind="tensorrt_llm", changed=WAITS)
    assert first == 0
    assert late == pytest.approx(20, rel=0.02)


@pytest.mark.parametrize("changed", [WAITS | {"batch_wait_max_tokens_ratio": 0.001}, {"batch_wait_timeout_iters": 20}])
def test_enough_tokens_or_no_ratio_wait_for_nothing(changed: dict[str, Any]) -> None:
    latecomer = table([0, 400 * MS], [30, 30], [2000, 5])
    assert first_token_delays(latecomer, kind="tensorrt_llm", changed=changed) == [0, 0]


def test_prompts_wait_only_beside_others_that_decode() -> None:
    burst = table([0, 0, 900 * MS], [30, 30, 30], [5, 5, 5])
    assert first_token_delays(burst, kind="tensorrt_llm", changed=WAITS) == [0, 0, 0]


def test_longest_prefix_goes_first() -> None:
    """While one runs alone, the later request that shares its prefix overtakes the earlier one that does not."""
    head = tuple(range(10))
    hashes = (head, tuple(range(100, 110)), head)
    requests = table([0, 1, 2], [170] * 3, [20] * 3, hashes=hashes)

    def order(policy: str) -> list[int]:
        deployment = deploy(kind="sglang", schedule_policy=policy, max_running_requests=1)
        log = build_case(deployment, requests).play().log
        return sorted(range(3), key=lambda index: log.scheduled[index])

    assert order("fcfs") == [0, 1, 2]
    assert order("lpm") == [0, 2, 1]


# --- llama.cpp ------------------------------------------------------------------------------------------------------


def test_llamacpp_is_one_stream_by_default() -> None:
    requests = table([0, 0, 0], [20] * 3, [10] * 3)
    result = build_case(deploy(kind="llamacpp"), requests).play()
    assert result.records[0].max_running == 1
    assert all(size == 1 for _, size, _, _ in result.records[0].runs)


def test_a_slot_keeps_its_conversation() -> None:
    hashes = tuple(tuple(range(100 * (i % 2), 100 * (i % 2) + 4)) for i in range(6))
    requests = table([i * 5000 * MS for i in range(6)], [66] * 6, [5] * 6, hashes=hashes)
    cached = [
        build_case(deploy(kind="llamacpp", parallel=slots), requests).play().records[0].cached_prompt_tokens
        for slots in (1, 2)
    ]
    # Two speakers in turn: with one slot each overwrites the other, with two all but the first prompts are hits.
    assert cached == [0, 4 * 64]


def test_micro_batches_cost_their_weights_each() -> None:
    requests = table([0], [2000], [1])
    times = [
        build_case(deploy(kind="llamacpp", n_batch=2048, n_ubatch=part), requests).play().end_ticks
        for part in (2048, 512, 32)
    ]
    assert times[0] < times[1] < times[2]


# --- engines agree where their rules do -----------------------------------------------------------------------------


# llama.cpp has neither the other engines' kernels nor their host's work.
@pytest.mark.parametrize("policy", [name for name in POLICIES if "threshold" not in name and "llamacpp" not in name])
def test_one_request_alone_is_the_same_everywhere(policy: str) -> None:
    requests = table([0], [300], [40])
    shared = {"max_num_batched_tokens": 512, "max_num_seqs": 3}
    own = {key: value for key, value in POLICIES[policy].items() if key not in ("page_size", "tokens_per_block")}
    plain = build_case(deploy(max_num_batched_tokens=512, max_num_seqs=3), requests).play()
    result = build_case(deploy(**{**shared, **own, "block_size": 16}), requests).play()
    assert result.log == plain.log
    assert gap_counts(result) == gap_counts(plain)
