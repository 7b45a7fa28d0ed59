"""What to time in which order: every variant gets its most telling shapes before any gets its last."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from ..contract import Variant

PILOTS = 2
"""Shapes of a variant on which all its configurations are timed; the others are timed with the best of them."""
BLOCK_ITEMS = 8
_FIRST = -1.0
# A variant of weight 4 has four shapes timed by the time that one of weight 1 has one. Order within a rank.
_WEIGHTS: tuple[tuple[str, float], ...] = (
    ("microbenchmark", 0.0),
    ("decode_attention", 4.0),
    ("baseline/sdpa_decode", 4.0),
    ("append", 1.0),
    ("rotation", 1.0),
    ("low_rank", 1.0),
    ("transform", 1.0),
    ("entropy", 1.0),
    ("", 1.0),
    ("baseline/gemm", 2.0),
    ("baseline", 1.0),
)


@dataclass(frozen=True)
class Item:
    """One timing to take.

    Attributes
    ----------
    variant, case : str
        Names.
    config_index : int or None
        Which of the case's configurations; None: the best that the pilots found.
    num_bytes : int
        Read and written at least, by which memory and time are guessed.
    rank : float
        Lower goes first.
    """

    variant: str
    case: str
    config_index: int | None
    num_bytes: int
    rank: float

    @property
    def key(self) -> str:
        """Unique within a plan."""
        return f"{self.variant}|{self.case}|{'best' if self.config_index is None else self.config_index}"


def spread_order(count_: int) -> list[int]:
    """Order indices so that every beginning covers the range: last, middle, first, quarters, eighths and so on."""
    if not count_:
        return []
    order: dict[int, None] = {}
    for index in _fractions(count_):
        order.setdefault(index)
        if len(order) == count_:
            return list(order)
    raise AssertionError


def _fractions(count_: int) -> Iterator[int]:
    last = count_ - 1
    yield from (last, last // 2, 0)
    for level in count(2):
        denominator = 1 << level
        yield from (round(last * odd / denominator) for odd in range(denominator - 1, 0, -2))


def case_order(cases: Sequence[Any]) -> list[int]:
    """Order a variant's cases; where they have roles, every beginning holds each role by its share.

    Cases with roles are already spread within each role, as `decode_attention.batch` makes them.
    """
    roles = [getattr(case, "role", None) for case in cases]
    if None in roles:
        return spread_order(len(cases))
    totals = {role: roles.count(role) for role in roles}
    seen = dict.fromkeys(totals, 0)
    ranks = []
    for index, role in enumerate(roles):
        ranks.append(((seen[role] + 0.5) / totals[role], index))
        seen[role] += 1
    return [index for _, index in sorted(ranks)]


def _weight(operation: str) -> tuple[int, float]:
    """Give the place and the weight of an operation by the longest prefix that it starts with."""
    place = max(
        (place for place, (prefix, _) in enumerate(_WEIGHTS) if operation.startswith(prefix)),
        key=lambda place: len(_WEIGHTS[place][0]),
    )
    return place, _WEIGHTS[place][1]


def make_plan(
    variants: Iterable[Variant],
    target: str,
    cases_of: Callable[[Variant], Sequence[Any]],
    on_failure: Callable[[str, Exception], None],
) -> list[Item]:
    """Plan all timings of variants on a target, the most telling first.

    A variant that cannot be asked for its cases or configurations is handed to `on_failure` and left out.
    """
    ordered: list[tuple[tuple[Any, ...], Item]] = []
    for index, variant in enumerate(variants):
        try:
            ordered.extend(_items_of(variant, index, target, cases_of(variant)))
        except Exception as error:
            on_failure(variant.name, error)
    return [item for _, item in sorted(ordered, key=lambda pair: pair[0])]


def _items_of(variant: Variant, index: int, target: str, cases: Sequence[Any]) -> list[tuple[tuple[Any, ...], Item]]:
    place, weight = _weight(variant.operation)
    found = []
    for position, case_index in enumerate(case_order(cases)):
        case = cases[case_index]
        rank = position / weight if weight else _FIRST
        traffic = variant.traffic(case)
        configs: Iterable[int | None] = (None,)
        if position < PILOTS:
            configs = range(len(variant.configs(target, case)))
        for config_index in configs:
            item = Item(variant.name, case.name, config_index, traffic.read_bytes + traffic.written_bytes, rank)
            # Rows of one shape stand beside each other, whatever the format: they are compared with each other.
            found.append(((rank, place, position, index), item))
    return found


def blocks(items: Sequence[Item], limit_bytes: int, alone: Collection[str] = ()) -> Iterator[list[Item]]:
    """Cut a plan into runs of items whose rounds are interleaved: few, and in memory together.

    Items whose key is in `alone` get a block of their own.
    """
    block: list[Item] = []
    for item in items:
        held = {(other.variant, other.case): other.num_bytes for other in (*block, item)}
        full = len(block) == BLOCK_ITEMS or sum(held.values()) > limit_bytes
        lone = item.key in alone or (block and block[-1].key in alone)
        if block and (full or lone or _waits_for(item, block)):
            yield block
            block = []
        block.append(item)
    if block:
        yield block


def _waits_for(item: Item, block: Sequence[Item]) -> bool:
    """Whether the block holds a pilot of an item that takes the best configuration."""
    return item.config_index is None and any(
        other.variant == item.variant and other.config_index is not None for other in block
    )


def best_config(texts: Sequence[str], timings: Mapping[str, Sequence[tuple[str, float]]]) -> int:
    """Give the index of the configuration with the lowest time relative to each pilot's best, the first on a tie.

    Parameters
    ----------
    texts : sequence of str
        The configurations to choose from.
    timings : mapping of str to sequence of (str, float)
        For each pilot's case: configurations and their seconds.
    """
    ratios: dict[str, list[float]] = {}
    for pairs in timings.values():
        fastest = min((seconds for _, seconds in pairs), default=1.0)
        for text, seconds in pairs:
            ratios.setdefault(text, []).append(seconds / fastest)
    known = {text: sum(values) / len(values) for text, values in ratios.items()}
    candidates = [index for index, text in enumerate(texts) if text in known]
    return min(candidates, key=lambda index: (known[texts[index]], index), default=0)


class Pace:
    """How long an item takes: what items took so far, and a guess before the first."""

    def __init__(self, first_guess_s: float) -> None:
        self._mean_s = first_guess_s

    def learn(self, seconds: float, num_items: int) -> None:
        """Take in the time of a block; late blocks count more than early ones."""
        self._mean_s += 0.3 * (seconds / num_items - self._mean_s)

    def fits(self, num_items: int, left_s: float) -> bool:
        """Whether a block should be done within the time that is left, with half as much again for safety."""
        return 1.5 * self._mean_s * num_items <= left_s
