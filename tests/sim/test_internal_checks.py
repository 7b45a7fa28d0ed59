"""The checks that settle.py makes on every run do fire: break the simulator on purpose, and see it say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sim_cases import Case, build_case, deploy, table

from kvsim.errors import InvariantViolation, KvsimError
from kvsim.sim import engine
from kvsim.sim.arrivals import ArrivalSource
from kvsim.sim.batch import DecodeBatch, SequenceState
from kvsim.sim.scheduling import Scheduler
from kvsim.sim.scheduling.in_flight import InFlightScheduler


@pytest.fixture
def case() -> Case:
    return build_case(deploy(), table([0, 0, 0], [40, 40, 40], [30, 20, 10]))


def wrap(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, change: Callable[..., Any]) -> None:
    """Replace a method by ``change(original, self, ...)``."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *args, **kwargs: change(original, self, *args, **kwargs))


def test_an_honest_run_passes(case: Case) -> None:
    assert case.play().log.rejected == [False] * 3


def test_lost_blocks_are_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def leak(original: Callable[..., int], batch: DecodeBatch, sequence: SequenceState) -> int:
        return original(batch, sequence) - 1

    wrap(monkeypatch, DecodeBatch, "remove", leak)
    with pytest.raises(InvariantViolation, match="missing pool bytes"):
        case.play()


def test_invented_blocks_are_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def invent(original: Callable[..., int], batch: DecodeBatch, sequence: SequenceState) -> int:
        return original(batch, sequence) + 1

    wrap(monkeypatch, DecodeBatch, "remove", invent)
    with pytest.raises(InvariantViolation, match="missing pool bytes"):
        case.play()


def test_decode_work_left_behind_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(original: Callable[..., int], batch: DecodeBatch, sequence: SequenceState) -> int:
        batch.variable += 5
        return original(batch, sequence)

    wrap(monkeypatch, DecodeBatch, "remove", forget)
    with pytest.raises(InvariantViolation, match="ticks of decode work"):
        case.play()


def test_a_forgotten_boundary_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(original: Callable[..., int], batch: DecodeBatch, sequence: SequenceState) -> int:
        batch.growth_total += 1
        return original(batch, sequence)

    wrap(monkeypatch, DecodeBatch, "remove", forget)
    with pytest.raises(InvariantViolation, match="bytes of pending growth"):
        case.play()


def test_a_dropped_request_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic: a request that silently disappears from the queue."""

    def drop(original: Callable[..., None], source: ArrivalSource, now_ticks: int) -> None:
        original(source, now_ticks)
        if len(source.replicas[0].waiting) == 3:
            source.replicas[0].waiting.pop()

    wrap(monkeypatch, ArrivalSource, "deliver", drop)
    with pytest.raises(InvariantViolation, match=r"request \d ran backwards"):
        case.play()


def test_a_clock_that_runs_backwards_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def backdate(original: Callable[..., None], replica: engine.ReplicaEngine, index: int, ended: int) -> None:
        original(replica, index, ended)
        replica.log.finished[index] = replica.log.first_token[index] - 1

    wrap(monkeypatch, engine.ReplicaEngine, "_complete", backdate)
    with pytest.raises(InvariantViolation, match="ran backwards"):
        case.play(coalesce=False)


def test_idling_beside_admissible_work_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(original: Callable[..., Any], scheduler: Scheduler, *_: int) -> list[Any]:
        scheduler.looked = True
        return []

    wrap(monkeypatch, InFlightScheduler, "schedule", refuse)
    with pytest.raises(InvariantViolation, match="waits although the replica is idle"):
        case.play()


def test_an_exhausted_pool_without_a_victim_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def always_due(original: Callable[..., int], batch: DecodeBatch) -> int:
        return 10**18

    wrap(monkeypatch, DecodeBatch, "due_bytes", always_due)
    tight = build_case(deploy(), table([0, 0], [40, 40], [30, 30]), spare_blocks=0)
    with pytest.raises(InvariantViolation, match="exhausted although nothing runs"):
        tight.play()


def test_a_violation_is_a_bug_and_not_an_error_that_users_can_act_on() -> None:
    assert not issubclass(InvariantViolation, KvsimError)
