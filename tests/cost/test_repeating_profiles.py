"""Profiles of caches that are cut back again and again: closed forms against the steps one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.compression.base import TokenCurve, growing
from kvsim.compression.selection.cuts import cut_pulses, sawtooth
from kvsim.cost.profile import Growth, SequenceProfile, after_cuts, clip, merge_priced

STEPS = 260
teeth = st.builds(sawtooth, st.integers(0, 40), st.integers(1, 40), st.integers(1, 14))
pulses = st.builds(cut_pulses, st.integers(0, 40), st.integers(1, 40), st.integers(1, 14))
rising = st.builds(growing, st.integers(0, 40), st.one_of(st.none(), st.integers(1, 80)))
curves = st.one_of(teeth, pulses, rising)
priced_curves = st.dictionaries(curves, st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=4)


def profile_of(priced: dict[TokenCurve, tuple[int, int]], *growths: Growth) -> SequenceProfile:
    """Prices are in ticks here, so nothing is rounded."""
    segments, repeat = merge_priced({curve: (1000 * one, 1000 * two) for curve, (one, two) in priced.items()})
    return SequenceProfile(segments, growths, 7, 0, repeat)


@settings(max_examples=60)
@given(priced=priced_curves)
def test_every_step_costs_what_its_tokens_cost(priced: dict[TokenCurve, tuple[int, int]]) -> None:
    profile = profile_of(priced)
    plain = [
        tuple(sum(curve(step + 1) * price[part] for curve, price in priced.items()) for part in (0, 1))
        for step in range(STEPS)
    ]
    for step, expected in enumerate(plain):
        segment = profile.segment_at(step)
        since = step - segment.start_step
        assert since >= 0
        got = (segment.ticks + since * segment.slope_ticks, segment.unpack_ticks + since * segment.unpack_slope_ticks)
        assert got == expected
    whole, unpack = profile.ticks_at(np.arange(STEPS))
    assert list(zip(whole.tolist(), unpack.tolist(), strict=True)) == plain
    for steps in (0, 1, 2, 17, 100, STEPS):
        assert profile.total_ticks(steps) == tuple(sum(one[part] for one in plain[:steps]) for part in (0, 1))


@settings(max_examples=60)
@given(priced=priced_curves, curve=curves)
def test_between_two_bends_nothing_changes(priced: dict[TokenCurve, tuple[int, int]], curve: TokenCurve) -> None:
    profile = profile_of(priced, Growth(after_cuts(curve), 1))
    bend = 0
    while bend is not None and bend < STEPS:
        following = profile.next_bend(bend)
        assert following is None or following > bend
        end = STEPS if following is None else min(following, STEPS)
        for step in range(bend, end):
            segment = profile.segment_at(step)
            assert segment.slope_ticks == profile.segment_at(bend).slope_ticks
            assert profile.growths[0].curve.segment_at(step) == profile.growths[0].curve.segment_at(bend)
        bend = following


@given(curve=teeth.filter(lambda curve: curve.period > 0))
def test_after_a_cut_the_target_is_left(curve: TokenCurve) -> None:
    left = after_cuts(curve)
    for step in range(1, STEPS):
        falls = curve(step + 1) <= curve(step)
        assert left(step) == (curve(step + 1) - 1 if falls else curve(step))


@given(
    start=st.integers(0, 40), target=st.integers(1, 40), interval=st.integers(2, 14), size=st.sampled_from((1, 4, 16))
)
def test_the_peak_is_the_most_ever_held(start: int, target: int, interval: int, size: int) -> None:
    curve = sawtooth(start, target, interval)
    profile = profile_of({curve: (1, 0)}, Growth(after_cuts(curve), 3))
    for steps in (0, 1, 5, 30, 100, STEPS):
        tokens = max(curve(step) for step in range(steps + 1))
        assert profile.peak_bytes(steps, size) == -(-tokens // size) * 3 + 7


@given(curve=curves, cap=st.integers(1, 60))
def test_clipping_is_the_minimum(curve: TokenCurve, cap: int) -> None:
    clipped = clip(curve, cap)
    for step in range(STEPS):
        assert clipped(step) == min(curve(step), cap)


def test_a_typical_step_is_the_mean_of_its_period() -> None:
    profile = profile_of({sawtooth(10, 10, 8): (5, 1), growing(10): (2, 0)})
    whole = [profile.total_ticks(step + 1)[0] - profile.total_ticks(step)[0] for step in range(100)]
    assert profile.typical_ticks(3) == (whole[3], 14)
    assert profile.typical_ticks(40)[0] == pytest.approx(np.mean(whole[40:48]), abs=0.5)
    assert profile.typical_ticks(44) == profile.typical_ticks(40)


def test_a_step_with_the_first_cut_is_taken_as_its_neighbours() -> None:
    profile = profile_of({sawtooth(10, 10, 8): (5, 1), cut_pulses(10, 10, 8): (800, 800)})
    assert profile.total_ticks(8)[0] - profile.total_ticks(7)[0] == 800 + 5 * 18
    assert profile.typical_ticks(6) == (5 * 17, 17)
    assert profile.typical_ticks(7) == (5 * 18 + 800 / 8, 18 + 800 / 8)
