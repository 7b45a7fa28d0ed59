"""From a request to a plan: screen candidates, keep what holds the limits, take the Pareto set, simulate it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvsim.device_catalog import load_device
from kvsim.errors import InfeasibleScenario, InvalidSpec
from kvsim.planner.answer import DevicePlan, Plan, RefusalCount
from kvsim.planner.choose import Player, choose
from kvsim.planner.devices import beside_the_cheapest, device_plan
from kvsim.planner.feasible import Refusal, refusals, strategy_refusals
from kvsim.planner.points import Described, plan_point
from kvsim.planner.quality import RISK_NOTE
from kvsim.planner.request import PlanRequest
from kvsim.planner.screen import Screened, Screener
from kvsim.planner.search import DeviceSearch, search_device
from kvsim.planner.strategies import StrategySpace, space_of
from kvsim.planner.watch import Progress, Watch
from kvsim.scenario import Scenario
from kvsim.specs.price import Price


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
    watch = Watch(progress, cancelled)
    space = space_of(request.search)
    screener = Screener(_scenario(request), _prices(request), base_dir)
    # A workload that cannot be read is one error, and not one of each candidate.
    _ = screener.load
    searches = _search_all(request, screener, space, watch)
    pool = _feasible(request, searches, screener)
    if not pool.feasible:
        raise InfeasibleScenario(_nothing_feasible(request, pool))
    watch.begin("simulating", request.simulate)
    described = choose(request, screener, pool.feasible, Player(base_dir, workers, watch))
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
    request: PlanRequest, screener: Screener, space: StrategySpace, watch: Watch
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
    devices = list(beside_the_cheapest(devices))
    tried = [RefusalCount(limit="no strategy", count=count, example=reason) for reason, count in space.refused_alike]
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
