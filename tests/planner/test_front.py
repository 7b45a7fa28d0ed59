"""The Pareto set against its definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvsim.planner.front import BLOCK_POINTS, Standing, dominates, pareto, spread_out

NUMBERS = st.integers(0, 4).map(float)
POINTS = st.builds(
    Standing,
    costs=st.tuples(NUMBERS, NUMBERS, NUMBERS),
    risk=st.none() | NUMBERS,
    strategy=st.sampled_from("abc"),
    world=st.sampled_from((None, "w")),
)
# A strategy has one risk, known or not.
LISTS = st.lists(POINTS, max_size=40).map(
    lambda points: [
        Standing(p.costs, next(q.risk for q in points if q.strategy == p.strategy), p.strategy, p.world) for p in points
    ]
)


@given(LISTS)
def test_the_set_is_what_none_dominates(points):
    wanted = [i for i, one in enumerate(points) if not any(dominates(other, one) for other in points)]
    assert pareto(points) == tuple(wanted)


@given(LISTS)
def test_every_other_point_is_dominated_by_one_of_the_set(points):
    front = {index: points[index] for index in pareto(points)}
    for index, one in enumerate(points):
        assert index in front or any(dominates(kept, one) for kept in front.values())


@given(LISTS, st.randoms(use_true_random=False))
def test_dominance_is_a_strict_order(points, random):
    sample = random.sample(points, min(6, len(points)))
    for a in sample:
        assert not dominates(a, a)
        for b in sample:
            assert not (dominates(a, b) and dominates(b, a))
            for c in sample:
                assert not (dominates(a, b) and dominates(b, c)) or dominates(a, c)


@given(LISTS, POINTS)
def test_a_further_point_removes_only_what_it_dominates(points, further):
    further = next(
        (Standing(further.costs, p.risk, p.strategy, further.world) for p in points if p.strategy == further.strategy),
        further,
    )
    before, after = pareto(points), pareto([*points, further])
    gone = set(before) - set(after)
    assert all(dominates(further, points[index]) for index in gone)


def test_an_unknown_risk_dominates_nothing_of_another_strategy():
    known, better = Standing((2.0, 2.0), 0.5, "a"), Standing((1.0, 1.0), None, "b")
    assert not dominates(better, known)
    assert pareto([known, better]) == (0, 1)
    assert dominates(better, Standing((2.0, 1.0), None, "b"))
    assert dominates(Standing((1.0, 1.0), 9.0, "c"), Standing((2.0, 1.0), None, "b"))


def test_blocks_do_not_change_the_set():
    points = [
        Standing((float(i % 97), float((i * 31) % 101)), float(i % 3), i % 3) for i in range(2 * BLOCK_POINTS + 5)
    ]
    wanted = tuple(i for i, one in enumerate(points) if not any(dominates(other, one) for other in points))
    assert pareto(points) == wanted


@given(LISTS.filter(bool), st.integers(1, 8))
def test_chosen_points_are_distinct_and_hold_the_best_of_each_axis(points, count):
    chosen = spread_out(points, count)
    assert len(set(chosen)) == len(chosen) == min(count, len(points))
    if count >= 4:
        for axis in range(3):
            assert min(p.costs[axis] for p in points) == min(points[i].costs[axis] for i in chosen)
