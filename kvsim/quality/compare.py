"""Rank methods at equal bytes.

A *method* is the kinds of a strategy's parts (``kivi``, ``snapkv+fp8``); its *configurations* differ in parameters.
At a budget of b bits per element each method is represented by its best configuration that takes at most b, metadata,
residual windows and exempt layers counted as stored. Nothing is interpolated between configurations and nothing is
extrapolated: a method without a configuration that small is not in the ranking, and one whose configurations are all
much smaller stands there with what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvsim.compression import Compression, parse_compression

NATIVE: Final = "native"
SLACK_BITS: Final = 0.005
"""Rounding of the tables."""


@dataclass(frozen=True)
class Point:
    """One configuration as measured.

    Attributes
    ----------
    strategy : str
    bits_per_element : float
    risk : float
        What configurations and methods are ranked by; less is better.
    risk_interval : (low, high) or None
        95 %.
    columns : tuple of (name, text)
        Further figures, to be shown.
    """

    strategy: str
    bits_per_element: float
    risk: float
    risk_interval: tuple[float, float] | None = None
    columns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Ranked:
    """A method's best configuration at a budget.

    ``ties_with_best``: its interval reaches down to the first one's.
    """

    rank: int
    method: str
    family: str
    point: Point
    ties_with_best: bool


def method_of(compression: Compression) -> str:
    """Kinds of the parts that do something, such as ``snapkv+kivi``."""
    return "+".join(part.kind for part in compression.active_parts) or NATIVE


def rank_at(points: Iterable[Point], budget_bits: float) -> tuple[Ranked, ...]:
    """Give the best configuration of each method at or under a budget, best method first."""
    best: dict[str, Point] = {}
    for point in points:
        method = method_of(parse_compression(point.strategy))
        if method == NATIVE or point.bits_per_element > budget_bits + SLACK_BITS:
            continue
        if method not in best or _key(point) < _key(best[method]):
            best[method] = point
    ordered = sorted(best.items(), key=lambda item: (_key(item[1]), item[0]))
    return tuple(
        Ranked(index, method, parse_compression(point.strategy).family, point, _overlaps(point, ordered[0][1]))
        for index, (method, point) in enumerate(ordered, start=1)
    )


def rank_agreement(first: Sequence[Ranked], second: Sequence[Ranked]) -> float | None:
    """Spearman correlation of the order of methods that both rankings hold; None for fewer than three."""
    here = {ranked.method: ranked.rank for ranked in first}
    there = {ranked.method: ranked.rank for ranked in second}
    shared = sorted(here.keys() & there.keys())
    count = len(shared)
    if count < 3:
        return None
    left = _ranks([here[method] for method in shared])
    right = _ranks([there[method] for method in shared])
    squared = sum((one - other) ** 2 for one, other in zip(left, right, strict=True))
    return 1.0 - 6.0 * squared / (count * (count * count - 1))


def _key(point: Point) -> tuple[float, float, str]:
    return (point.risk, point.bits_per_element, point.strategy)


def _overlaps(point: Point, best: Point) -> bool:
    if point.risk_interval is None or best.risk_interval is None:
        return point.risk == best.risk
    return point.risk_interval[0] <= best.risk_interval[1]


def _ranks(values: Sequence[int]) -> list[int]:
    """Ranks 1 to n of distinct values."""
    order = sorted(values)
    return [order.index(value) + 1 for value in values]
