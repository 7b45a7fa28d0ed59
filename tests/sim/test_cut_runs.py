"""Caches that are cut back while they decode, in whole runs: sums of steps, blocks, and what the estimate says."""

from __future__ import annotations

import numpy as np
import pytest
from sim_cases import build_case, deploy, step_model, table

from kvsim.closed_form import decode_split, prefill_split, total_seconds
from kvsim.ops import Component
from kvsim.pool import prompt_bytes
from kvsim.units import TICKS_PER_SECOND

CUTTING = (
    "rkv:64(compression_interval=32)", "infokv:100(compression_interval=50)", "decoding:80(compression_interval=40)",
    "prefill_decoding:64(decoding=rkv,compression_interval=128)", "rkv:64(compression_interval=32)+fp8",
    "rkv:64(compression_interval=32)+kivi-2(residual_length=32)", "rkv:20(compression_interval=1)",
)  # fmt: skip


@pytest.mark.parametrize("prompt", [10, 64, 300])
@pytest.mark.parametrize("strategy", CUTTING)
def test_a_request_alone_takes_the_sum_of_its_steps_to_the_tick(strategy: str, prompt: int) -> None:
    deployment, steps = deploy(strategy=strategy), 500
    result = build_case(deployment, table([0], [prompt], [steps + 1]), spare_blocks=200).play()
    step = step_model(deployment)
    (record,), log = result.records, result.log
    whole, unpack = step.sequences.profile(prompt).total_ticks(steps)
    fixed = sum(total_seconds(decode_split(step, 1, prompt, 0)) for _ in range(1))
    fixed_ticks = round(fixed * TICKS_PER_SECOND) - step.sequences.profile(prompt).typical_ticks(0)[0]
    taken = log.finished[0] - log.first_token[0]
    assert taken - whole == pytest.approx(steps * fixed_ticks, abs=2 * steps)
    assert (taken - whole) % steps == 0
    assert record.decode.compression >= unpack


@pytest.mark.parametrize("strategy", CUTTING)
def test_the_estimate_of_a_step_is_the_mean_of_a_period(strategy: str) -> None:
    """Whole periods played out, against as many times the step that an estimate takes."""
    deployment = deploy(strategy=strategy)
    interval = deployment.compression.selection.compression_interval
    step, prompt, rounds = step_model(deployment), 300, 3
    profile = step.sequences.profile(prompt)
    begin = profile.repeat.start_step if profile.repeat else 1
    played = profile.total_ticks(begin + rounds * interval)[0] - profile.total_ticks(begin)[0]
    assert rounds * interval * profile.typical_ticks(begin)[0] == pytest.approx(played, abs=rounds * interval)
    seconds = decode_split(step, 1, prompt, begin)
    assert total_seconds(seconds) > played / (rounds * interval) / TICKS_PER_SECOND


@pytest.mark.parametrize("strategy", CUTTING)
def test_the_work_of_all_cuts_is_what_the_cuts_cost(strategy: str) -> None:
    """Amortised: the compression part of a whole period is one cut, beside what its tokens take."""
    deployment = deploy(strategy=strategy.partition("+")[0])
    interval = deployment.compression.selection.compression_interval
    profile = step_model(deployment).sequences.profile(10)
    begin = profile.repeat.start_step if profile.repeat else 400
    one, ten = (profile.total_ticks(begin + rounds * interval)[1] - profile.total_ticks(begin)[1] for rounds in (1, 10))
    assert one > 0
    assert ten == 10 * one


@pytest.mark.parametrize("strategy", CUTTING)
def test_requests_in_a_small_pool_finish_and_give_all_back(strategy: str) -> None:
    """The run's own checks see to blocks; runs of steps and single steps are the same run."""
    deployment = deploy(strategy=strategy, max_num_batched_tokens=2048)
    rng = np.random.default_rng(3)
    count = 12
    arrivals = np.cumsum(rng.integers(0, 10**10, count)).tolist()
    requests = table(arrivals, rng.integers(1, 200, count).tolist(), rng.integers(1, 300, count).tolist())
    case = build_case(deployment, requests, spare_blocks=24)
    whole, single = case.play(), case.play(coalesce=False)
    assert whole.log.finished == single.log.finished
    assert [record.min_free_bytes for record in whole.records] == [r.min_free_bytes for r in single.records]


def test_blocks_that_a_cut_empties_serve_others() -> None:
    """Four long prompts that are cut together make room for a fifth while they all decode."""
    deployment = deploy(strategy="decoding:80(decoding=rkv,compression_interval=40)", block_size=16)
    # Each holds 28 blocks right before its first cut, and one of queries; the longest without cuts 38 and that one.
    case = build_case(deployment, table([0] * 5, [400] * 5, [200] * 5), spare_blocks=4 * 29 - 39)
    result, size = case.play(), deployment.engine.block_size
    log, profile = result.log, step_model(deployment).sequences.profile(400)
    pool = case.plan.num_blocks * case.plan.block_bytes
    assert (
        4 * profile.peak_bytes(200, size) <= pool < 4 * profile.resident_bytes(0, size) + prompt_bytes(deployment, 400)
    )
    assert max(log.first_token[:4]) < log.first_token[4] < min(log.finished[:4])
    assert result.records[0].preemptions == 0


def test_time_of_cuts_counts_as_compression() -> None:
    slow, fast = deploy(strategy="rkv:64(compression_interval=8)"), deploy(strategy="rkv:64(compression_interval=64)")
    shares = [decode_split(step_model(one), 1, 64, 400)[Component.COMPRESSION] for one in (slow, fast)]
    assert shares[0] > 4 * shares[1] > 0
    assert total_seconds(prefill_split(step_model(slow), 64)) > 0
