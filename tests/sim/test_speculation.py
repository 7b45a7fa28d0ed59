"""Laws of speculative decoding: without drafts the plain engine exactly, the mean length of the draws, coalesced runs
equal to single steps, nothing lost under preemption, the same luck for every strategy, costs that grow as they must.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_invariants import audited, check_schedulers
from sim_cases import ANY_TABLE, MS, Case, build_case, deploy, gap_counts, table

from kvsim.errors import IncompatibleScenario, InvalidSpec, UnknownName
from kvsim.prepare import prepare
from kvsim.scenario import Scenario
from kvsim.sim.acceptance import Acceptance
from kvsim.sim.batch import SequenceState
from kvsim.sim.run import RunResult, run_requests
from kvsim.sim.speculative_batch import SpeculationPlan, SpeculativeBatch
from kvsim.simulate import estimate, simulate
from kvsim.specs.speculation import SpeculativeConfig

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
EAGLE = {"method": "eagle", "num_speculative_tokens": 3, "acceptance_rate": 0.7}
SMALL = {"method": "draft_model", "model": "llama-3.2-1b", "num_speculative_tokens": 3, "acceptance_rate": 0.7}
LOOKUP = {"method": "ngram", "num_speculative_tokens": 3, "acceptance_rate": 0.3}
STRATEGIES = ("native", "fp8", "kivi-2(residual_length=32)", "snapkv(budget_tokens=40,window_size=8)", "quest:32",
              "streaming_llm:24")  # fmt: skip


def with_drafts(case: Case, config: dict[str, Any] | None) -> Case:
    """The same requests and pool with drafts; the resolved draft model comes from the catalogue."""
    spec = None if config is None else SpeculativeConfig(**config)
    engine = case.deployment.engine.model_copy(update={"speculative_config": spec})
    return replace(case, deployment=replace(case.deployment, engine=engine))


@st.composite
def drafted_cases(draw: st.DrawFn, config: dict[str, Any]) -> Case:
    requests = draw(ANY_TABLE)
    seats = draw(st.sampled_from((1, 2, 5)))
    rows = config["num_speculative_tokens"] + 1
    deployment = deploy(
        strategy=draw(st.sampled_from(STRATEGIES)), max_num_seqs=seats, speculative_config=config,
        async_scheduling=draw(st.sampled_from((None, False))),
        scheduling_policy=draw(st.sampled_from(("fcfs", "priority"))),
        max_num_batched_tokens=seats * rows + draw(st.sampled_from((0, 9, 500))),
    )  # fmt: skip
    return build_case(deployment, requests, spare_blocks=draw(st.sampled_from((0, 1, 3, 12, 10_000))))


def same(one: RunResult, other: RunResult) -> None:
    assert one.log == other.log
    assert gap_counts(one) == gap_counts(other)
    for mine, theirs in zip(one.records, other.records, strict=True):
        assert (mine.prefill, mine.decode) == (theirs.prefill, theirs.decode)
        for name in ("preemptions", "recomputed_tokens", "min_free_bytes", "max_running", "verifications"):
            assert getattr(mine, name) == getattr(theirs, name), name


# --- special cases equal the plain engine ---------------------------------------------------------------------------


@FEW
@given(data=st.data(), method=st.sampled_from(("ngram", "eagle", "mtp")))
def test_no_drafts_are_the_plain_engine_exactly(data: st.DataObject, method: str) -> None:
    case = data.draw(drafted_cases({"method": method, "num_speculative_tokens": 0}))
    drafted, plain = case.play(), with_drafts(case, None).play()
    assert drafted.log == plain.log
    assert gap_counts(drafted) == gap_counts(plain)
    for mine, theirs in zip(drafted.records, plain.records, strict=True):
        assert (mine.prefill, mine.decode) == (theirs.prefill, theirs.decode)
        assert (mine.preemptions, mine.min_free_bytes) == (theirs.preemptions, theirs.min_free_bytes)


@FEW
@given(data=st.data())
def test_drafts_that_are_never_accepted_give_one_token_a_step(data: st.DataObject) -> None:
    case = data.draw(drafted_cases({"method": "ngram", "num_speculative_tokens": 2, "acceptance_rate": 0.0}))
    result = case.play()
    wanted = int((case.requests.output_tokens[case.admitted] - 1).sum())
    resumed = sum(len(record.gaps) for record in result.records)
    assert sum(record.verified_tokens for record in result.records) == wanted - resumed
    assert sum(record.verifications for record in result.records) == wanted - resumed


def test_drafts_that_are_always_accepted_need_a_quarter_of_the_steps() -> None:
    requests = table([0, 0], [64, 100], [41, 41])
    case = build_case(deploy(speculative_config={**LOOKUP, "acceptance_rate": 1.0}), requests)
    (record,) = case.play().records
    assert record.verifications == 2 * 10
    assert record.verified_tokens == 2 * 40


# --- runs of steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [EAGLE, LOOKUP, SMALL], ids=lambda config: config["method"])
@FEW
@given(data=st.data())
def test_coalesced_equals_step_by_step(config: dict[str, Any], data: st.DataObject) -> None:
    case = data.draw(drafted_cases(config))
    same(case.play(), case.play(coalesce=False))


@pytest.mark.parametrize("config", [EAGLE, LOOKUP], ids=lambda config: config["method"])
@FEW
@given(data=st.data())
def test_every_token_comes_out_once(config: dict[str, Any], data: st.DataObject) -> None:
    case = data.draw(drafted_cases(config))
    with audited() as schedulers:
        result = case.play()
    check_schedulers(schedulers)
    log, gaps = result.log, gap_counts(result)
    admitted = np.flatnonzero(case.admitted)
    resumed = sum(len(record.gaps) for record in result.records)
    verified = sum(record.verified_tokens for record in result.records)
    assert verified + resumed == sum(int(case.requests.output_tokens[i]) - 1 for i in admitted)
    # A step's tokens come out together, so gaps are between steps; their sum is still the time of decoding.
    assert sum(ticks * count for ticks, count in gaps.items()) == sum(
        log.finished[i] - log.first_token[i] for i in admitted
    )


# --- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "count"), [(0.0, 3), (0.5, 1), (0.7, 4), (0.9, 8), (1.0, 2)])
def test_mean_length_is_leviathan_s(rate: float, count: int) -> None:
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=count, acceptance_rate=rate)
    expected = count + 1 if rate == 1 else (1 - rate ** (count + 1)) / (1 - rate)
    assert config.mean_length == pytest.approx(expected)
    advances = Acceptance(config.survival, 7).advances(3, 0, 200_000)
    assert advances.sum() == 200_000
    # Draws of one length have a standard deviation of at most (count + 1) / 2.
    assert advances[:-1].mean() == pytest.approx(expected, abs=4 * (count + 1) / 2 / len(advances) ** 0.5)


def test_rates_by_position_and_a_length_say_the_same() -> None:
    config = SpeculativeConfig(method="eagle", num_speculative_tokens=3, acceptance_rate=(0.9, 0.6, 0.5))
    assert config.survival == pytest.approx((0.9, 0.54, 0.27))
    by_length = SpeculativeConfig(method="eagle", num_speculative_tokens=3, acceptance_length=config.mean_length)
    assert by_length.mean_length == pytest.approx(config.mean_length)
    assert len(set(by_length.rates)) == 1


@given(first=st.integers(0, 40), tokens=st.integers(1, 60), request=st.integers(0, 10**6))
def test_draws_belong_to_the_request_and_its_verification(first: int, tokens: int, request: int) -> None:
    draws = Acceptance((0.8, 0.5), 11)
    whole = draws.advances(request, 0, 400)
    part = draws.advances(request, first, tokens)
    assert part.sum() == tokens
    assert (part[:-1] == whole[first : first + len(part) - 1]).all()
    assert 1 <= part[-1] <= whole[first + len(part) - 1]


def test_every_strategy_has_the_same_luck_and_seeds_differ() -> None:
    requests = table([i * MS for i in range(8)], [90] * 8, [60] * 8)

    def verifications(strategy: str, seed: int) -> int:
        case = build_case(deploy(strategy=strategy, speculative_config=EAGLE), requests)
        result = run_requests(case.deployment, case.requests, case.plan, case.max_model_len, seed=seed)
        return result.records[0].verifications

    assert verifications("native", 0) == verifications("kivi-2", 0) == verifications("snapkv", 0)
    assert len({verifications("native", seed) for seed in range(5)}) > 1


# --- what it costs --------------------------------------------------------------------------------------------------


def decode_ticks(batch: int, config: dict[str, Any] | None, strategy: str = "native", prompt: int = 2000) -> int:
    """Time from the first token on of equal requests at once."""
    requests = table([0] * batch, [prompt] * batch, [200] * batch)
    deployment = deploy(
        strategy=strategy, max_num_seqs=batch, max_num_batched_tokens=batch * prompt, speculative_config=config
    )
    log = build_case(deployment, requests).play().log
    return max(log.finished) - max(log.first_token)


def test_the_gain_falls_with_the_batch() -> None:
    gains = [decode_ticks(batch, None, prompt=100) / decode_ticks(batch, LOOKUP | {"acceptance_rate": 0.8}, prompt=100)
             for batch in (1, 32, 256)]  # fmt: skip
    assert gains[0] > 2 > gains[-1]
    assert gains == sorted(gains, reverse=True)


def test_more_accepted_drafts_never_take_longer() -> None:
    times = [decode_ticks(4, {**EAGLE, "acceptance_rate": rate}) for rate in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert times == sorted(times, reverse=True)


def test_a_bigger_drafter_costs_more() -> None:
    times = [
        decode_ticks(4, {"acceptance_rate": 1.0, "num_speculative_tokens": 3, **who})
        for who in (
            {"method": "ngram"}, {"method": "eagle"}, {"method": "draft_model", "model": "llama-3.2-1b"},
            {"method": "draft_model", "model": "llama-3.1-8b"},
        )
    ]  # fmt: skip
    assert times == sorted(times)
    assert len(set(times)) == 4


def test_compressed_kv_is_unpacked_once_a_step() -> None:
    """With drafts that are all accepted, unpacking falls as the steps do."""
    requests = table([0], [4000], [201])
    records = [
        build_case(deploy(strategy="kivi-2", max_num_batched_tokens=8192, speculative_config=config), requests)
        .play().records[0]
        for config in (None, {**LOOKUP, "acceptance_rate": 1.0})
    ]  # fmt: skip
    assert records[1].decode.compression < 0.3 * records[0].decode.compression


def test_drafts_take_blocks_ahead() -> None:
    due = []
    for ahead in (0, 8, 16):
        plan = SpeculationPlan(Acceptance((0.5,) * 8, 1), 8, ahead, 1000, None)
        batch = SpeculativeBatch(block_size=8, block_bytes=10, token_ticks=1, plan=plan)
        batch.join(SequenceState(0, 64), 40)
        due.append(batch.due_bytes())
    # 64 tokens fill 8 blocks; the next one needs another, with 8 or 16 more after it two or three.
    assert due == [10, 20, 30]


# --- scenarios ------------------------------------------------------------------------------------------------------


def scenario(config: dict[str, Any] | None, **engine: Any) -> Scenario:
    stages = engine.pop("pipeline", 1)
    return Scenario(
        model="llama-3.1-8b", device="h100-sxm", workload="chat", bands=False, pipeline_parallel_size=stages,
        engine={"speculative_config": config, **engine},
    )  # fmt: skip


def test_the_report_says_how_far_drafts_carried() -> None:
    report = simulate(scenario(EAGLE))
    assert report.speculation is not None
    assert report.speculation.acceptance_length == pytest.approx(
        report.speculation.expected_acceptance_length, rel=0.03
    )
    assert 0 < (report.speculation.drafting_share or 0) < 0.5
    plain = simulate(scenario(None))
    assert plain.speculation is None
    assert (report.latency.tpot.mean_s.value or 0) < (plain.latency.tpot.mean_s.value or 0)


def test_the_drafter_takes_memory() -> None:
    blocks = [prepare(scenario(config)).plan.num_blocks for config in (None, LOOKUP, EAGLE, SMALL)]
    assert blocks[0] == blocks[1] > blocks[2] > blocks[3]


def test_the_closed_form_refuses_drafts() -> None:
    with pytest.raises(IncompatibleScenario, match="speculative_config: the closed form has no drafts"):
        estimate(scenario(EAGLE))


@pytest.mark.parametrize(
    ("config", "engine", "error", "message"),
    [
        ({**SMALL, "model": "llama-3.2-1bb"}, {}, UnknownName, "engine.speculative_config.model: .*llama-3.2-1b"),
        (EAGLE, {"pipeline": 2}, IncompatibleScenario, "drafts are priced for one lane"),
        (EAGLE, {"max_num_seqs": 256, "max_num_batched_tokens": 512}, InvalidSpec, "max_num_seqs x .* = 1024"),
    ],
)
def test_scenarios_that_cannot_work_are_refused(
    config: dict[str, Any], engine: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare(scenario(config, **engine))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "eagle", "num_speculative_tokens": 2}, "give acceptance_rate or acceptance_length"),
        ({**EAGLE, "acceptance_length": 2.0}, "give acceptance_rate or acceptance_length, one of them"),
        ({**EAGLE, "acceptance_rate": (0.5, 0.4)}, "has 2 positions, and num_speculative_tokens is 3"),
        ({**EAGLE, "acceptance_rate": None, "acceptance_length": 5.0}, "exceeds num_speculative_tokens"),
        ({**EAGLE, "model": "llama-3.2-1b"}, "model names the draft model of method draft_model"),
        ({**SMALL, "model": None}, "method draft_model needs model"),
    ],
)
def test_configurations_that_cannot_work_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig(**config)
