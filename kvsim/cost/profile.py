"""One sequence's price and size over its life, in integer ticks and bytes.

Token counts are piecewise linear in generated tokens, and a token's price is constant, so a sequence's share of a
decode step is piecewise linear too. In integer picoseconds its sums are exact. Where a cache is cut back every so many
tokens, one period is kept and comes again: nothing is unrolled, however long a generation is.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvsim.compression.base import TokenCurve

FEMTO = 1000
"""Per-token prices are kept in femtoseconds while they are multiplied by tokens, then rounded to ticks."""

IntArray = npt.NDArray[np.int64]


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
class Repeat:
    """From ``start_step`` on, where a segment starts, ``period`` steps come again, each time so many ticks dearer."""

    start_step: int
    period: int
    rise_ticks: int
    unpack_rise_ticks: int


@dataclass(frozen=True, slots=True)
class Growth:
    """Resident tokens of some layers over decode steps, and the bytes of one block of them on one rank.

    Where the cache is cut back, ``curve`` says what is left right after the step that ends with the cut.
    """

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
    repeat: Repeat | None = None

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(segment.start_step for segment in self.segments)

    def segment_at(self, step: int) -> Segment:
        """Give the segment that decode step ``step`` lies in."""
        rounds = self._rounds(step)
        shift = rounds * self.repeat.period if self.repeat else 0
        found = self.segments[bisect_right(self._starts, step - shift) - 1]
        if not rounds or self.repeat is None:
            return found
        return Segment(
            found.start_step + shift,
            found.ticks + rounds * self.repeat.rise_ticks,
            found.slope_ticks,
            found.unpack_ticks + rounds * self.repeat.unpack_rise_ticks,
            found.unpack_slope_ticks,
        )

    def next_bend(self, after: int) -> int | None:
        """Next decode step after ``after`` at which the sequence's price or its growth changes, or None."""
        bends = [growth.curve.next_breakpoint(after) for growth in self.growths]
        shift = self._rounds(after) * self.repeat.period if self.repeat else 0
        place = bisect_right(self._starts, after - shift)
        if place < len(self._starts):
            bends.append(self._starts[place] + shift)
        elif self.repeat is not None:
            bends.append(self.repeat.start_step + self.repeat.period + shift)
        return min((bend for bend in bends if bend is not None), default=None)

    def _rounds(self, step: int) -> int:
        """Whole periods before ``step``."""
        if self.repeat is None or step < self.repeat.start_step:
            return 0
        return (step - self.repeat.start_step) // self.repeat.period

    def ticks_at(self, steps: IntArray) -> tuple[IntArray, IntArray]:
        """(ticks, part due to the compression) of many decode steps."""
        table = np.array([(s.ticks, s.slope_ticks, s.unpack_ticks, s.unpack_slope_ticks) for s in self.segments])
        starts = np.array(self._starts, dtype=np.int64)
        rounds, local = np.zeros_like(steps), steps
        if self.repeat is not None:
            since = steps - self.repeat.start_step
            rounds = np.maximum(since, 0) // self.repeat.period
            local = steps - rounds * self.repeat.period
        at = np.searchsorted(starts, local, side="right") - 1
        since = local - starts[at]
        rises = (self.repeat.rise_ticks, self.repeat.unpack_rise_ticks) if self.repeat else (0, 0)
        whole = table[at, 0] + table[at, 1] * since + rounds * rises[0]
        return whole, table[at, 2] + table[at, 3] * since + rounds * rises[1]

    def resident_bytes(self, steps: int, block_size: int) -> int:
        """Bytes held on one rank after ``steps`` decode steps."""
        blocks = sum(-(-growth.curve(steps) // block_size) * growth.block_bytes for growth in self.growths)
        return blocks + self.fixed_bytes

    def peak_bytes(self, steps: int, block_size: int) -> int:
        """Most bytes held on one rank during the first ``steps`` decode steps, right before a cut where there is one.

        Peaks of layers that are cut at different steps are added up, which is then more than is held at any one time.
        """
        blocks = sum(-(-_peak(growth.curve, steps) // block_size) * growth.block_bytes for growth in self.growths)
        return blocks + self.fixed_bytes

    def total_ticks(self, steps: int) -> tuple[int, int]:
        """Ticks of the first ``steps`` decode steps: (whole, part due to the compression)."""
        repeat = self.repeat
        if repeat is None or steps <= repeat.start_step:
            return self._between(0, steps)
        rounds, rest = divmod(steps - repeat.start_step, repeat.period)
        whole, unpack = self._between(0, repeat.start_step + rest)
        of_period = self._between(repeat.start_step, repeat.start_step + repeat.period)
        risen = repeat.period * (rounds * (rounds - 1) // 2) + rounds * rest
        return (
            whole + rounds * of_period[0] + risen * repeat.rise_ticks,
            unpack + rounds * of_period[1] + risen * repeat.unpack_rise_ticks,
        )

    def unpack_total_ticks(self, steps: int) -> int:
        """Ticks of the first ``steps`` decode steps that are due to the compression."""
        return self.total_ticks(steps)[1]

    def typical_ticks(self, step: int) -> tuple[int, int]:
        """Ticks of a decode step: (whole, part due to the compression); where steps repeat, the mean of its period.

        A step before that which ends with a cut is taken as its neighbours with the cut's share of a period: one step
        in so many has a cut, and a load whose middle falls on that step has no more of them.
        """
        repeat, rounds = self.repeat, self._rounds(step)
        if repeat is None:
            return self._exact_ticks(step)
        if step < repeat.start_step:
            return self._without_pulse(step, repeat.period)
        whole, unpack = self._between(repeat.start_step, repeat.start_step + repeat.period)
        return (
            round(whole / repeat.period) + rounds * repeat.rise_ticks,
            round(unpack / repeat.period) + rounds * repeat.unpack_rise_ticks,
        )

    def _exact_ticks(self, step: int, after: int | None = None) -> tuple[int, int]:
        """Ticks of a step, or what they would be if the segment of step ``after`` went on until it."""
        segment = self.segment_at(step if after is None else after)
        since = step - segment.start_step
        return segment.ticks + since * segment.slope_ticks, segment.unpack_ticks + since * segment.unpack_slope_ticks

    def _without_pulse(self, step: int, period: int) -> tuple[int, int]:
        """Ticks of a step before steps repeat; where a segment of this step alone is dearer, that is spread."""
        own = self._exact_ticks(step)
        is_alone = self.segment_at(step).start_step == step and (step + 1 in self._starts)
        usual = self._exact_ticks(step, step - 1) if is_alone and step > 0 else own
        if usual[0] >= own[0]:
            return own
        return usual[0] + round((own[0] - usual[0]) / period), usual[1] + round((own[1] - usual[1]) / period)

    def _between(self, first: int, last: int) -> tuple[int, int]:
        """Ticks of the steps ``first`` to ``last`` - 1 as the segments have them, before anything repeats."""
        whole = unpack = 0
        for segment, end in zip(self.segments, (*self._starts[1:], last), strict=True):
            begin = max(first, segment.start_step)
            count = min(last, end) - begin
            if count > 0:
                since = begin - segment.start_step
                steps = count * since + count * (count - 1) // 2
                whole += count * segment.ticks + segment.slope_ticks * steps
                unpack += count * segment.unpack_ticks + segment.unpack_slope_ticks * steps
        return whole, unpack


def clip(curve: TokenCurve, cap_tokens: int) -> TokenCurve:
    """min(curve, cap)."""
    pieces: list[tuple[int, int, int]] = []
    for (start, value, slope), end in zip(curve.segments, _ends(curve), strict=True):
        if value >= cap_tokens:
            if not pieces or pieces[-1][1:] != (cap_tokens, 0) or start == curve.repeats_from:
                pieces.append((start, cap_tokens, 0))
            continue
        pieces.append((start, value, slope))
        reach = start + -(-(cap_tokens - value) // slope) if slope > 0 else None
        if reach is not None and (end is None or reach < end):
            pieces.append((reach, cap_tokens, 0))
    clipped = replace(curve, segments=tuple(pieces))
    if curve.period and all(piece[1:] == (cap_tokens, 0) for piece in pieces if piece[0] >= curve.repeats_from):
        return TokenCurve(tuple(piece for piece in pieces if piece[0] <= curve.repeats_from))
    return clipped


def split_at_start(curve: TokenCurve) -> tuple[TokenCurve, TokenCurve]:
    """(tokens that were there from the start, those that came since), of a curve that never falls."""
    first = curve(0)
    since = tuple((start, value - first, slope) for start, value, slope in curve.segments)
    return clip(curve, first), TokenCurve(since)


def _ends(curve: TokenCurve) -> tuple[int | None, ...]:
    """Where each segment of a curve ends; None for the last one of a curve that does not repeat."""
    last = curve.repeats_from + curve.period if curve.period else None
    return (*(start for start, _, _ in curve.segments[1:]), last)


def after_cuts(curve: TokenCurve) -> TokenCurve:
    """Let a curve that falls do so one token earlier: right after a step that ends with a cut, not in the next one."""
    segments, repeats_from = [], curve.repeats_from
    for start, value, slope in curve.segments:
        before, held, rose = curve.segment_at(start - 1)
        falls = start > 0 and value < held + rose * (start - before)
        segments.append((start - 1, value - slope, slope) if falls else (start, value, slope))
        if falls and start == curve.repeats_from:
            repeats_from = start - 1
    return TokenCurve(tuple(segments), repeats_from, curve.period)


def _peak(curve: TokenCurve, steps: int) -> int:
    """Most tokens during the first ``steps`` steps, of a curve as `after_cuts` gives it."""
    peak = curve(steps)
    end = min(steps, curve.repeats_from + curve.period) if curve.period else steps
    point = curve.next_breakpoint(0)
    while point is not None and point <= end:
        start, value, slope = curve.segment_at(point - 1)
        peak = max(peak, value + slope * (point - start))
        point = curve.next_breakpoint(point)
    return max(peak, curve(0))


def merge_priced(priced: Mapping[TokenCurve, Sequence[int]]) -> tuple[tuple[Segment, ...], Repeat | None]:
    """Sum the priced curves. Decode step j attends to the tokens after j + 1 were generated.

    Curves that repeat have the least common multiple of their periods in common, from where the last of all breaks.
    """
    period = math.lcm(*(curve.period for curve in priced if curve.period))
    repeating = any(curve.period for curve in priced)
    lasts = (curve.repeats_from if curve.period else curve.segments[-1][0] for curve in priced)
    begin = max(max(lasts, default=0) - 1, 0)
    starts = {0} | ({begin} if repeating else set())
    for curve in priced:
        starts.update(max(0, point - 1) for point in _breakpoints(curve, begin + period if repeating else None))
    segments = tuple(_segment(priced, start) for start in sorted(starts))
    if not repeating:
        return segments, None
    rise, unpack_rise = (
        sum((curve(begin + 1 + period) - curve(begin + 1)) * prices[part] for curve, prices in priced.items())
        for part in (0, 1)
    )
    return segments, Repeat(begin, period, whole_ticks(rise), whole_ticks(unpack_rise))


def _breakpoints(curve: TokenCurve, end: int | None) -> Iterator[int]:
    """Generated-token counts at which another segment starts, up to ``end`` (None: all there are)."""
    point = curve.next_breakpoint(0)
    while point is not None and (end is None or point <= end):
        yield point
        point = curve.next_breakpoint(point)


def _segment(priced: Mapping[TokenCurve, Sequence[int]], start: int) -> Segment:
    value = slope = unpack = unpack_slope = 0
    for curve, (whole_price, unpack_price) in priced.items():
        _, _, rise = curve.segment_at(start + 1)
        tokens = curve(start + 1)
        value += tokens * whole_price
        slope += rise * whole_price
        unpack += tokens * unpack_price
        unpack_slope += rise * unpack_price
    return Segment(start, whole_ticks(value), whole_ticks(slope), whole_ticks(unpack), whole_ticks(unpack_slope))


def whole_ticks(femtoseconds: int) -> int:
    """Round femtoseconds to ticks."""
    return round(femtoseconds / FEMTO)
