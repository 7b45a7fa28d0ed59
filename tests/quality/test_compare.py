"""Ranking at equal bytes: the rule, by itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.compression import parse_compression
from kvsim.quality.compare import Point, method_of, rank_agreement, rank_at

KIVI4, KIVI2 = "kivi-4", "kivi-2"
SOME = (
    Point("native", 16.0, 0.0),
    Point("fp8", 8.0, 0.010),
    Point(KIVI4, 5.0, 0.030, (0.02, 0.04)),
    Point(KIVI2, 3.0, 0.300, (0.2, 0.4)),
    Point("mxfp4", 4.25, 0.035, (0.03, 0.05)),
    Point("snapkv:0.5", 8.0, 0.5),
)


def _at(budget: float) -> list[tuple[str, str]]:
    return [(one.method, one.point.strategy) for one in rank_at(SOME, budget)]


def test_each_method_stands_with_its_best_configuration_that_fits() -> None:
    assert _at(8) == [("fp8", "fp8"), ("kivi", KIVI4), ("mxfp4", "mxfp4"), ("snapkv", "snapkv:0.5")]
    assert _at(4.5) == [("mxfp4", "mxfp4"), ("kivi", KIVI2)]
    assert _at(4.25) == _at(4.5), "a budget that is met exactly is met"


def test_nothing_is_extrapolated() -> None:
    assert _at(2.9) == []


def test_intervals_that_reach_the_first_are_ties() -> None:
    ranking = rank_at(SOME[2:5], 5)
    assert [one.ties_with_best for one in ranking] == [True, True]
    assert [one.ties_with_best for one in rank_at(SOME[3:5], 5)] == [True, False]


def test_methods_are_named_by_their_parts() -> None:
    compression = parse_compression("snapkv:0.5+kivi-2")
    assert method_of(compression) == "snapkv+kivi"
    assert compression.family == "eviction + quantisation"
    assert method_of(parse_compression("native")) == "native"


@given(st.lists(st.floats(0.01, 9.0), min_size=1, max_size=6), st.floats(2.0, 16.0))
def test_a_larger_budget_never_hurts(risks: list[float], budget: float) -> None:
    names = ("fp8", "int4_per_token_head", KIVI4, KIVI2, "mxfp4", "nvfp4")
    points = [Point(name, 3.0 + index, risk) for index, (name, risk) in enumerate(zip(names, risks, strict=False))]
    smaller = {one.method: one.point.risk for one in rank_at(points, budget)}
    larger = {one.method: one.point.risk for one in rank_at(points, budget + 1)}
    assert all(larger[method] <= risk for method, risk in smaller.items())


def test_agreement_of_two_rankings() -> None:
    single = [point for point in SOME if point.strategy != KIVI2]
    same = rank_at(single, 8)
    reverse = rank_at([Point(one.strategy, one.bits_per_element, -one.risk) for one in single], 8)
    assert rank_agreement(same, same) == pytest.approx(1.0)
    assert rank_agreement(same, reverse) == pytest.approx(-1.0)
    assert rank_agreement(same, rank_at(SOME[:2], 8)) is None
