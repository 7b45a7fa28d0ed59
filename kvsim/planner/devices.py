"""What each device offers: its picks, facts and crossovers, and how it stands beside the cheapest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvsim.compression import Compression, parse_compression
from kvsim.device_catalog import load_device
from kvsim.edge import EdgeAnswer, edge_answers
from kvsim.planner.answer import DevicePlan, PlanPoint, RefusalCount
from kvsim.planner.crossovers import Crossover, crossovers
from kvsim.planner.flags import shipped_by
from kvsim.planner.points import Described, Doubts, cheapness, plan_point
from kvsim.planner.reasons import device_facts, probe
from kvsim.planner.request import PlanRequest
from kvsim.planner.screen import Screened, Screener
from kvsim.planner.search import DeviceSearch
from kvsim.planner.strategies import PROBES, baselines


def device_plan(
    search: DeviceSearch,
    refused: tuple[RefusalCount, ...],
    request: PlanRequest,
    screener: Screener,
    described: Described,
    chosen: Sequence[Screened],
    points: Sequence[PlanPoint],
) -> DevicePlan:
    """Describe what one device offers."""
    mine = [one for one in described.left if one.candidate.device == search.name]
    common = {
        "device": search.name, "title": search.device.title, "screened": search.answered, "feasible": len(mine),
        "refused": refused,
    }  # fmt: skip
    if not mine:
        most = max(refused, key=lambda one: one.count, default=None)
        why = f"nothing holds every limit; most miss {most.limit!r}: {most.example}" if most else "nothing can run"
        return DevicePlan(why=why, **common)
    seen = picks([one for one in mine if id(one) in described.reports], search.name, described.is_doubtful)
    unseen = picks(mine, search.name, described.is_doubtful)
    # Those that were simulated are known to hold their targets.
    today, cheapest = (one or other for one, other in zip(seen, unseen, strict=True))
    named = {id(one): point for one, point in zip(chosen, points, strict=True)}

    def described_pick(one: Screened) -> PlanPoint:
        return named.get(id(one)) or plan_point(None, one, request, screener, search, described)

    best = today or cheapest or mine[0]
    point = described_pick(best)
    return DevicePlan(
        runs_today=None if today is None else point,
        cheapest=None if cheapest is None else described_pick(cheapest),
        why=f"{point.limit}; {point.compared[0].decides}",
        facts=_facts(best, search, screener),
        alone=_alone(point, search),
        crossovers=tuple(_crossovers(best, cheapest, search, screener)),
        **common,
    )


def picks(points: Sequence[Screened], device: str, doubtful: Doubts) -> tuple[Screened | None, Screened | None]:
    """(cheapest that its engine ships for the device's vendor, cheapest of all) of one device's points."""
    mine = [one for one in points if one.candidate.device == device and not doubtful(one)]
    vendor = load_device(device).spec.vendor
    shipped = [one for one in mine if shipped_by(one.candidate, vendor)]
    return min(shipped, key=cheapness, default=None), min(mine, key=cheapness, default=None)


def _alone(point: PlanPoint, search: DeviceSearch) -> EdgeAnswer | None:
    """What one user of the device gets of a point: context, lasting speed, energy, battery."""
    if search.device.kind not in ("edge", "mobile"):
        return None
    return edge_answers(point.scenario, (point.strategy,))[0]


def _facts(best: Screened, search: DeviceSearch, screener: Screener) -> tuple[str, ...]:
    found = probe(screener, best.candidate, PROBES[best.candidate.engine.kind], max(1, round(best.batch)))
    return device_facts(search.device, found)


def _crossovers(
    today: Screened, cheapest: Screened | None, search: DeviceSearch, screener: Screener
) -> Iterator[Crossover]:
    """What runs today and what would be cheapest, each against the baselines."""
    held = tuple(parse_compression(name) for name in baselines(today.candidate.engine.kind))
    candidate, others = today.candidate, held
    if candidate.strategy == Compression():
        # Where nothing is best, the question is when 8 bits would be.
        candidate = candidate._replace(strategy=parse_compression(PROBES[candidate.engine.kind][0]))
        others = held[:1]
    yield from crossovers(screener, candidate, others, max(1, round(today.batch)), search.model)
    if cheapest is not None and cheapest.candidate.strategy not in (today.candidate.strategy, *held):
        pair = (today.candidate.strategy,)
        yield from crossovers(screener, cheapest.candidate, pair, max(1, round(cheapest.batch)), search.model)


def beside_the_cheapest(devices: Sequence[DevicePlan]) -> Iterator[DevicePlan]:
    """Say of each device what price and speed make of its dollars per token, beside the cheapest device's."""
    priced = {usd: one.runs_today for one in devices if (usd := _usd(one.runs_today)) is not None}
    best = priced[min(priced)] if priced else None
    for one in devices:
        mine = one.runs_today
        if best is None or mine is None or mine is best:
            yield one
        else:
            yield one.model_copy(update={"beside": _beside(mine, best)})


def _beside(mine: PlanPoint, best: PlanPoint) -> str:
    device_time = _device_s(mine) / _device_s(best)
    usd, least = _usd(mine), _usd(best)
    if usd is None or least is None:
        return f"price unknown; {device_time:.2f} x the device time per token of {best.device}"
    return (
        f"{usd / least:.2f} x the dollars per token of {best.device}: {usd / least / device_time:.2f} x its price per "
        f"device hour, {device_time:.2f} x its device time per token"
    )


def _usd(point: PlanPoint | None) -> float | None:
    return None if point is None else point.estimated.usd_per_million_total_tokens


def _device_s(point: PlanPoint) -> float:
    """Device seconds per output token; prompts of one load come with it in one measure."""
    return point.num_devices / point.estimated.output_throughput
