"""One device's candidates: every strategy once, then settings of the most promising, in an order that no limit moves.

Limits decide which candidates are feasible and never which are screened, so a tighter limit leaves a subset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, product, zip_longest
from typing import Final

from kvsim.catalog import look_up
from kvsim.compression import Compression
from kvsim.errors import KvsimError, WeightsDoNotFit
from kvsim.planner.front import Standing, pareto, spread_out
from kvsim.planner.quality import risk
from kvsim.planner.request import PlanRequest
from kvsim.planner.screen import Candidate, Screened, Screener
from kvsim.planner.settings import Layout, SettingSpace, check_settings, setting_space
from kvsim.planner.strategies import StrategySpace
from kvsim.quality.published import published_quality
from kvsim.scenario import Scenario
from kvsim.specs.device import DeviceSpec
from kvsim.specs.engine import EngineSpec
from kvsim.specs.model import ModelSpec

DIGITS: Final = 3
"""Significant digits to which points are compared; the closed form itself is not better than that."""
Tick = Callable[[int], None]
"""Called with the number of candidates that are done; may raise to stop."""


@dataclass
class DeviceSearch:
    """Candidates of one device and what the screen said of them."""

    name: str
    device: DeviceSpec
    model: ModelSpec
    settings: SettingSpace
    notes: list[str] = field(default_factory=list)
    screened: list[Screened] = field(default_factory=list)
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(type of error, strategy-free example) of candidates that cannot run."""
    left_out: int = 0
    """Candidates beyond ``search.max_candidates``."""

    @property
    def answered(self) -> int:
        """Candidates that the screen had a look at."""
        return len(self.screened) + sum(self.errors.values())


def rounded(value: float) -> float:
    """A figure as dominance sees it: smaller differences than its third digit are no reason to choose."""
    return float(f"{value:.{DIGITS}g}")


def standing(one: Screened) -> Standing:
    """A screened candidate on the axes of the closed form: throughput, mean TTFT, dollars, joules, risk."""
    known = risk(one.candidate.strategy)
    is_priced, has_energy = one.usd_per_million is not None, one.joules_per_token is not None
    device = one.candidate.device
    return Standing(
        costs=(
            -rounded(one.output_throughput),
            rounded(one.ttft_s),
            rounded(one.usd_per_million if one.usd_per_million is not None else one.device_s_per_token),
            rounded(one.joules_per_token if one.joules_per_token is not None else one.device_s_per_token),
        ),
        risk=None if known is None else rounded(known.kl_nats),
        strategy=one.candidate.strategy,
        world=(None if is_priced else device, None if has_energy else device),
    )


def search_device(
    request: PlanRequest, name: str, scenario: Scenario, screener: Screener, space: StrategySpace, tick: Tick
) -> DeviceSearch:
    """Screen a device's candidates.

    Raises
    ------
    KvsimError
        The device or the model has no such name, or no setting of the request goes with it.
    """
    resolved, model = look_up(scenario)
    settings = setting_space(request, scenario, model, resolved.spec)
    check_settings(request, resolved.spec, settings)
    search = DeviceSearch(name, resolved.spec, model, settings)
    search.notes += [resolved.notice] if resolved.notice else []
    most = max(request.search.max_candidates, len(space.strategies))
    layout = _smallest_that_fits(name, settings, screener)
    first = [
        _screen(search, screener, name, strategy, layout, settings.engines[0], tick) for strategy in space.strategies
    ]
    alive = [one for one in first if one is not None]
    rest = [pair for pair in product(settings.layouts, settings.engines) if pair != (layout, settings.engines[0])]
    search.left_out = len(alive) * len(rest)
    for strategy in promising(alive):
        for place, engine in rest[: max(0, most - search.answered)]:
            _screen(search, screener, name, strategy, place, engine, tick)
            search.left_out -= 1
        if search.answered >= most:
            break
    return search


def _smallest_that_fits(name: str, settings: SettingSpace, screener: Screener) -> Layout:
    """The first layout that holds the uncompressed model's weights; the first of all where none does."""
    for layout in settings.layouts:
        try:
            screener.screen(Candidate(name, Compression(), layout, settings.engines[0]))
        except WeightsDoNotFit:
            continue
        except KvsimError:
            return layout
        return layout
    return settings.layouts[0]


def _screen(
    search: DeviceSearch,
    screener: Screener,
    name: str,
    strategy: Compression,
    layout: Layout,
    engine: EngineSpec,
    tick: Tick,
) -> Screened | None:
    tick(1)
    try:
        one = screener.screen(Candidate(name, strategy, layout, engine))
    except KvsimError as error:
        search.errors[(type(error).__name__, str(error))] += 1
        return None
    search.screened.append(one)
    return one


def promising(first: Sequence[Screened]) -> Iterator[Compression]:
    """Strategies by how far they are from the Pareto set at equal settings, in turn with those of published quality.

    The two at the head of ``first``, the baselines, come first.
    """
    published = [one for one in first if published_quality(one.candidate.strategy).notes]
    seen: set[Compression | None] = {None}
    baselines = (one.candidate.strategy for one in first[:2])
    for strategy in chain(baselines, chain.from_iterable(zip_longest(_by_layers(first), _by_layers(published)))):
        if strategy not in seen:
            seen.add(strategy)
            yield strategy


def _by_layers(first: Sequence[Screened]) -> Iterator[Compression]:
    """The Pareto set spread out, then that of the rest, and so on."""
    left = list(first)
    while left:
        points = [standing(one) for one in left]
        layer = pareto(points)
        for index in spread_out([points[index] for index in layer], len(layer)):
            yield left[layer[index]].candidate.strategy
        gone = set(layer)
        left = [one for index, one in enumerate(left) if index not in gone]
