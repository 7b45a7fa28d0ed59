"""What copies between tiers cost, which policies move blocks where, and how loads are weighed against computing."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_cases import HASH_TOKENS, MS, build_case, deploy, step_model, table

from kvsim.cost.tables import build_tables
from kvsim.sim.resources import SharedDevice
from kvsim.sim.tiers.build import TierBuilder
from kvsim.sim.tiers.hierarchy import KvTiers
from kvsim.sim.tiers.moves import Level, Mover
from kvsim.sim.tiers.reload import PrefillEstimate, best_cut
from kvsim.sim.tiers.store import TierStore
from kvsim.specs.link import CustomLink
from kvsim.specs.tier import HostTier, KvReload, NvmeTier, RemoteTier
from kvsim.tiers import Coding, TierPlan, TiersPlan

UNIT_BYTES = 1000
UNIT_TICKS = 10**6
"""1,000 bytes at 1 GB/s, in picoseconds."""
PLAIN = Coding("none", UNIT_BYTES)
QUARTER = Coding("kvtc", UNIT_BYTES // 4, encode_s=2e-6, decode_s=3e-6, hbm_share=0.1, lossy=True)
ON_HOST = replace(QUARTER, on_device=False)
HOST = TierPlan("host", "host", "on_compute", None, PLAIN)
DISK = TierPlan("nvme", "nvme", "on_evict", None, PLAIN, 2.5e8, 2e8, 5e-6)
FAR = TierPlan("remote", "remote", "on_compute", None, PLAIN, 5e8, 5e8, 0.0, is_shared=True)


def build(*plans: TierPlan, replicas: int = 1, reload: KvReload = "always") -> tuple[simpy.Environment, list[KvTiers]]:
    env = simpy.Environment(initial_time=0)
    plan = TiersPlan(plans, PLAIN, remembers=False, reload=reload, link_bytes_per_s=1e9, hbm_bytes_per_s=1e10)
    builder = TierBuilder(env, plan, HASH_TOKENS, None)
    return env, [builder.build(SharedDevice(env)) for _ in range(replicas)]


def load(env: simpy.Environment, tiers: KvTiers, values: list[int]) -> int:
    """Load units; how long it took."""
    began, ended = int(env.now), []
    reload = tiers.plan(values, 0, len(values))
    assert reload.values == values
    tiers.commit(reload)
    tiers.load(reload).callbacks.append(lambda _: ended.append(int(env.now)))
    while not ended:
        env.step()
    return ended[0] - began


# --- what copies cost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "ticks"),
    [
        (HOST, 2 * UNIT_TICKS),
        (replace(DISK, store="on_compute"), 8 * UNIT_TICKS + 5 * 10**6),
        (FAR, 4 * UNIT_TICKS),
        (replace(HOST, coding=QUARTER), UNIT_TICKS // 2 + 6 * 10**6),
        (replace(HOST, coding=ON_HOST), 2 * UNIT_TICKS + 6 * 10**6),
        (replace(FAR, coding=QUARTER), UNIT_TICKS + 6 * 10**6),
        (replace(FAR, coding=ON_HOST), UNIT_TICKS + 6 * 10**6 + 2 * UNIT_TICKS),
    ],
    ids=["host", "nvme", "remote", "host coded on device", "coded on host", "remote coded", "remote coded on host"],
)
def test_a_load_takes_latency_bytes_over_the_slowest_link_and_decoding(plan: TierPlan, ticks: int) -> None:
    env, (tiers,) = build(plan)
    tiers.computed([1, 2])
    env.run()
    assert load(env, tiers, [1, 2]) == ticks
    assert tiers.tallies[0].loaded_bytes == 2 * plan.coding.unit_bytes


def test_replicas_divide_the_link_of_a_store_that_they_share() -> None:
    env, (one, other) = build(FAR, replicas=2)
    one.computed([1, 2])
    env.run()
    assert other.plan([1, 2], 0, 2).values == [1, 2], "one index for all"
    for tiers in (one, other):
        reload = tiers.plan([1, 2], 0, 2)
        tiers.commit(reload)
        tiers.load(reload)
    began = int(env.now)
    env.run()
    assert env.now - began == 8 * UNIT_TICKS, "each alone takes four"
    other.computed([1, 2])
    assert other.tallies[0].stored_units == 0, "what is there already is not stored again"


def test_disks_are_each_replica_s_own() -> None:
    env, (one, other) = build(replace(DISK, store="on_compute"), replicas=2)
    one.computed([1])
    env.run()
    assert not other.plan([1], 0, 1).values


def test_host_memory_passes_bytes_on_without_the_host_link() -> None:
    """Written through to both: the device's link is crossed once."""
    env, (tiers,) = build(HOST, replace(DISK, store="on_compute"))
    tiers.computed([1, 2])
    env.run(until=3 * UNIT_TICKS)
    assert [level.store.has(1) for level in tiers.levels] == [True, False]
    env.run()
    assert all(level.store.has(1) for level in tiers.levels)
    assert env.now == 2 * UNIT_TICKS + 5 * 10**6 + 10 * UNIT_TICKS


def test_other_forms_are_coded_from_the_device() -> None:
    env, (tiers,) = build(HOST, replace(DISK, store="on_compute", coding=QUARTER))
    tiers.computed([1])
    env.run()
    assert tiers.tallies[1].stored_bytes == UNIT_BYTES // 4
    assert tiers.tallies[1].link_ticks == 2 * 10**6 + 5 * 10**6 + 1_250_000


# --- policies -------------------------------------------------------------------------------------------------------


def test_what_a_full_tier_forgets_goes_down_and_comes_up_again() -> None:
    env, (tiers,) = build(replace(HOST, capacity_bytes=2 * UNIT_BYTES), DISK)
    tiers.computed([1, 2])
    env.run()
    tiers.computed([3])
    env.run()
    assert [[level.store.has(value) for value in (1, 2, 3)] for level in tiers.levels] == [
        [False, True, True],
        [True, False, False],
    ]
    assert load(env, tiers, [1]) == 4 * UNIT_TICKS + 5 * 10**6
    env.run()
    assert tiers.levels[0].store.has(1), "promoted on its way through host memory"
    assert tiers.tallies[0].promoted_units == 1
    assert tiers.levels[1].store.has(2), "and another made way"


def test_write_back_waits_for_eviction_and_the_next_step_for_it() -> None:
    env, (tiers,) = build(replace(HOST, store="on_evict"))
    tiers.computed([1, 2])
    env.run()
    assert not tiers.levels[0].store.has(1)
    tiers.evicted([1, 2])
    assert len(tiers.write_backs) == 1
    env.run()
    assert not tiers.write_backs
    assert tiers.plan([1, 2], 0, 2).values == [1, 2]
    tiers.evicted([1])
    assert not tiers.write_backs, "it is there already"


def test_bytes_being_read_never_make_way() -> None:
    env, (tiers,) = build(replace(HOST, capacity_bytes=2 * UNIT_BYTES))
    tiers.computed([1, 2])
    env.run()
    reload = tiers.plan([1], 0, 1)
    tiers.commit(reload)
    tiers.computed([3, 4])
    assert tiers.levels[0].store.has(1)
    assert not tiers.levels[0].store.has(2)
    assert tiers.levels[0].store.refused == 1
    tiers.load(reload)
    env.run()
    assert not tiers.unfinished()["units being read in a tier"]


def test_a_tier_never_holds_more_than_fits_while_units_are_on_their_way() -> None:
    store = TierStore(3)
    assert store.reserve([1, 2]) == ([1, 2], [])
    assert store.reserve([2, 3, 4]) == ([3], [])
    assert store.refused == 1
    store.commit([1])
    assert store.reserve([5]) == ([5], [1])
    assert store.used_units == store.peak_units == 3


def test_blocks_evicted_for_a_step_are_copied_before_it() -> None:
    """With write-back a prompt that pushes others out starts later, by the copies and nothing else."""
    size = 16 * 131072 * 6
    requests = table(
        [0, 400 * MS, 800 * MS], [97, 97, 97], [2, 2, 2],
        hashes=tuple(tuple(owner * 100 + i for i in range(6)) for owner in (1, 2, 1)),
    )  # fmt: skip
    for ahead in (True, False):
        deployment = deploy(kv_tiers=(HostTier(size=size, store="on_evict"),), async_scheduling=ahead)
        plain = deploy(async_scheduling=ahead)
        tiered, without = (build_case(one, requests, spare_blocks=1).play() for one in (deployment, plain))
        first = [run.log.first_token[1] - run.log.arrived[1] for run in (tiered, without)]
        assert tiered.tiers is not None
        stored = tiered.tiers.tiers[0].tally
        assert stored.stored_units >= 5
        assert first[0] > first[1]
        assert first[0] - first[1] <= stored.link_ticks
        assert stored.hit_units >= 5
        third = [run.log.first_token[2] - run.log.arrived[2] for run in (tiered, without)]
        assert third[0] < third[1] + stored.link_ticks


# --- load or compute ------------------------------------------------------------------------------------------------


def estimate() -> PrefillEstimate:
    deployment = deploy(max_num_batched_tokens=2048)
    step = step_model(deployment)
    return PrefillEstimate(step, build_tables(step, 2048, 256), 2048)


ESTIMATE = estimate()


@given(
    units=st.integers(1, 60),
    rate=st.floats(1e7, 1e11),
    latency_s=st.sampled_from((0.0, 1e-3, 0.1)),
    rest=st.integers(1, 3000),
    context=st.integers(0, 40),
    delayed=st.sampled_from((1, 9)),
)
@settings(max_examples=150, deadline=None)
def test_the_cut_is_as_good_as_the_best_of_all_cuts(
    units: int, rate: float, latency_s: float, rest: int, context: int, delayed: int
) -> None:
    """Looking only where the tier changes loses nothing against looking at every unit, but for cliffs of steps."""
    env = simpy.Environment(initial_time=0)
    unit_bytes = HASH_TOKENS * 131072
    plain = Coding("none", unit_bytes)
    plans = (replace(HOST, coding=plain), replace(FAR, coding=plain, read_bytes_per_s=rate, latency_s=latency_s))
    plan = TiersPlan(plans, plain, remembers=False, reload="by_cost", link_bytes_per_s=5e10, hbm_bytes_per_s=3e12)
    mover = Mover(env, SharedDevice(env), plan)
    levels = [Level(plans[0], TierStore(None), None), Level(plans[1], TierStore(None), SharedDevice(env))]
    split = units // 3
    values = list(range(units))
    segments = [(levels[0], values[:split]), (levels[1], values[split:])]
    segments = [(level, part) for level, part in segments if part]
    before, target = context * HASH_TOKENS, (context + units) * HASH_TOKENS + rest
    choice = best_cut(mover, ESTIMATE, segments, HASH_TOKENS, before, target, 0, delayed)

    def cost(kept: int) -> float:
        near = mover.estimate(min(kept, split), levels[0]) if min(kept, split) else (0.0, 0.0)
        far = mover.estimate(kept - split, levels[1]) if kept > split else (0.0, 0.0)
        done = before + kept * HASH_TOKENS
        return max(near[0], far[0], near[1] + far[1]) + delayed * ESTIMATE.ticks(target - done, done, 0)

    chosen = cost(sum(len(part) for _, part in choice.segments))
    assert choice.against_load_ticks >= 0
    assert choice.against_compute_ticks >= 0
    assert chosen <= 1.15 * min(cost(kept) for kept in range(units + 1))


def test_nearer_parts_are_loaded_and_far_ones_computed() -> None:
    """A fast tier with the head of a prefix and a hopeless one with its tail: the cut falls between them."""
    prefix = tuple(range(100, 112))
    requests = table([0, 900 * MS, 1800 * MS, 2700 * MS], [96, 220, 200, 200], [2, 2, 2, 2],
                     hashes=(prefix[:6], tuple(range(13)), prefix, prefix))  # fmt: skip
    tiers = (
        HostTier(size=16 * 131072 * 40),
        RemoteTier(link=CustomLink(bandwidth=1e3, latency_s=60.0), store="on_compute"),
    )
    deployment = deploy(kv_tiers=tiers, kv_reload="by_cost", max_num_batched_tokens=512)
    result = build_case(deployment, requests, spare_blocks=2).play()
    assert result.tiers is not None
    assert result.tiers.tiers[1].tally.loads == 0
    assert result.tiers.tiers[0].tally.loads >= 1


def test_loads_from_host_memory_beat_disks_and_computing() -> None:
    prefix, other = tuple(range(40)), tuple(range(100, 140))
    requests = table([0, 3000 * MS, 6000 * MS], [650, 650, 650], [2, 2, 2], hashes=(prefix, other, prefix))
    size = 16 * 131072 * 200
    waits = []
    for tiers in (
        (HostTier(size=size),),
        (NvmeTier(size=size, read_bandwidth=14e9, write_bandwidth=7e9, latency_s=1e-4, store="on_compute"),),
        (),
    ):
        deployment = deploy("llama-3.1-8b", kv_tiers=tiers)
        log = build_case(deployment, requests, spare_blocks=4).play().log
        waits.append(log.first_token[2] - log.arrived[2])
    assert waits[0] < min(waits[1:])


@pytest.mark.parametrize("ahead", [True, False])
def test_blocks_are_stored_once_their_step_has_ended(ahead: bool) -> None:
    """A store on the device's first step cannot begin before it ends, nor one of an answer before the answer's end."""
    began: list[int] = []
    requests = table(
        [0], [64], [33], hashes=((1, 2, 3, 4),), output_hashes=((5, 6),),
    )  # fmt: skip
    deployment = deploy(kv_tiers=(HostTier(size=16 * 131072 * 40),), async_scheduling=ahead)
    case = build_case(deployment, requests, spare_blocks=4)
    original = TierStore.reserve

    def spied(store: TierStore, values: list[int]) -> tuple[list[int], list[int]]:
        began.append(int(seen[0].now))
        return original(store, values)

    seen: list[simpy.Environment] = []
    build_mover = Mover.__init__

    def noted(mover: Mover, env: simpy.Environment, *rest: object) -> None:
        seen.append(env)
        build_mover(mover, env, *rest)  # type: ignore[arg-type]

    with mock.patch.object(TierStore, "reserve", spied), mock.patch.object(Mover, "__init__", noted):
        log = case.play().log
    assert began == [log.first_token[0], log.finished[0]]
