"""From a request to a plan: screen candidates, keep what holds the limits, take the Pareto set, simulate it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvsim.device_catalog import load_device
from kvsim.errors import Cancelled, InfeasibleScenario, InvalidSpec, KvsimError
from kvsim.planner.answer import DevicePlan, Plan, RefusalCount
from kvsim.planner.feasible import Refusal, refusals, simulated_refusals, strategy_refusals
from kvsim.planner.front import Standing, pareto, spread_out
from kvsim.planner.playing import play
from kvsim.planner.points import Described, device_plan, picks, plan_point
from kvsim.planner.quality import RISK_NOTE
from kvsim.planner.request import PlanRequest
from kvsim.planner.screen import Screened, Screener
from kvsim.planner.search import DeviceSearch, search_device, standing
from kvsim.planner.strategies import StrategySpace, named_space, strategy_space
from kvsim.report import Report
from kvsim.scenario import Scenario
from kvsim.specs.price import Price

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done."""
ROUNDS = 4
"""Points that miss a limit when simulated are replaced by others; so many times the points asked for are simulated."""


@dataclass
class _Watch:
    """Tells a caller how far the work is, and stops it where the caller wants."""

    progress: Progress | None
    cancelled: Callable[[], bool] | None
    stage: str = ""
    total: int = 1
    done: int = 0

    def begin(self, stage: str, total: int) -> None:
        self.stage, self.total, self.done = stage, max(1, total), 0

    def tick(self, count: int) -> None:
        """Count work that is done; raise Cancelled where the caller wants no more."""
        self.done += count
        if self.cancelled is not None and self.cancelled():
            msg = f"the plan was stopped while {self.stage}"
            raise Cancelled(msg)
        if self.progress is not None:
            self.progress(self.stage, min(1.0, self.done / self.total))


@dataclass
class _Pool:
    """Feasible candidates of all devices, and what was refused."""

    feasible: list[Screened] = field(default_factory=list)
    refused: dict[str, Counter[str]] = field(default_factory=dict)
    """By device: limit to how many."""
    examples: dict[tuple[str, str], str] = field(default_factory=dict)


def plan(
    request: PlanRequest,
    *,
    base_dir: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Plan:
    """Search what serves the request's load within its limits, and return the Pareto set with reasons.

    Parameters
    ----------
    request
        The question.
    base_dir
        Folder that relative paths start from.
    workers
        Most processes for simulations; they are started where the simulations are long enough.
    progress
        Called with a stage's name and the share of it that is done.
    cancelled
        Asked between candidates; where it answers true, Cancelled is raised.

    Raises
    ------
    ScenarioError
        A name is unknown, or options of the request do not go together.
    InfeasibleScenario
        Nothing that was tried holds every limit; the message counts which limits are missed.
    Cancelled
        The caller stopped it.
    """
    watch = _Watch(progress, cancelled)
    space = named_space(request.search.strategies) if request.search.strategies else strategy_space()
    screener = Screener(_scenario(request), _prices(request), base_dir)
    searches = _search_all(request, screener, space, watch)
    pool = _feasible(request, searches, screener)
    if not pool.feasible:
        raise InfeasibleScenario(_nothing_feasible(request, pool))
    described = _choose(request, screener, pool, base_dir, workers, watch)
    return _answer(request, screener, searches, space, pool, described)


def _scenario(request: PlanRequest) -> Scenario:
    """What all candidates share; bands are left out, as nothing that is compared here has one."""
    return Scenario(
        model=request.model,
        device=request.devices[0],
        workload=request.workload,
        calibration=request.calibration,
        slo=request.slo,
        seed=request.seed,
        bands=False,
    )


def _prices(request: PlanRequest) -> dict[str, Price]:
    """Prices of the request by the names that it gives its devices."""
    names = {name: load_device(name).spec.name for name in request.devices}
    found: dict[str, Price] = {}
    for price in request.prices:
        meant = [name for name, device in names.items() if price.device in (name, device)]
        if not meant:
            msg = f"prices: {price.device!r} is not one of the request's devices ({', '.join(request.devices)})"
            raise InvalidSpec(msg)
        found |= dict.fromkeys(meant, price)
    return found


def _search_all(
    request: PlanRequest, screener: Screener, space: StrategySpace, watch: _Watch
) -> tuple[DeviceSearch, ...]:
    most = max(request.search.max_candidates, len(space.strategies))
    watch.begin("screening", most * len(request.devices))
    found: list[DeviceSearch] = []
    for position, name in enumerate(request.devices):
        scenario = _scenario(request).model_copy(update={"device": name})
        found.append(search_device(request, name, scenario, screener, space, watch.tick))
        watch.done = most * (position + 1)
    return tuple(found)


def _feasible(request: PlanRequest, searches: Iterable[DeviceSearch], screener: Screener) -> _Pool:
    pool = _Pool()
    for search in searches:
        counts = pool.refused.setdefault(search.name, Counter())
        for (kind, reason), count in search.errors.items():
            limit = _LIMIT_OF_ERROR.get(kind, "cannot run")
            counts[limit] += count
            pool.examples.setdefault((search.name, limit), reason)
        for one in search.screened:
            first = _first_refusal(one, request, screener)
            if first is None:
                pool.feasible.append(one)
                continue
            counts[first.limit] += 1
            pool.examples.setdefault((search.name, first.limit), first.reason)
    return pool


_LIMIT_OF_ERROR = {"WeightsDoNotFit": "weights do not fit", "RequestDoesNotFit": "longest request"}


def _first_refusal(one: Screened, request: PlanRequest, screener: Screener) -> Refusal | None:
    for refusal in strategy_refusals(one.candidate.strategy, request):
        return refusal
    return next(refusals(one, request, screener.longest_tokens, screener.load.request_rate), None)


def _nothing_feasible(request: PlanRequest, pool: _Pool) -> str:
    lines = [f"nothing that was tried holds every limit for {request.model}"]
    for device, counts in pool.refused.items():
        lines += [
            f"{device}: {count} candidates miss {limit!r}, such as: {pool.examples[device, limit]}"
            for limit, count in counts.most_common()
        ]
    return "\n".join(lines)


def front(points: Sequence[Screened]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Pareto set by the closed form: (first of equal points, the others), equal meaning one strategy and device too."""
    standings = [standing(one) for one in points]
    groups: dict[tuple[Standing, str], list[int]] = {}
    for index in pareto(standings):
        groups.setdefault((standings[index], points[index].candidate.device), []).append(index)
    return tuple((members[0], tuple(members[1:])) for members in groups.values())


def _choose(
    request: PlanRequest,
    screener: Screener,
    pool: _Pool,
    base_dir: Path | None,
    workers: int,
    watch: _Watch,
) -> Described:
    """Simulate points of the Pareto set, replacing those that miss a limit, until there are enough or none is left."""
    left, missed = list(pool.feasible), []
    reports: dict[int, Report] = {}
    budget = ROUNDS * request.simulate
    watch.begin("simulating", request.simulate)
    while True:
        groups = front(left)
        heads = [left[first] for first, _ in groups]
        wanted = _wanted(request, heads, left)
        todo = [one for one in wanted if id(one) not in reports][: max(0, budget)]
        if not todo:
            break
        budget -= len(todo)
        watch.total = max(watch.total, watch.done + len(todo))
        results = play([screener.scenario(one.candidate) for one in todo], base_dir, workers, watch.tick)
        failed = set()
        for one, result in zip(todo, results, strict=True):
            refusal = _simulated_refusal(result, request)
            if refusal is not None:
                missed.append((one, refusal))
                failed.add(id(one))
            elif isinstance(result, Report):
                reports[id(one)] = result
        if not failed:
            break
        left = [one for one in left if id(one) not in failed]
        if not left:
            raise InfeasibleScenario(_missed_in_simulation(missed))
    others = {id(left[first]): tuple(left[index] for index in rest) for first, rest in groups}
    return Described(left, heads, others, reports, missed)


def _wanted(request: PlanRequest, heads: Sequence[Screened], left: Sequence[Screened]) -> list[Screened]:
    """Points to simulate: each device's picks, and those of the Pareto set that differ most."""
    if not request.simulate:
        return []
    found = {id(one): one for name in request.devices for one in picks(left, name) if one is not None}
    chosen = spread_out([standing(one) for one in heads], request.simulate)
    found |= {id(heads[index]): heads[index] for index in chosen}
    return list(found.values())


def _simulated_refusal(result: Report | KvsimError, request: PlanRequest) -> Refusal | None:
    if isinstance(result, KvsimError):
        return Refusal("cannot run", str(result))
    return next(simulated_refusals(result, request), None)


def _missed_in_simulation(missed: Sequence[tuple[Screened, Refusal]]) -> str:
    counts = Counter(refusal.limit for _, refusal in missed)
    lines = ["every candidate that holds the limits by the closed form misses one when it is simulated"]
    for limit, count in counts.most_common():
        example = next(refusal.reason for _, refusal in missed if refusal.limit == limit)
        lines.append(f"{count} miss {limit!r}, such as: {example}")
    return "\n".join(lines)


def _answer(
    request: PlanRequest,
    screener: Screener,
    searches: tuple[DeviceSearch, ...],
    space: StrategySpace,
    pool: _Pool,
    described: Described,
) -> Plan:
    by_name = {search.name: search for search in searches}
    chosen = described.final()
    points = tuple(
        plan_point(f"P{place}", one, request, screener, by_name[one.candidate.device], described)
        for place, one in enumerate(chosen, start=1)
    )
    devices: list[DevicePlan] = []
    for search in searches:
        counts = pool.refused[search.name]
        refused = tuple(
            RefusalCount(limit=limit, count=count, example=pool.examples[search.name, limit])
            for limit, count in counts.most_common()
        )
        devices.append(device_plan(search, refused, request, screener, described, chosen, points))
    tried = [RefusalCount(limit="no strategy", count=count, example=reason) for reason, count in space.refused]
    tried += [
        RefusalCount(limit=f"no setting of {search.name}", count=1, example=reason)
        for search in searches
        for reason in search.settings.refused
    ]
    return Plan(
        request=request,
        points=points,
        devices=tuple(devices),
        screened=sum(search.answered for search in searches),
        feasible=len(pool.feasible),
        on_screen_front=len(described.heads),
        simulated=len(described.reports) + len(described.missed),
        refused_in_simulation=_counted(described.missed),
        not_tried=tuple(tried),
        notes=_notes(request, searches, described),
    )


def _counted(missed: Sequence[tuple[Screened, Refusal]]) -> tuple[RefusalCount, ...]:
    counts = Counter(refusal.limit for _, refusal in missed)
    return tuple(
        RefusalCount(limit=limit, count=count, example=next(reason for _, (name, reason) in missed if name == limit))
        for limit, count in counts.most_common()
    )


def _notes(request: PlanRequest, searches: Iterable[DeviceSearch], described: Described) -> tuple[str, ...]:
    notes = [note for search in searches for note in search.notes]
    notes.append(RISK_NOTE)
    unsimulated = len(described.heads) - len(described.reports)
    if request.simulate and unsimulated:
        notes.append(
            f"{unsimulated} further points of the Pareto set by the closed form were not simulated; they stand in the "
            "files without simulated figures (raise simulate to play them)"
        )
    if not request.simulate:
        notes.append("nothing was simulated: p99 TTFT is unknown, and mean TTFT stands in its place on the Pareto set")
    cut = {search.name: search.left_out for search in searches if search.left_out}
    if cut:
        listed = ", ".join(f"{name}: {count}" for name, count in cut.items())
        notes.append(
            f"settings of further strategies were not tried ({listed}); raise search.max_candidates to try them"
        )
    return tuple(dict.fromkeys(notes))
