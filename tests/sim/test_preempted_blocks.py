"""What a preempted sequence finds again of itself in the pool."""

from __future__ import annotations

import pytest
from run_invariants import check_run
from sim_cases import Case, build_case, deploy, table

from kvsim.sim.run import RunResult


def short_pool(**options: object) -> Case:
    """Two answers that outgrow the pool together: the later one gives way once or more."""
    return build_case(deploy(**options), table([0, 0], [100, 100], [120, 60]), spare_blocks=4)


def play(case: Case) -> RunResult:
    result = case.play()
    check_run(case, result)
    return result


@pytest.mark.parametrize("ahead", [False, True])
def test_blocks_that_nobody_used_are_not_computed_again(ahead: bool) -> None:
    kept, lost = (play(short_pool(async_scheduling=ahead, enable_prefix_caching=caching)) for caching in (True, False))
    (one,), (other,) = kept.records, lost.records
    assert one.preemptions == other.preemptions > 0
    assert 0 < one.recomputed_tokens < other.recomputed_tokens
    assert kept.log.finished[1] < lost.log.finished[1]


def test_the_fewer_blocks_there_are_the_more_of_the_victim_is_lost() -> None:
    """The survivor lives for 70 tokens in whatever the victim left, from its last block on."""
    records = []
    for spare_blocks in range(3, 9):
        (record,) = play(build_case(deploy(), table([0, 0], [100, 100], [70, 60]), spare_blocks=spare_blocks)).records
        records.append(record)
    assert all(record.preemptions == 1 for record in records)
    recomputed = [record.recomputed_tokens for record in records]
    assert recomputed == sorted(recomputed, reverse=True)
    assert recomputed[-1] < recomputed[0] < 100 + 60
