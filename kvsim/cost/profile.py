"""One sequence's price and size over its life, in integer ticks and bytes.

Token counts are piecewise linear in generated tokens, and a token's price is constant, so a sequence's share of a
decode step is piecewise linear too. In integer picoseconds its sums are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvsim.compression.base import TokenCurve

FEMTO = 1000
"""Per-token prices are kept in femtoseconds while they are multiplied by tokens, then rounded to ticks."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Ticks that a sequence adds to decode step ``start_step`` + i: ``ticks`` + i·``slope_ticks``.

    ``unpack_*`` is the part that only exists because of the compression.
    """

    start_step: int
    ticks: int
    slope_ticks: int
    unpack_ticks: int
    unpack_slope_ticks: int


@dataclass(frozen=True, slots=True)
class Growth:
    """Resident tokens of some layers over decode steps, and the bytes of one block of them on one rank."""

    curve: TokenCurve
    block_bytes: int


@dataclass(frozen=True)
class SequenceProfile:
    """One sequence from its first decode step on."""

    segments: tuple[Segment, ...]
    growths: tuple[Growth, ...]
    fixed_bytes: int
    """Bytes per sequence whatever its length: residual window, recurrent state."""
    compress_ticks: int
    """Work at the end of prefill: score, select, compact."""

    @cached_property
    def bends(self) -> tuple[int, ...]:
        """Decode steps at which the sequence's price or its growth changes."""
        points = {segment.start_step for segment in self.segments[1:]}
        for growth in self.growths:
            points.update(growth.curve.breakpoints)
        return tuple(sorted(points))

    def resident_bytes(self, steps: int, block_size: int) -> int:
        """Bytes held on one rank after ``steps`` decode steps."""
        blocks = sum(-(-growth.curve(steps) // block_size) * growth.block_bytes for growth in self.growths)
        return blocks + self.fixed_bytes

    def unpack_total_ticks(self, steps: int) -> int:
        """Ticks of the first ``steps`` decode steps that are due to the compression."""
        total = 0
        for index, segment in enumerate(self.segments):
            following = self.segments[index + 1].start_step if index + 1 < len(self.segments) else steps
            count = min(steps, following) - segment.start_step
            if count > 0:
                total += count * segment.unpack_ticks + segment.unpack_slope_ticks * (count * (count - 1) // 2)
        return total


def clip(curve: TokenCurve, cap_tokens: int) -> TokenCurve:
    """min(curve, cap) for a curve that never falls."""
    pieces: list[tuple[int, int, int]] = []
    for start, value, slope in curve.segments:
        if value >= cap_tokens:
            pieces.append((start, cap_tokens, 0))
            break
        pieces.append((start, value, slope))
        if slope > 0:
            reach = start + -(-(cap_tokens - value) // slope)
            following = next((s[0] for s in curve.segments if s[0] > start), None)
            if following is None or reach < following:
                pieces.append((reach, cap_tokens, 0))
                break
    return TokenCurve(tuple(pieces))


def split_at_start(curve: TokenCurve) -> tuple[TokenCurve, TokenCurve]:
    """(tokens that were there from the start, those that came since), of a curve that never falls."""
    first = curve(0)
    since = tuple((start, value - first, slope) for start, value, slope in curve.segments)
    return clip(curve, first), TokenCurve(since)


def merge_priced(priced: dict[TokenCurve, list[int]]) -> tuple[Segment, ...]:
    """Sum the priced curves. Decode step j attends to the tokens after j + 1 were generated."""
    starts = {0}
    for curve in priced:
        starts.update(max(0, point - 1) for point in curve.breakpoints)
    segments = []
    for start in sorted(starts):
        value = slope = unpack = unpack_slope = 0
        for curve, (whole_price, unpack_price) in priced.items():
            tokens = curve(start + 1)
            rise = curve(start + 2) - tokens
            value += tokens * whole_price
            slope += rise * whole_price
            unpack += tokens * unpack_price
            unpack_slope += rise * unpack_price
        segments.append(
            Segment(start, whole_ticks(value), whole_ticks(slope), whole_ticks(unpack), whole_ticks(unpack_slope))
        )
    return tuple(segments)


def whole_ticks(femtoseconds: int) -> int:
    """Round femtoseconds to ticks."""
    return round(femtoseconds / FEMTO)
