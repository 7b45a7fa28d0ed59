"""Reading between two published scores of one curve: same source, model, task and setting, one size between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import log2
from typing import Any, Final

from kvsim.compression import Compression
from kvsim.compression.base import StrategyPart
from kvsim.report import QualityNote

TOKEN_SUFFIXES: Final = ("_tokens", "_length", "_budget")
"""Fields that count tokens; sources sweep them by factors, so they are read between on a logarithmic scale."""
DECIMALS: Final = 6
Rows = Iterable[tuple[Compression, QualityNote]]
Point = tuple[float, str, QualityNote]


def between(wanted: Compression, rows: Rows, exact: Iterable[QualityNote]) -> Iterator[QualityNote]:
    """Scores of ``wanted`` between its nearest neighbours on every published curve that has none of its own there."""
    own = {_curve(note) for note in exact}
    curves: dict[tuple[Any, ...], list[Point]] = {}
    for compression, note in rows:
        size = _size(wanted, compression)
        if size is not None and note.bound is None and _curve(note) not in own:
            field, place = size
            curves.setdefault((_curve(note), field), []).append((place, compression.name, note))
    for (_, field), points in curves.items():
        target = _place(field, _sizes(wanted)[field])
        below = max((point for point in points if point[0] < target), key=lambda point: point[0], default=None)
        above = min((point for point in points if point[0] > target), key=lambda point: point[0], default=None)
        if below is not None and above is not None:
            yield _read(below, above, target)


def _read(below: Point, above: Point, target: float) -> QualityNote:
    share = (target - below[0]) / (above[0] - below[0])
    value = below[2].value + share * (above[2].value - below[2].value)
    return below[2].model_copy(update={"value": round(value, DECIMALS), "interpolated_between": (below[1], above[1])})


def _curve(note: QualityNote) -> tuple[Any, ...]:
    """All that two scores must share to lie on one curve."""
    return tuple(note.model_dump(exclude={"value", "interpolated_between"}).values())


def _size(wanted: Compression, other: Compression) -> tuple[tuple[str, str], float] | None:
    """The one size in which both differ, and where ``other`` lies on it; None where they differ in anything else."""
    mine, theirs = wanted.model_dump(), other.model_dump()
    different = [
        (slot, field)
        for slot in mine
        for field in {**mine[slot], **theirs[slot]}
        if mine[slot].get(field) != theirs[slot].get(field)
    ]
    if len(different) != 1 or different[0] not in _sizes(wanted):
        return None
    found = _sizes(other).get(different[0])
    return None if found is None else (different[0], _place(different[0], found))


def _sizes(compression: Compression) -> Mapping[tuple[str, str], float]:
    """Numbers that ``name:value`` sets, by part and field."""
    found: dict[tuple[str, str], float] = {}
    for slot in type(compression).model_fields:
        part: StrategyPart = getattr(compression, slot)
        for field in part.inline_fields:
            value = getattr(part, field)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[(slot, field)] = float(value)
    return found


def _place(field: tuple[str, str], value: float) -> float:
    return log2(value) if field[1].endswith(TOKEN_SUFFIXES) and value > 0 else value
