"""What planning a step ahead changes: when a prompt gets its turn, and when a seat and its blocks are free again."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from run_invariants import check_run
from sim_cases import MS, Case, build_case, deploy, step_model, table

from kvsim.cost.tables import build_tables
from kvsim.sim.build import host_work_ticks
from kvsim.sim.run import RunResult
from kvsim.specs.engine import EngineSpec, SamplingSpec
from kvsim.units import TICKS_PER_SECOND


def play(case: Case) -> RunResult:
    result = case.play()
    check_run(case, result)
    return result


def newcomers(ahead: bool, count: int = 60) -> tuple[RunResult, int, float]:
    """Eight long answers, and short prompts of one token each that come among them at odd times.

    With them, the ticks of a step, and by how much a step with such a prompt is longer, as a share.
    """
    greedy = SamplingSpec(temperature=0.0)
    deployment = deploy(async_scheduling=ahead, max_num_seqs=64, sampling=greedy)
    # Squares spread over the steps evenly, whatever their length.
    arrivals = [0] * 8 + [500 * MS + i * 40 * MS + i * i * 7_654_321_987 % (8 * MS) for i in range(count)]
    result = play(build_case(deployment, table(arrivals, [64] * 8 + [4] * count, [900] * 8 + [1] * count)))
    (record,) = result.records
    middle = [first for steps, size, first, _ in record.runs if size == 8 and steps > 1]
    mixed = sorted(first for steps, size, first, _ in record.runs if size == 8 and steps == 1)
    step = middle[len(middle) // 2]
    return result, step, mixed[len(mixed) // 2] / step - 1.0


@pytest.mark.parametrize(("ahead", "steps"), [(False, 1.5), (True, 2.5)])
def test_a_short_prompt_among_decodes_waits_half_a_step_and_the_queued_ones(ahead: bool, steps: float) -> None:
    """The rest of the running step, half of one on average, then its own; and one queued step if planned ahead."""
    result, step_ticks, longer = newcomers(ahead)
    waited = (np.array(result.log.first_token[8:]) - np.array(result.log.arrived[8:])) / step_ticks
    assert steps - 0.5 < waited.min()
    assert waited.max() < steps + longer + 0.55
    assert waited.mean() == pytest.approx(steps + longer, abs=0.12)


def test_an_idle_engine_starts_at_once_and_takes_the_same_time() -> None:
    """Alone, a request has nothing to wait for: both ways of scheduling give it the same life, but for host work."""
    lives = []
    for ahead in (False, True):
        result = play(build_case(deploy(async_scheduling=ahead), table([5 * MS], [100], [50])))
        log = result.log
        assert log.scheduled == log.arrived == [5 * MS]
        lives.append(log.finished[0] - log.arrived[0] - result.records[0].host_ticks)
    assert lives[0] == lives[1]


def test_the_second_step_is_planned_right_behind_the_first() -> None:
    """Who comes during an idle engine's first step is in its third."""
    deployment = deploy(async_scheduling=True)
    requests = table([0, 1], [64, 64], [20, 20])
    log = play(build_case(deployment, requests)).log
    alone = play(build_case(deployment, table([0], [64], [20]))).log
    assert log.first_token[0] == alone.first_token[0] == log.scheduled[1], "planned when the second step starts"
    assert log.first_token[1] > log.scheduled[1]


def test_a_seat_is_free_for_the_plan_after_the_one_that_ran_beside_its_end() -> None:
    """One seat: the next request starts when the last token is out; nothing was queued behind it."""
    for ahead in (False, True):
        log = play(build_case(deploy(async_scheduling=ahead, max_num_seqs=1), table([0, 0], [9, 9], [5, 5]))).log
        assert log.scheduled[1] == log.finished[0]


def test_with_others_decoding_a_freed_seat_is_taken_one_step_later() -> None:
    """Two seats, one taken for long: the newcomer's prompt starts a step after the seat is free."""
    requests = table([0, 0, 0], [9, 9, 9], [200, 20, 1])
    late, work = [], host_work_ticks(step_model(deploy(max_num_seqs=2)))[2]
    for ahead in (False, True):
        case = build_case(deploy(async_scheduling=ahead, max_num_seqs=2), requests)
        log = play(case).log
        assert log.scheduled[2] == log.finished[1]
        late.append(log.first_token[2] - log.finished[1])
    step = step_model(case.deployment)
    decode = build_tables(step, 64, 2).step[1]
    assert decode < late[1] - (late[0] - work) < 1.05 * decode


def test_host_work_shows_in_every_synchronous_step_and_only_in_short_asynchronous_ones() -> None:
    count = 200
    for model, hidden in (("qwen2.5-0.5b", False), ("llama-3.1-8b", True)):
        requests = table([0] * count, [8] * count, [30] * count) if not hidden else table([0], [64], [101])
        ahead, behind = (
            play(build_case(deploy(model, async_scheduling=ahead), requests)).records[0] for ahead in (True, False)
        )
        work = host_work_ticks(step_model(deploy(model)))
        assert behind.host_ticks == behind.steps * work[len(requests)]
        assert (ahead.host_ticks == 0) is hidden
        assert ahead.host_ticks < behind.host_ticks
        device_ticks = behind.decode.total + behind.prefill.total - behind.host_ticks
        assert ahead.decode.total + ahead.prefill.total - ahead.host_ticks == device_ticks
        if not hidden:
            assert all(first == work[size] for _, size, first, _ in ahead.runs)


def test_engines_defaults() -> None:
    assert EngineSpec().schedules_ahead
    assert not EngineSpec(async_scheduling=False).schedules_ahead
    assert not EngineSpec(kind="llamacpp").schedules_ahead
    assert not any(host_work_ticks(step_model(deploy(kind="llamacpp"))))
    with pytest.raises(ValueError, match="its server runs one batch after the other"):
        EngineSpec(kind="llamacpp", async_scheduling=True)


# --- the front end --------------------------------------------------------------------------------------------------


def test_the_front_end_adds_its_time_to_every_request_and_to_no_gap() -> None:
    """Arrivals shift by what comes before the engine, answers by what comes after; the engine does the same."""
    requests = table([0, 40 * MS, 41 * MS], [64, 30, 30], [20, 9, 1])
    plain, fronted = (play(build_case(deploy(request_overhead_s=seconds), requests)) for seconds in (0.0, 0.008))
    assert fronted.log.egress_ticks == 4 * MS
    assert fronted.log.sent == plain.log.sent == plain.log.arrived
    assert fronted.log.arrived == [sent + 4 * MS for sent in fronted.log.sent]
    assert fronted.log.finished == [ticks + 4 * MS for ticks in plain.log.finished]
    for one, other in zip(fronted.log.client_seconds(), plain.log.client_seconds(), strict=True):
        assert np.allclose(one - other, 0.0 if one[0] == 0 else 0.008)
    assert fronted.records == plain.records


def test_a_client_sends_on_when_the_last_token_has_reached_it() -> None:
    case = build_case(
        deploy(request_overhead_s=0.01), table([0, -1], [10, 10], [3, 3], parents=[-1, 0], delays=[0, MS])
    )
    log = play(case).log
    assert log.sent[1] == log.finished[0] + 5 * MS + MS
    assert log.arrived[1] == log.sent[1] + 5 * MS


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("released", [False, True])
def test_one_server_lets_requests_through_in_order_and_no_faster_than_it_can(replicas: int, released: bool) -> None:
    """A burst of 20 at 100 requests/s is spread over 190 ms, with or without requests that others release."""
    count = 20
    parents, arrivals = [-1] * count, [0] * count
    if released:
        parents, arrivals = [-1] * (count - 1) + [0], [0] * (count - 1) + [-1]
    deployment = deploy(front_end_requests_per_s=100.0, request_overhead_s=0.002, replicas=replicas)
    case = build_case(deployment, table(arrivals, [10] * count, [30] * count, parents=parents))
    log = play(case).log
    turns = sorted(log.arrived)
    if not released:
        assert turns == [MS + i * 10 * MS for i in range(count)]
    assert all(later - earlier >= 10 * MS for earlier, later in itertools.pairwise(turns))
    assert log.sent[:-1] == [0] * (count - 1)


def test_a_front_end_never_speeds_anything_up() -> None:
    rng = np.random.default_rng(3)
    count = 60
    arrivals = np.sort(rng.integers(0, 2 * TICKS_PER_SECOND, count)).tolist()
    requests = table(arrivals, rng.integers(1, 200, count).tolist(), rng.integers(1, 60, count).tolist())
    base = build_case(deploy(), requests)
    mean_s = []
    for rate in (None, 1000.0, 40.0, 10.0):
        engine = base.deployment.engine.model_copy(update={"front_end_requests_per_s": rate})
        sent, _, last = play(replace(base, deployment=replace(base.deployment, engine=engine))).log.client_seconds()
        mean_s.append((last - sent).mean())
    assert mean_s == sorted(mean_s)
