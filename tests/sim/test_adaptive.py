"""Laws of adaptive compression: special cases are the plain runs, and nothing is lost between levels."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace
from unittest import mock

import pytest
from adaptive_cases import KEEPING, adapt, adaptive_cases, audited_levels, classed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_invariants import check_run, check_schedulers
from sim_cases import MODELS, MS, STRATEGIES, Case, build_case, deploy, shared_tables, step_model, table, talk_tables
from test_coalescing import assert_same

from kvsim.cost.mixed import mixed_prices, reencoding
from kvsim.cost.priors import Edge
from kvsim.cost.tables import build_tables
from kvsim.pool import block_bytes
from kvsim.requests import RequestTable
from kvsim.sim import build
from kvsim.sim.adaptive.batch import AdaptiveBatch, LevelledSequence
from kvsim.sim.adaptive.prefix_cache import LevelledPrefixCache
from kvsim.sim.adaptive.prices import level_prices
from kvsim.sim.adaptive.record import AdaptiveRecord
from kvsim.sim.run import RunResult

QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
BURST = table([0, 0, 5 * MS, 40 * MS, 41 * MS, 90 * MS], [60, 200, 31, 120, 16, 75], [40, 64, 90, 17, 120, 33])
NEVER = {"kind": "pressure", "high_watermark": 1.0, "low_watermark": 0.0}


def record_of(result: RunResult, replica: int = 0) -> AdaptiveRecord:
    record = result.records[replica].adaptive
    assert record is not None
    return record


def tokens_of(result: RunResult) -> int:
    return sum(sum(map(sum, record.adaptive.tokens)) for record in result.records if record.adaptive)


def assert_equal_runs(one: RunResult, other: RunResult) -> None:
    assert_same(one, other)
    assert [record.runs for record in one.records] == [record.runs for record in other.records]


# --- special cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_watermarks_that_are_never_reached_are_level_0(strategy: str) -> None:
    other = "fp8" if strategy != "fp8" else "native"
    deployment = adapt((strategy, other), {"policy": NEVER}, max_num_batched_tokens=128, max_num_seqs=4)
    case = build_case(deployment, BURST)
    plain = replace(case, deployment=replace(deployment.levels[0], prefix_caching=deployment.prefix_caching))
    result = case.play()
    assert_equal_runs(result, plain.play())
    assert record_of(result).actions == []


@given(requests=st.one_of(shared_tables(), talk_tables()), spare_blocks=st.sampled_from((0, 3, 10_000)))
@settings(QUICK, max_examples=40)
def test_one_level_shares_prefixes_as_the_plain_engine(requests: RequestTable, spare_blocks: int) -> None:
    adaptive = {"policy": {"kind": "static", "level": 1}, "classes": {"absent": {"max_level": 0}}}
    deployment = adapt(("native", "fp8"), adaptive, max_num_batched_tokens=128, max_num_seqs=4)
    case = build_case(deployment, classed(requests, [0] * len(requests), ("present",)), spare_blocks=spare_blocks)
    assert_equal_runs(case.play(), replace(case, deployment=deployment.levels[1]).play())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("spare_blocks", [2, 10_000])
def test_a_class_that_is_held_at_a_level_is_served_as_by_that_level(strategy: str, spare_blocks: int) -> None:
    other = "fp8" if strategy != "fp8" else "native"
    adaptive = {"policy": {"kind": "static", "level": 1}, "classes": {"absent": {"max_level": 0}}}
    deployment = adapt((other, strategy), adaptive, max_num_batched_tokens=128, max_num_seqs=4)
    assert deployment.adaptive.only_level is None
    case = build_case(deployment, classed(BURST, [0] * len(BURST), ("present", "absent")), spare_blocks=spare_blocks)
    plain = replace(case, deployment=deployment.levels[1])
    result = case.play()
    assert_equal_runs(result, plain.play())
    assert record_of(result).tokens[0][0] == 0


def test_a_policy_acts_where_it_should() -> None:
    deployment = adapt(
        ("native", "fp8", "int4_per_token_head"),
        {
            "policy": {"kind": "pressure", "high_watermark": 0.6, "low_watermark": 0.3, "min_dwell_s": 0.001},
            "requantize": {},
        },
        max_num_batched_tokens=512,
        max_num_seqs=8,
    )
    requests = table([i * 2 * MS for i in range(12)] + [3000 * MS], [64] * 13, [160] * 13)
    case = build_case(deployment, requests, spare_blocks=40)
    result = case.play()
    actions = record_of(result).actions
    assert [action.to_level - action.from_level for action in actions].count(1) >= 2
    assert any(action.sequences and action.freed_bytes > 0 for action in actions)
    assert actions[-1].to_level == 0
    assert actions[-1].at_ticks < requests.arrival_ticks[-1]
    assert all(b.at_ticks - a.at_ticks >= MS for a, b in itertools.pairwise(actions))
    assert record_of(result).prompts[0] >= 2


# --- any run --------------------------------------------------------------------------------------------------------


def play_both(case: Case) -> RunResult:
    with audited_levels() as schedulers:
        coalesced, stepped = case.play(), case.play(coalesce=False)
    check_run(case, coalesced, in_order=case.deployment.engine.scheduling_policy == "fcfs")
    assert_same(coalesced, stepped)
    for one, other in zip(coalesced.records, stepped.records, strict=True):
        assert one.adaptive == other.adaptive
    check_schedulers(schedulers)
    outputs = case.requests.output_tokens[case.admitted]
    resumed = sum(step[2] for record in coalesced.records for step in record.prompts) - int(case.admitted.sum())
    assert tokens_of(coalesced) == int(outputs.sum()) - int(case.admitted.sum()) - resumed
    return coalesced


@given(case=adaptive_cases(pressed=True))
@settings(QUICK, max_examples=250)
def test_laws_hold_under_memory_pressure(case: Case) -> None:
    result = play_both(case)
    adaptive = case.deployment.adaptive
    for record in map(record_of, [result]):
        for action in record.actions:
            assert abs(action.to_level - action.from_level) == (0 if action.sequences else 1)
            assert action.freed_bytes > 0 or not action.sequences
            assert adaptive.requantize is not None or not action.sequences


@given(case=adaptive_cases(pressed=False))
@settings(QUICK, max_examples=120)
def test_laws_hold_on_every_kind_of_load(case: Case) -> None:
    play_both(case)


@given(case=adaptive_cases(pressed=True), share=st.sampled_from((0.9, 1.0, 1.02)))
@settings(QUICK, max_examples=40)
def test_laws_hold_where_the_host_is_as_slow_as_the_device(case: Case, share: float) -> None:
    engine = case.deployment.engine
    step = build_tables(step_model(case.deployment), engine.max_num_batched_tokens, engine.max_num_seqs).step
    with mock.patch.object(build, "host_work_ticks", return_value=[round(share * ticks) for ticks in step]):
        play_both(case)


@given(case=adaptive_cases(pressed=True))
@settings(QUICK, max_examples=15)
def test_equal_runs_act_alike(case: Case) -> None:
    one, other = case.play(), case.play()
    assert one.log == other.log
    assert [r.adaptive for r in one.records] == [r.adaptive for r in other.records]


@given(case=adaptive_cases(pressed=True))
@settings(QUICK, max_examples=40)
def test_classes_stay_in_their_range(case: Case) -> None:
    adaptive, names = case.deployment.adaptive, case.requests.class_names
    for record in case.play().records:
        for name, tokens in zip(names, record.adaptive.tokens, strict=False):
            low, high = adaptive.bounds(name)
            assert not any(count for level, count in enumerate(tokens) if not low <= level <= high)


# --- prices of mixtures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_mixture_costs_one_launch_per_format(model: str) -> None:
    levels = (
        ("native", "fp8") if model.startswith("deepseek") else ("native", "fp8", "int4_per_token_head", "snapkv+fp8")
    )
    if model == "deepseek-v3.2":
        levels = ("native", "native")
    steps = [step_model(deploy(model, level)) for level in levels]
    tables = [build_tables(step, 8, 8) for step in steps]
    mixed = mixed_prices(steps, tables)
    for level in range(len(levels)):
        assert mixed.shared_attention[1 << level] == mixed.shared_compression[1 << level] == 0
        assert mixed.append_launch[1 << level] == tables[level].append_launch
    if len(levels) == 4:
        fp8_twice = 0b1010
        launch = 2 * tables[1].attention_fixed[1] - tables[1].attention_fixed[2]
        assert mixed.shared_attention[fp8_twice] == pytest.approx(launch, rel=1e-6)
        assert mixed.append_launch[fp8_twice] == tables[1].append_launch
    if levels == ("native", "native"):
        launch = 2 * tables[0].attention_fixed[1] - tables[0].attention_fixed[2]
        assert mixed.shared_attention[0b11] == pytest.approx(launch, rel=1e-6)


def test_levels_with_nothing_in_common_share_nothing() -> None:
    steps = [step_model(deploy("llama-3.1-8b", level)) for level in ("native", "fp8", "int4_per_token_head")]
    mixed = mixed_prices(steps, [build_tables(step, 4, 4) for step in steps])
    assert not any(mixed.shared_attention)
    assert not any(mixed.shared_compression)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "gpt-oss-20b", "gemma-3-1b"])
@pytest.mark.parametrize("strategy", KEEPING)
def test_a_cache_that_keeps_all_tokens_goes_on_from_its_length(model: str, strategy: str) -> None:
    """Why a sequence that is encoded again can be taken for one whose prompt was everything so far."""
    sequences = step_model(deploy(model, strategy)).sequences
    for prompt in (5, 130, 1100):
        whole = sequences.profile(prompt)
        for steps in (1, 16, 77, 500):
            rest = sequences.profile(prompt + steps)
            for later in (0, 1, 300):
                assert whole.resident_bytes(steps + later, 16) == rest.resident_bytes(later, 16)


def test_encoding_again_costs_at_least_its_bytes_and_grows_with_tokens() -> None:
    native, fp8, int4 = (
        step_model(deploy("llama-3.1-8b", level)) for level in ("native", "fp8", "int4_per_token_head")
    )
    for source, target in ((native, fp8), (native, int4), (fp8, int4)):
        price = reencoding(source, target)
        moved = sum(
            layer.encoding.bytes_per_token(layer.group, native.deployment.model.dtype).total_bytes * layers
            for step in (source, target)
            for layer in step.deployment.layer_classes
            for _, layers in layer.bands
        )
        assert price.ticks(1000) >= 1000 * moved / native.deployment.device.bandwidth_bytes_per_s * 1e12
        assert price.ticks(2000) == pytest.approx(2 * price.ticks(1000), abs=1)
        assert price.launch_ticks > 0
    same = reencoding(fp8, fp8)
    assert (same.ticks(1000), same.launch_ticks) == (0, 0)


def test_a_larger_pool_may_act_more_often() -> None:
    """Not a law, and why the documents do not claim it: one block more is room for a request that fills it again."""
    policy = {"kind": "pressure", "high_watermark": 0.75, "low_watermark": 0.5, "min_dwell_s": 0.0}
    deployment = adapt(("native", "fp8"), {"policy": policy}, max_num_batched_tokens=128, max_num_seqs=8)
    requests = table([16 * MS, 65 * MS, 145 * MS, 195 * MS], [16, 32, 32, 32], [64, 32, 16, 16])
    tightened = []
    for spare_blocks in (2, 3, 8):
        actions = record_of(build_case(deployment, requests, spare_blocks=spare_blocks).play()).actions
        tightened.append(sum(action.to_level > action.from_level for action in actions))
    assert tightened[0] < tightened[1] > tightened[2]


# --- parts ----------------------------------------------------------------------------------------------------------


def test_sequences_that_are_encoded_again_keep_their_place() -> None:
    """Who gives way to pressure is the latest arrival, not whoever was encoded again last."""
    deployment = adapt(("native", "fp8"), {"requantize": {}}, max_num_batched_tokens=64, max_num_seqs=8)
    step = step_model(deployment.levels[0])
    prices = level_prices(deployment, Edge.CENTRAL, (step, build_tables(step, 64, 8)))
    batch = AdaptiveBatch(16, prices, None, AdaptiveRecord(2, 1, 0))
    waiting = [
        LevelledSequence(index, 40 + index, 0, prices.steps[0].sequences.profile(40 + index)) for index in range(3)
    ]
    for sequence in waiting:
        batch.join(sequence, 5)
    batch.advance(2)
    first = waiting[0]
    batch.remove(first)
    again = LevelledSequence(0, 42, 1, prices.steps[1].sequences.profile(42))
    batch.join(again, 3)
    again.order = first.order
    batch.reorder([0, 1, 2])
    assert list(batch.active) == [0, 1, 2]
    assert [heapq.heappop(batch.finishing)[2] for _ in range(3)] == [again, *waiting[1:]]
    assert not batch.finishing


# --- prefix caches of several levels --------------------------------------------------------------------------------


def test_levels_share_the_order_of_forgetting_and_nothing_else() -> None:
    cache = LevelledPrefixCache((100, 50))
    loose, tight = cache.levels
    for one in (loose, tight):
        assert one.insert(7)
        assert one.insert(8)
    assert cache.pinned_bytes == 300
    assert tight.unpin([7, 8]) == 2
    assert loose.unpin([7, 8]) == 2
    assert cache.evictable_bytes == tight.evictable_bytes == 300
    tight.pin([7])
    assert cache.evictable_bytes == 250
    tight.unpin([7])
    # Oldest first: 8 of the tight level, then 8 and 7 of the loose one; 7 of the tight level was used last.
    cache.evict_until(260)
    assert (tight.match([7, 8], 2), loose.match([7, 8], 2)) == (1, 2)
    cache.evict_until(100)
    assert (tight.match([7], 1), loose.match([7, 8], 2)) == (1, 0)
    assert cache.evictable_bytes == 50


@pytest.mark.parametrize("followers", [0, 1])
def test_encoding_again_leaves_shared_units_to_their_other_users(followers: int) -> None:
    """A unit that another sequence uses frees nothing, so the copy may not be worth it."""
    ids = tuple(range(30))
    count = 1 + followers
    requests = table([i * 40 * MS for i in range(count)], [481] * count, [200] * count, hashes=(ids,) * count)
    policy = {"kind": "pressure", "high_watermark": 0.5, "low_watermark": 0.1, "min_dwell_s": 0.0}
    adaptive = {"policy": policy, "requantize": {}}
    deployment = adapt(("native", "fp8"), adaptive, max_num_batched_tokens=512, max_num_seqs=8)
    with audited_levels() as schedulers:
        result = build_case(deployment, requests, spare_blocks=30).play()
    check_schedulers(schedulers)
    first = next(action for action in record_of(result).actions if action.sequences)
    saved_bytes = block_bytes(deployment.levels[0]) - block_bytes(deployment.levels[1])
    assert first.sequences == 1
    assert first.freed_bytes >= saved_bytes * len(ids)
    assert (first.at_ticks >= result.log.finished[0]) == bool(followers)
