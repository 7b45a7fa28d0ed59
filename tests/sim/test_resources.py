"""Laws, worked examples and queueing theory for the shared resources of a device."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from kvsim.errors import InvariantViolation
from kvsim.sim.resources import SPEED_UNITS, Demand, Resource, SharedDevice, fair_speeds
from kvsim.units import TICKS_PER_SECOND

SHARES = st.one_of(st.just(0.0), st.just(1.0), st.integers(0, 100).map(lambda percent: percent / 100))
DEMANDS = st.builds(Demand, hbm=SHARES, compute=SHARES, host_link_in=SHARES, interconnect=SHARES)
HBM_DEMANDS = st.builds(Demand, hbm=SHARES)
TICKS = st.integers(0, 10**13)


def jobs(demands=DEMANDS, max_size=6):
    """(start tick, duration alone, demand) of several activities."""
    return st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500), demands), min_size=1, max_size=max_size)


def play(job_list, watch=lambda device: None):
    """Run the jobs on one device; return the activities in the order of `job_list`."""
    env = simpy.Environment()
    device = SharedDevice(env)
    activities = [None] * len(job_list)

    def submit(index, start, alone, demand):
        yield env.timeout(start)
        activities[index] = device.start(alone, demand, f"job-{index}")

    for index, job in enumerate(job_list):
        env.process(submit(index, *job))
    while env.peek() < math.inf:
        env.step()
        watch(device)
    assert device.is_idle
    assert device.num_active == 0
    return activities


def play_exactly(job_list):
    """Give the end times of the same fluid model in unrounded fractions, found independently: a slow oracle."""
    now, left = Fraction(0), {i: Fraction(alone) for i, (_, alone, _) in enumerate(job_list)}
    ends = {}
    while left:
        here = [i for i in left if job_list[i][0] <= now]
        speeds = fractional_speeds({i: job_list[i][2] for i in here})
        times = [now + left[i] / speeds[i] for i in here] + [Fraction(job_list[i][0]) for i in left if i not in here]
        later = min(times)
        for i in here:
            left[i] -= speeds[i] * (later - now)
            if not left[i]:
                ends[i] = later
                del left[i]
        now = later
    return [ends[i] for i in range(len(job_list))]


def fractional_speeds(demands):
    """Max-min fair speeds by raising a common level from one saturation to the next."""
    speeds = dict.fromkeys(demands, Fraction(0))
    rising = set(demands)
    use = {i: [Fraction(round(share * 100), 100) for share in demand.shares()] for i, demand in demands.items()}
    while rising:
        room = [1 - sum(use[i][r] * speeds[i] for i in demands) for r in range(len(Resource))]
        load = [sum(use[i][r] for i in rising) for r in range(len(Resource))]
        climb = [room[r] / load[r] for r in range(len(Resource)) if load[r]]
        step = min([*climb, 1 - max(speeds[i] for i in rising)])
        for i in rising:
            speeds[i] += step
        full = {r for r in range(len(Resource)) if load[r] and room[r] == step * load[r]}
        rising = {i for i in rising if speeds[i] < 1 and not any(use[i][r] for r in full)}
    return speeds


# Worked examples, by hand


def speeds_of(*demands):
    return [Fraction(speed, SPEED_UNITS) for speed in fair_speeds(demands)]


def test_two_that_need_all_of_hbm_run_at_half_speed():
    assert speeds_of(Demand(hbm=1.0), Demand(hbm=1.0)) == [Fraction(1, 2)] * 2


def test_shares_that_fit_together_do_not_slow_each_other():
    assert speeds_of(Demand(hbm=0.6), Demand(hbm=0.4)) == [1, 1]
    assert speeds_of(Demand(hbm=0.7), Demand(hbm=0.2), Demand(hbm=0.1)) == [1, 1, 1]
    assert speeds_of(Demand(hbm=1.0), Demand(compute=1.0), Demand()) == [1, 1, 1]


def test_a_small_transfer_slows_a_memory_bound_step_slightly():
    step, transfer = Demand(hbm=1.0), Demand(hbm=0.05, host_link_in=1.0)
    assert speeds_of(step, transfer) == [Fraction(20, 21)] * 2


def test_what_a_slowed_activity_leaves_goes_to_the_others():
    # HBM: load 2, so the first two run at 1/2. The second then uses 1/2 of compute and leaves 1/2 to the third, which
    # needs 0.8 of it: 0.5/0.8 = 5/8.
    demands = Demand(hbm=1.0), Demand(hbm=1.0, compute=1.0), Demand(compute=0.8)
    assert speeds_of(*demands) == [Fraction(1, 2), Fraction(1, 2), Fraction(5, 8)]


def test_a_third_party_can_gain_from_more_demand():
    b, c = Demand(hbm=1.0, compute=1.0), Demand(compute=1.0)
    assert speeds_of(Demand(hbm=0.0), b, c) == [1, Fraction(1, 2), Fraction(1, 2)]
    assert speeds_of(Demand(hbm=1.0), b, c) == [Fraction(1, 2), Fraction(1, 2), Fraction(1, 2)]
    assert speeds_of(Demand(hbm=1.0), Demand(hbm=1.0), b, c) == [Fraction(1, 3)] * 3 + [Fraction(2, 3)]


def test_overlap_by_hand():
    # 0-40: A alone, 60 left. 40-80: both at 1/2; B (20) is done. 80-120: A alone again, 40 left.
    a, b = play([(0, 100, Demand(hbm=1.0)), (40, 20, Demand(hbm=1.0))])
    assert (a.started_ticks, a.alone_ticks, a.finished_ticks) == (0, 100, 120)
    assert (b.started_ticks, b.alone_ticks, b.finished_ticks) == (40, 20, 80)
    assert (a.name, b.name) == ("job-0", "job-1")


def test_an_end_is_rounded_up_to_a_tick():
    # Speed 20/21: 5 ticks of work last 5.25 ticks; the step then has 10 - 6 * 20/21 = 30/7 left, alone.
    transfer, step = play([(0, 5, Demand(hbm=0.05)), (0, 10, Demand(hbm=1.0))])
    assert transfer.finished_ticks == 6
    assert step.finished_ticks == 6 + 5


# One activity alone


@given(TICKS, DEMANDS, st.integers(0, 10**6))
def test_alone_ends_exactly_for_one_event(alone_ticks, demand, start):
    env = simpy.Environment(initial_time=start)
    activity = SharedDevice(env).start(alone_ticks, demand, "step")
    env.step()
    assert activity.finished_ticks == env.now == start + alone_ticks
    assert activity.done.processed
    assert activity.done.value is activity
    assert env.peek() == math.inf


@given(st.lists(st.tuples(st.integers(0, 500), DEMANDS), min_size=1, max_size=5))
def test_one_after_another_never_slow_each_other(work):
    env = simpy.Environment()
    device = SharedDevice(env)

    def engine():
        for ticks, demand in work:
            begin = env.now
            yield device.start(ticks, demand, "step").done
            assert env.now == begin + ticks
            assert device.is_idle

    env.run(env.process(engine()))
    assert env.now == sum(ticks for ticks, _ in work)


def test_an_end_is_processed_after_the_other_events_of_its_tick():
    env = simpy.Environment()
    seen = []

    def note(delay, what):
        yield env.timeout(delay)
        seen.append(what)

    activity = SharedDevice(env).start(10, Demand(), "step")
    activity.done.callbacks.append(lambda _: seen.append("step end"))
    env.process(note(10, "arrival"))
    env.run()
    assert seen == ["arrival", "step end"]


def test_a_start_at_the_tick_of_an_end_does_not_overlap_it():
    env = simpy.Environment()
    device = SharedDevice(env)
    device.start(10, Demand(hbm=1.0), "first")
    env.run(until=10)
    second = device.start(10, Demand(hbm=1.0), "second")
    assert device.num_active == 2
    env.run()
    assert second.finished_ticks == 20


def test_waiting_for_several_ends_with_a_condition():
    env = simpy.Environment()
    device = SharedDevice(env)
    pair = [device.start(10, Demand(hbm=1.0), name) for name in "ab"]
    env.run(env.all_of([activity.done for activity in pair]))
    assert env.now == 20


# Laws of the allocation


@given(st.lists(DEMANDS, max_size=7))
def test_no_resource_is_used_beyond_its_capacity_and_none_idles_that_someone_waits_for(demands):
    speeds = speeds_of(*demands)
    rounding = Fraction(len(demands), SPEED_UNITS)
    used = [
        sum(Fraction(d.share_units()[r], 10**9) * s for d, s in zip(demands, speeds, strict=True)) for r in range(5)
    ]
    assert all(share <= 1 for share in used)
    for demand, speed in zip(demands, speeds, strict=True):
        assert 0 < speed <= 1
        bottlenecks = [
            r
            for r in range(5)
            if demand.shares()[r]
            and used[r] >= 1 - rounding
            and all(s <= speed + rounding for d, s in zip(demands, speeds, strict=True) if d.shares()[r])
        ]
        assert speed == 1 or bottlenecks


@given(st.lists(DEMANDS, max_size=6))
def test_speeds_equal_the_fractional_oracle(demands):
    exact = fractional_speeds(dict(enumerate(demands)))
    for i, speed in enumerate(speeds_of(*demands)):
        assert abs(exact[i] - speed) <= Fraction(4 * len(demands), SPEED_UNITS)


@given(st.lists(DEMANDS, min_size=1, max_size=5), st.integers(0, 4))
def test_equal_demands_get_equal_speeds_in_any_order(demands, index):
    twin = demands[index % len(demands)]
    *speeds, twin_speed = fair_speeds([*demands, twin])
    assert twin_speed == speeds[index % len(demands)]
    assert fair_speeds([twin, *reversed(demands)]) == [twin_speed, *reversed(speeds)]


@given(st.lists(DEMANDS, min_size=1, max_size=6), st.integers(0, 5), DEMANDS)
def test_more_demand_speeds_up_neither_oneself_nor_the_slowest(demands, index, extra):
    index %= len(demands)
    own = demands[index]
    larger = Demand(*(max(pair) for pair in zip(own.shares(), extra.shares(), strict=True)))
    before = fair_speeds(demands)
    after = fair_speeds([*demands[:index], larger, *demands[index + 1 :]])
    assert after[index] <= before[index] + len(demands)
    assert min(after) <= min(before) + len(demands)
    joined = fair_speeds([*demands, extra])
    assert min(joined) <= min(before) + len(demands)


@given(st.lists(HBM_DEMANDS, min_size=1, max_size=6), HBM_DEMANDS)
def test_on_one_resource_another_activity_speeds_up_nobody(demands, extra):
    assert all(
        after <= before for after, before in zip(fair_speeds([*demands, extra]), fair_speeds(demands), strict=False)
    )


# Laws of a run


@given(jobs())
def test_ends_equal_the_fractional_oracle_within_a_tick_per_end(job_list):
    for activity, exact in zip(play(job_list), play_exactly(job_list), strict=True):
        # An end that waits for its tick can move another's by a tick, in either direction.
        assert abs(activity.finished_ticks - exact) <= len(job_list) + 1


@given(jobs())
def test_work_on_a_resource_never_exceeds_capacity_times_time(job_list):
    seen = []

    def watch(device):
        seen.append((device.env.now, [device.busy_ticks(resource) for resource in Resource]))

    play(job_list, watch)
    for (earlier, busy_before), (later, busy_after) in pairwise([(0, [0.0] * len(Resource)), *seen]):
        for before, after in zip(busy_before, busy_after, strict=True):
            assert -1e-6 <= after - before <= later - earlier + 1e-6
    for resource, busy in zip(Resource, seen[-1][1], strict=True):
        assert busy == pytest.approx(sum(getattr(d, resource.value) * alone for _, alone, d in job_list))


@given(st.lists(st.tuples(st.just(0), st.integers(1, 500), DEMANDS), min_size=1, max_size=6))
def test_a_batch_ends_between_its_longest_member_and_the_serial_sum(job_list):
    last = max(activity.finished_ticks for activity in play(job_list))
    alone = [ticks for _, ticks, _ in job_list]
    assert max(alone) <= last <= sum(alone) + len(alone)


@given(st.integers(1, 30), st.integers(0, 10**6), st.integers(0, 100))
def test_identical_activities_end_together_at_the_exact_multiple(count, alone_ticks, start):
    ends = {activity.finished_ticks for activity in play([(start, alone_ticks, Demand(hbm=1.0))] * count)}
    assert ends == {start + count * alone_ticks}


@given(jobs(HBM_DEMANDS), HBM_DEMANDS, st.integers(0, 500), st.integers(0, 500))
def test_on_one_resource_another_activity_ends_nobody_earlier(job_list, extra, start, alone):
    before = play(job_list)
    after = play([*job_list, (start, alone, extra)])
    for early, late in zip(before, after, strict=False):
        assert late.finished_ticks >= early.finished_ticks - len(job_list)
        assert early.finished_ticks >= early.started_ticks + early.alone_ticks


def test_nothing_drifts_over_many_changes_of_speed():
    # The long one shares HBM with 10,000 short ones at 20/21; each short one ends within the tick after 5.25.
    env = simpy.Environment()
    device = SharedDevice(env)
    long = device.start(10**9, Demand(hbm=1.0), "long")

    def transfers():
        for _ in range(10_000):
            yield device.start(20_000, Demand(hbm=0.05), "short").done
            yield env.timeout(1_000)

    env.process(transfers())
    env.run()
    # 10,000 periods of 21,000 ticks at 20/21 lose 1,000 ticks each.
    assert long.finished_ticks == 10**9 + 10_000 * 1_000


def test_busy_ticks_in_the_middle_of_a_run():
    env = simpy.Environment()
    device = SharedDevice(env)
    device.start(100, Demand(hbm=1.0, compute=0.25), "a")
    device.start(100, Demand(hbm=1.0), "b")
    env.run(until=50)
    assert device.busy_ticks(Resource.HBM) == pytest.approx(50)
    assert device.busy_ticks(Resource.COMPUTE) == pytest.approx(0.25 * 25)
    assert device.busy_ticks(Resource.INTERCONNECT) == 0


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan, math.inf])
def test_a_share_outside_zero_to_one_is_refused(share):
    with pytest.raises(InvariantViolation, match="between 0 and 1"):
        Demand(interconnect=share)


@pytest.mark.parametrize("ticks", [-1, 1.0, True, np.int64(3)])
def test_a_duration_that_is_no_tick_count_is_refused(ticks):
    device = SharedDevice(simpy.Environment())
    with pytest.raises(InvariantViolation, match="activity 'step': alone_ticks"):
        device.start(ticks, Demand(), "step")
    assert device.is_idle


def test_a_clock_of_fractions_is_refused():
    env = simpy.Environment(initial_time=0.5)
    with pytest.raises(InvariantViolation, match="integer ticks"):
        SharedDevice(env).start(1, Demand(), "step")


# Queueing theory


def mean_sojourn_s(rng, service_s, arrival_rate, customers=1_200, measured=slice(150, 1_000)):
    """Mean sojourn of the measured customers in one replication; later arrivals keep the load up until they leave."""
    env = simpy.Environment()
    device = SharedDevice(env)
    activities = []

    def arrive():
        gaps = rng.exponential(1 / arrival_rate, customers)
        for gap, size in zip(gaps, service_s(rng, customers), strict=True):
            yield env.timeout(round(gap * TICKS_PER_SECOND))
            activities.append(device.start(round(size * TICKS_PER_SECOND), Demand(hbm=1.0), "customer"))

    env.process(arrive())
    env.run()
    return np.mean([a.finished_ticks - a.started_ticks for a in activities[measured]]) / TICKS_PER_SECOND


SERVICE_S = {
    "M/M/1-PS": lambda rng, count: rng.exponential(1.0, count),
    "M/D/1-PS": lambda rng, count: np.ones(count),
    # Mean 1, second moment 4.42: served in order, customers would wait 2.21 times as long as in M/M/1.
    "M/H2/1-PS": lambda rng, count: rng.exponential(np.where(rng.random(count) < 0.8, 0.45, 3.2)),
}


@pytest.mark.parametrize("queue", SERVICE_S)
def test_mean_sojourn_of_processor_sharing(queue):
    # Mean service 1 s and load 0.6: 1/(mu - lambda) = 2.5 s whatever the distribution of service (Kleinrock 1967;
    # insensitivity: Kelly 1979). Welch: Student's t on 20 independent replications, 99.9 % two-sided: t_19 = 3.883.
    seeds = np.random.SeedSequence(20_260_101).spawn(20)
    means = [mean_sojourn_s(np.random.default_rng(seed), SERVICE_S[queue], arrival_rate=0.6) for seed in seeds]
    half_width_s = 3.883 * np.std(means, ddof=1) / math.sqrt(len(means))
    assert half_width_s < 0.5
    assert abs(np.mean(means) - 2.5) < half_width_s
