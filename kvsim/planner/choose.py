"""From feasible candidates to the plan's points: the Pareto set, simulated where it differs most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvsim.errors import InfeasibleScenario, KvsimError
from kvsim.planner.devices import picks
from kvsim.planner.feasible import Refusal, simulated_refusals
from kvsim.planner.front import Standing, pareto, spread_out
from kvsim.planner.playing import play
from kvsim.planner.points import Described, doubts
from kvsim.planner.request import PlanRequest
from kvsim.planner.screen import Screened, Screener
from kvsim.planner.search import standing
from kvsim.planner.watch import Watch
from kvsim.report import Report

ROUNDS = 3
"""Points that miss a limit when simulated are replaced by others; so many times the points asked for are simulated."""
PICKS_PER_DEVICE = 12
"""Simulations at most until a device's picks hold every limit."""


@dataclass(frozen=True)
class Player:
    """How scenarios are simulated."""

    base_dir: Path | None
    workers: int
    watch: Watch


def front(points: Sequence[Screened]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Pareto set by the closed form: (first of equal points, the others), equal meaning one strategy and device too."""
    standings = [standing(one) for one in points]
    groups: dict[tuple[Standing, str], list[int]] = {}
    for index in pareto(standings):
        groups.setdefault((standings[index], points[index].candidate.device), []).append(index)
    return tuple((members[0], tuple(members[1:])) for members in groups.values())


def choose(request: PlanRequest, screener: Screener, feasible: Sequence[Screened], player: Player) -> Described:
    """Simulate each device's picks, then points of the Pareto set that differ most.

    A point that misses a limit when simulated leaves, which may bring others into the set; these are simulated in its
    place, up to a number of simulations that depends on the request alone.

    Raises
    ------
    InfeasibleScenario
        Every candidate was simulated, and each misses a limit.
    """
    chosen = _Choice(request, screener, player, list(feasible))
    if request.simulate:
        chosen.settle(chosen.picks, PICKS_PER_DEVICE * len(request.devices))
        chosen.settle(chosen.spread, ROUNDS * request.simulate)
    return chosen.described()


@dataclass
class _Choice:
    """Candidates that are left, and what simulations said."""

    request: PlanRequest
    screener: Screener
    player: Player
    left: list[Screened]
    missed: list[tuple[Screened, Refusal]] = field(default_factory=list)
    reports: dict[int, Report] = field(default_factory=dict)
    """By the candidate's id."""

    def settle(self, wanted: Callable[[], list[Screened]], budget: int) -> None:
        """Simulate what is wanted until all of that holds, or so many were simulated."""
        while todo := [one for one in wanted() if id(one) not in self.reports][:budget]:
            budget -= len(todo)
            self._play(todo)

    def picks(self) -> list[Screened]:
        """Each device's picks."""
        doubtful = doubts(self.missed, self.reports)
        found = (one for name in self.request.devices for one in picks(self.left, name, doubtful) if one is not None)
        return list({id(one): one for one in found}.values())

    def spread(self) -> list[Screened]:
        """Points of the Pareto set that differ most, without doubtful ones."""
        doubtful = doubts(self.missed, self.reports)
        heads = [one for one in self._heads() if not doubtful(one)]
        return [heads[index] for index in spread_out([standing(one) for one in heads], self.request.simulate)]

    def described(self) -> Described:
        """The Pareto set of what is left, with what simulations said."""
        groups = front(self.left)
        heads = [self.left[first] for first, _ in groups]
        others = {id(self.left[first]): tuple(self.left[index] for index in rest) for first, rest in groups}
        return Described(self.left, heads, others, self.reports, self.missed)

    def _heads(self) -> list[Screened]:
        return [self.left[first] for first, _ in front(self.left)]

    def _play(self, todo: Sequence[Screened]) -> None:
        player, watch = self.player, self.player.watch
        watch.expect(len(todo))
        scenarios = [self.screener.scenario(one.candidate) for one in todo]
        failed = set()
        for one, result in zip(todo, play(scenarios, player.base_dir, player.workers, watch.tick), strict=True):
            refusal = _refusal(result, self.request)
            if refusal is not None:
                self.missed.append((one, refusal))
                failed.add(id(one))
            elif isinstance(result, Report):
                self.reports[id(one)] = result
        self.left = [one for one in self.left if id(one) not in failed]
        if not self.left:
            raise InfeasibleScenario(_all_missed(self.missed))


def _refusal(result: Report | KvsimError, request: PlanRequest) -> Refusal | None:
    if isinstance(result, KvsimError):
        return Refusal("cannot run", str(result))
    return next(simulated_refusals(result, request), None)


def _all_missed(missed: Sequence[tuple[Screened, Refusal]]) -> str:
    counts = Counter(refusal.limit for _, refusal in missed)
    lines = ["every candidate that holds the limits by the closed form misses one when it is simulated"]
    for limit, count in counts.most_common():
        example = next(refusal.reason for _, refusal in missed if refusal.limit == limit)
        lines.append(f"{count} miss {limit!r}, such as: {example}")
    return "\n".join(lines)
