"""KV offload to the host: what is found there, what copies cost, and that nothing is lost on the way."""

from __future__ import annotations

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.errors import IncompatibleScenario
from kvsim.report import Report
from kvsim.scenario import Scenario
from kvsim.sim.resources import Demand, SharedDevice
from kvsim.sim.tiers.build import TierBuilder
from kvsim.sim.tiers.hierarchy import KvTiers
from kvsim.simulate import simulate
from kvsim.specs.engine import EngineSpec
from kvsim.specs.workload import (
    ConstantLengths,
    Conversations,
    PoissonArrivals,
    SyntheticWorkload,
    UniformLengths,
)
from kvsim.tiers import Coding, TierPlan, TiersPlan

UNIT_BYTES = 1000
PLAIN = Coding("none", UNIT_BYTES)
HOST = TierPlan("host", "host", "on_compute", 4 * UNIT_BYTES, PLAIN)
PLAN = TiersPlan((HOST,), PLAIN, remembers=False, reload="always", link_bytes_per_s=1e9, hbm_bytes_per_s=1e10)
UNIT_TICKS = 10**6
"""1,000 bytes at 1 GB/s, in picoseconds."""


class OneTier:
    """A host tier alone, asked as a scheduler asks."""

    def __init__(self, env: simpy.Environment, device: SharedDevice | None = None) -> None:
        self.tiers: KvTiers = TierBuilder(env, PLAN, 16, None).build(device or SharedDevice(env))

    def store(self, values: list[int]) -> None:
        self.tiers.computed(values)

    def match(self, values: list[int], start: int, most: int) -> int:
        return len(self.tiers.plan(values, start, most, 1, 0).values)

    def load(self, values: list[int]) -> simpy.Event:
        reload = self.tiers.plan(values, 0, len(values), 1, 0)
        self.tiers.commit(reload)
        return self.tiers.load(reload)


def tier(env: simpy.Environment) -> OneTier:
    return OneTier(env)


def test_units_are_found_once_their_copy_has_ended() -> None:
    env = simpy.Environment(initial_time=0)
    host = tier(env)
    host.store([1, 2, 3])
    assert host.match([1, 2, 3], 0, 3) == 0
    assert host.tiers.copies == 1
    env.run(until=3 * UNIT_TICKS + 1)
    assert host.match([1, 2, 3, 4], 0, 4) == 3
    assert host.match([1, 2, 3], 1, 2) == 1
    assert host.match([9, 2, 3], 0, 3) == 0
    assert host.tiers.copies == 0
    assert host.tiers.tallies[0].stored_bytes == 3 * UNIT_BYTES


def test_a_load_takes_the_link_time_and_keeps_the_units() -> None:
    env = simpy.Environment(initial_time=0)
    host = tier(env)
    host.store([1, 2])
    env.run(until=10 * UNIT_TICKS)
    done = host.load([1, 2])
    env.run(until=done)
    assert env.now == 12 * UNIT_TICKS
    assert host.match([1, 2], 0, 2) == 2
    assert host.tiers.tallies[0].loaded_bytes == 2 * UNIT_BYTES


def ended(env: simpy.Environment, event: simpy.Event) -> list[int]:
    """When an event fires, as a list that is empty until then."""
    times: list[int] = []
    event.callbacks.append(lambda _: times.append(int(env.now)))
    return times


def test_both_directions_run_side_by_side_and_one_direction_is_shared() -> None:
    env = simpy.Environment(initial_time=0)
    host = tier(env)
    host.store([1])
    env.run(until=5 * UNIT_TICKS)
    host.store([2])
    alone = ended(env, host.load([1]))
    env.run(until=10 * UNIT_TICKS)
    assert alone == [6 * UNIT_TICKS], "out and back do not slow each other"
    both = [ended(env, host.load([value])) for value in (1, 2)]
    env.run()
    assert both == [[12 * UNIT_TICKS], [12 * UNIT_TICKS]], "two loads share one direction of the link"


def test_copies_slow_a_step_that_needs_the_memory() -> None:
    env = simpy.Environment(initial_time=0)
    device = SharedDevice(env)
    host = OneTier(env, device)
    host.store([1, 2, 3, 4])
    step = device.start(UNIT_TICKS, Demand(hbm=1.0), "step")
    env.run(until=step.done)
    # The copy takes a tenth of the memory bandwidth: the two need 1.1 of it.
    assert env.now == pytest.approx(1.1 * UNIT_TICKS, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True), max_size=12))
def test_it_never_holds_more_than_it_can_and_forgets_the_oldest(batches: list[list[int]]) -> None:
    env = simpy.Environment(initial_time=0)
    host = tier(env)
    order: list[int] = []
    for values in batches:
        host.store(values)
        env.run(until=env.now + 100 * UNIT_TICKS)
        order += [value for value in values if value not in order]
        order = order[-4:]
        assert [value for value in range(13) if host.match([value], 0, 1)] == sorted(order)


def chat(kv_offloading_size: int | None, compression: str = "native", **engine: object) -> Report:
    workload = SyntheticWorkload(
        num_prompts=240,
        input_len=UniformLengths(min_tokens=200, max_tokens=1200),
        output_len=UniformLengths(min_tokens=20, max_tokens=200),
        arrivals=PoissonArrivals(request_rate=4.0),
        conversations=Conversations(turns=ConstantLengths(tokens=6), think_time_s=20.0),
    )
    options = {"num_gpu_blocks_override": 1500, "max_model_len": 12000, **engine}
    return simulate(
        Scenario(
            model="llama-3.1-8b",
            device="h100-sxm",
            workload=workload,
            compression=compression,
            engine=EngineSpec(**options, kv_offloading_size=kv_offloading_size),
            bands=False,
        )
    )


def test_a_host_tier_turns_forgotten_prefixes_into_hits() -> None:
    # The device's own pool is 2.9 GiB: a host tier no larger holds little that the device has forgotten.
    without, small, large = chat(None), chat(8 * 2**30), chat(200 * 2**30)
    hits = [report.counts.cached_prompt_tokens for report in (without, small, large)]
    assert hits[0] < hits[1] < hits[2]
    assert large.latency.ttft.mean_s.value < without.latency.ttft.mean_s.value
    for report in (without, small, large):
        assert report.counts.completed == report.counts.num_prompts


TIGHT = [
    {"max_num_batched_tokens": 512},
    {"max_num_seqs": 3},
    {"enable_chunked_prefill": False, "max_num_batched_tokens": 12000},
]


@pytest.mark.parametrize("options", TIGHT)
def test_nothing_is_lost_under_tight_limits(options: dict[str, object]) -> None:
    report = chat(50 * 2**30, num_gpu_blocks_override=800, **options)
    assert report.counts.completed == report.counts.num_prompts


def test_a_host_tier_is_deterministic() -> None:
    assert chat(10 * 2**30).model_dump_json() == chat(10 * 2**30).model_dump_json()


def test_a_strategy_that_evicts_offloads_nothing_and_says_so() -> None:
    with_tier, without = chat(50 * 2**30, "snapkv"), chat(None, "snapkv")
    assert with_tier.latency == without.latency
    assert any("nothing is offloaded" in note for note in with_tier.provenance.notes)


def test_a_device_without_a_host_link_is_refused() -> None:
    scenario = Scenario(
        model="llama-3.2-1b",
        device="apple-m4",
        workload="chat",
        engine=EngineSpec(kv_offloading_size=2**30),
    )
    with pytest.raises(
        IncompatibleScenario, match=r"engine\.kv_offloading_size: apple-m4 has no figure for a host link"
    ):
        simulate(scenario)
