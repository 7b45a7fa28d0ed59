"""Runs with tiers lose nothing either, and their special cases are the plain cases exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_invariants import audited, check_run, check_schedulers
from sim_cases import HASH_TOKENS, MS, Case, build_case, deploy, shared_tables, table, talk_tables

from kvsim.requests import RequestTable
from kvsim.sim.run import RunResult
from kvsim.specs.link import CustomLink
from kvsim.specs.tier import HostTier, KvTier, NvmeTier, RecomputeTier, RemoteTier
from kvsim.units import GIBI, MEBI

QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
FAST = 1e18
SIZES = st.sampled_from((4 * MEBI, 8 * MEBI, 20 * MEBI, GIBI))
STORE = st.sampled_from((None, "on_compute", "on_evict"))
CODED: tuple[dict[str, Any], ...] = (
    {},
    {"encoding": "fp8"},
    {"encoding": "nvfp4"},
    {"encoding": "lossless"},
    {"encoding": "cachegen", "ratio": 3.0, "encode_rate": 1e10, "decode_rate": 2e10, "coder": "host"},
)


@st.composite
def tier_lists(draw: st.DrawFn) -> tuple[KvTier, ...]:
    """Any tiers of a few blocks or of many, fast or slow, plain or coded."""

    def common() -> dict[str, Any]:
        return {"store": draw(STORE), **draw(st.sampled_from(CODED))}

    tiers: list[KvTier] = []
    if draw(st.booleans()):
        tiers.append(HostTier(size=draw(SIZES), **common()))
    if draw(st.booleans()):
        rate = draw(st.sampled_from((2e8, 7e9)))
        tiers.append(
            NvmeTier(
                size=draw(SIZES), read_bandwidth=rate, write_bandwidth=rate / 2,
                latency_s=draw(st.sampled_from((0.0, 1e-3))), **common(),
            )
        )  # fmt: skip
    if draw(st.booleans()) or not tiers:
        link = draw(st.sampled_from(("ethernet-100", CustomLink(bandwidth=5e8, latency_s=2e-3))))
        tiers.append(RemoteTier(size=draw(st.one_of(st.none(), SIZES)), link=link, **common()))
    if draw(st.booleans()):
        tiers.append(RecomputeTier())
    return tuple(tiers)


@st.composite
def revisited_tables(draw: st.DrawFn) -> RequestTable:
    """Requests that come back to a few long prefixes, more of them than a tight pool holds."""
    prefixes = draw(st.lists(st.integers(2, 7), min_size=2, max_size=5))
    owners = draw(st.lists(st.integers(0, len(prefixes) - 1), min_size=4, max_size=14))
    gap = draw(st.sampled_from((0, 5, 60, 400)))
    own = draw(st.lists(st.integers(1, 40), min_size=len(owners), max_size=len(owners)))
    answers = draw(st.lists(st.integers(1, 40), min_size=len(owners), max_size=len(owners)))
    return table(
        [index * gap * MS for index in range(len(owners))],
        [prefixes[owner] * HASH_TOKENS + tokens for owner, tokens in zip(owners, own, strict=True)],
        answers,
        hashes=tuple(tuple(owner * 1000 + i for i in range(prefixes[owner])) for owner in owners),
    )


ANY_SHARED = st.one_of(revisited_tables(), revisited_tables(), revisited_tables(), shared_tables(), talk_tables())


@st.composite
def tiered_cases(draw: st.DrawFn) -> Case:
    """Shared prefixes and conversations in a tight pool, beside tiers."""
    deployment = deploy(
        draw(st.sampled_from(("llama-3.1-8b", "gpt-oss-20b"))),
        "native",
        max_num_batched_tokens=draw(st.sampled_from((8, 24, 64, 512))),
        max_num_seqs=draw(st.sampled_from((1, 3, 8))),
        kv_tiers=draw(tier_lists()),
        kv_reload=draw(st.sampled_from(("always", "by_cost", "by_total_cost"))),
        replicas=draw(st.sampled_from((1, 1, 2))),
        enable_chunked_prefill=draw(st.sampled_from((True, True, True, False))),
        async_scheduling=draw(st.booleans()),
    )
    routing = draw(st.sampled_from(("round_robin", "least_loaded", "prefix_aware")))
    return build_case(deployment, draw(ANY_SHARED), spare_blocks=draw(st.integers(0, 12)), routing=routing)


@st.composite
def hosted_cases(draw: st.DrawFn) -> Case:
    """The same with one host tier in its short spelling, and any storage format."""
    deployment = deploy(
        draw(st.sampled_from(("llama-3.1-8b", "gpt-oss-20b"))),
        draw(st.sampled_from(("native", "fp8", "quest:32", "kivi-4(residual_length=32)"))),
        max_num_batched_tokens=draw(st.sampled_from((8, 24, 64, 512))),
        max_num_seqs=draw(st.sampled_from((1, 3, 8))),
        kv_offloading_size=draw(SIZES),
        replicas=draw(st.sampled_from((1, 1, 2))),
        enable_chunked_prefill=draw(st.sampled_from((True, True, True, False))),
        async_scheduling=draw(st.booleans()),
    )
    return build_case(deployment, draw(ANY_SHARED), spare_blocks=draw(st.integers(0, 12)))


def with_engine(case: Case, **options: Any) -> Case:
    """The same case under other engine options."""
    engine = case.deployment.engine.model_copy(update=options)
    tiers = engine.all_kv_tiers
    return replace(case, deployment=replace(case.deployment, engine=engine, tier_classes=(None,) * len(tiers)))


def facts(result: RunResult) -> tuple[object, ...]:
    """All that a run is judged by."""
    return result.log, result.end_ticks, [(r.gaps, r.prefill, r.decode, r.cached_prompt_tokens) for r in result.records]


@given(case=tiered_cases())
@settings(QUICK, max_examples=250)
def test_laws_hold_with_tiers(case: Case) -> None:
    with audited() as schedulers:
        result = case.play()
    check_run(case, result)
    check_schedulers(schedulers)
    check_tiers(result)


@given(case=hosted_cases())
@QUICK
def test_laws_hold_with_a_host_tier(case: Case) -> None:
    with audited() as schedulers:
        result = case.play()
    check_run(case, result)
    check_schedulers(schedulers)
    check_tiers(result)


def check_tiers(result: RunResult) -> None:
    """Every unit that was loaded had been stored; nobody holds more than fits; look-ups are shared out."""
    assert result.tiers is not None or all(not record.cached_prompt_tokens for record in result.records)
    if result.tiers is None:
        return
    found = result.tiers.reloads.device_units
    for one in result.tiers.tiers:
        found += one.tally.hit_units
        assert one.peak_units <= one.tally.stored_units
        assert one.evicted_units <= one.tally.stored_units
        assert one.tally.demoted_units + one.tally.promoted_units <= one.tally.stored_units
        if one.plan.capacity_bytes is not None:
            assert one.peak_units * one.plan.coding.unit_bytes <= one.plan.capacity_bytes * one.stores
        assert one.tally.loaded_bytes == one.tally.hit_units * one.plan.coding.unit_bytes
        if not one.tally.stored_units:
            assert not one.tally.hit_units
    assert found + result.tiers.reloads.recomputed_units <= result.tiers.reloads.looked_units


@given(case=tiered_cases())
@settings(QUICK, max_examples=200)
def test_runs_of_steps_equal_single_steps(case: Case) -> None:
    assert facts(case.play()) == facts(case.play(coalesce=False))


@given(case=tiered_cases())
@settings(QUICK, max_examples=15)
def test_a_run_repeats_exactly(case: Case) -> None:
    first, second = case.play(), case.play()
    assert facts(first) == facts(second)
    assert first.tiers == second.tiers


@given(case=tiered_cases())
@QUICK
def test_tiers_too_small_for_a_block_are_no_tiers(case: Case) -> None:
    small = tuple(
        tier if isinstance(tier, RecomputeTier) else tier.model_copy(update={"size": 1, "encoding": "none"})
        for tier in case.deployment.engine.kv_tiers
    )
    small = tuple(
        tier
        if isinstance(tier, RecomputeTier)
        else tier.model_copy(update=dict.fromkeys(("ratio", "encode_rate", "decode_rate")))
        for tier in small
    )
    assert facts(with_engine(case, kv_tiers=small).play()) == facts(with_engine(case, kv_tiers=()).play())


@given(case=tiered_cases())
@QUICK
def test_keeping_token_ids_alone_changes_no_time(case: Case) -> None:
    kept = with_engine(case, kv_tiers=(RecomputeTier(),)).play()
    assert facts(kept) == facts(with_engine(case, kv_tiers=()).play())


@pytest.mark.parametrize("tiers", [(), (RecomputeTier(),)], ids=["no tiers", "recompute"])
def test_the_router_finds_blocks_once_their_step_has_ended(tiers: tuple[KvTier, ...]) -> None:
    """A prompt of three steps of 4 ms: its block can be found after the third, with tiers and without."""
    deployment = deploy(max_num_batched_tokens=8, max_num_seqs=1, replicas=2, async_scheduling=False, kv_tiers=tiers)
    for arrival_ms, cached in ((8, 0), (11, 0), (13, HASH_TOKENS)):
        requests = table([0, arrival_ms * MS], [17, 17], [1, 1], hashes=((0,), (0,)))
        result = build_case(deployment, requests, spare_blocks=0, routing="prefix_aware").play()
        assert 12 * MS < result.log.first_token[0] < 13 * MS
        assert sum(record.cached_prompt_tokens for record in result.records) == cached


@given(case=hosted_cases())
@QUICK
def test_the_short_spelling_is_one_host_tier(case: Case) -> None:
    size = case.deployment.engine.kv_offloading_size
    assert size is not None
    spelled = with_engine(case, kv_offloading_size=None, kv_tiers=(HostTier(size=size),))
    assert facts(spelled.play()) == facts(case.play())


@given(requests=ANY_SHARED, spare=st.integers(0, 12), kind=st.integers(0, 2))
@QUICK
def test_a_free_tier_never_delays_a_first_token(requests: RequestTable, spare: int, kind: int) -> None:
    """One request at a time, so that nobody's luck is another's delay."""
    free: KvTier = (
        HostTier(size=GIBI),
        NvmeTier(size=GIBI, read_bandwidth=FAST, write_bandwidth=FAST, latency_s=0.0),
        RemoteTier(link=CustomLink(bandwidth=FAST)),
    )[kind]
    deployment = deploy(max_num_batched_tokens=64, max_num_seqs=1)
    link = deployment.device.host_link
    assert link is not None
    device = deployment.device.model_copy(update={"host_link": link.model_copy(update={"value": FAST})})
    case = build_case(replace(deployment, device=device), spaced(requests), spare_blocks=spare)
    plain = with_engine(case, kv_tiers=()).play()
    tiered = with_engine(case, kv_tiers=(free,)).play()
    slack = 2 * len(requests)
    """A copy takes a picosecond at least."""
    for index in range(len(requests)):
        delays = [run.log.first_token[index] - run.log.arrived[index] for run in (tiered, plain)]
        assert delays[0] <= delays[1] + slack


def spaced(requests: RequestTable) -> RequestTable:
    """The same requests, each long after the one before."""
    count = len(requests)
    arrivals = [index * 60_000 * MS for index in range(count)]
    return replace(
        table(arrivals, requests.prompt_tokens.tolist(), requests.output_tokens.tolist()),
        prefix_hashes=requests.prefix_hashes,
        output_hashes=requests.output_hashes,
    )


@given(case=hosted_cases())
@settings(QUICK, max_examples=20)
def test_what_never_pays_is_never_loaded(case: Case) -> None:
    slow = RemoteTier(link=CustomLink(bandwidth=1e12, latency_s=3600.0))
    result = with_engine(case, kv_offloading_size=None, kv_tiers=(slow, RecomputeTier()), kv_reload="by_cost").play()
    if result.tiers is not None:
        assert all(one.tally.loads == 0 for one in result.tiers.tiers)
        assert result.tiers.reloads.chosen["load"] == result.tiers.reloads.chosen["cut"] == 0


@pytest.mark.parametrize("reload", ["always", "by_cost"])
def test_a_tiny_pool_does_not_live_lock(reload: str) -> None:
    """The least pool that the longest request needs, a tier of two blocks, and everyone at once."""
    prefix = tuple(range(6))
    requests = table([0] * 12, [120] * 12, [40] * 12, hashes=tuple((*prefix, 100 + i) for i in range(12)))
    tiers = (
        HostTier(size=2 * 16 * 131072, store="on_evict"),
        NvmeTier(size=3 * 16 * 131072, read_bandwidth=1e9, write_bandwidth=1e9, latency_s=1e-3),
    )
    deployment = deploy(max_num_batched_tokens=32, max_num_seqs=8, kv_tiers=tiers, kv_reload=reload)
    case = build_case(deployment, requests, spare_blocks=0)
    result = case.play()
    check_run(case, result)
    check_tiers(result)
