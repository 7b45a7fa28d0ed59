"""Load a prefix or compute it again: what each is estimated to take, and where to cut.

Loading takes about the same time for every unit of a tier, while computing a token takes longer the later it stands:
attention grows with context. So within one tier's stretch of a prefix the best cut is at one of its ends, and only the
places where the tier changes need a look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsim.cost.step import StepModel
from kvsim.cost.tables import StepTables
from kvsim.sim.tiers.moves import Level, Mover
from kvsim.units import TICKS_PER_SECOND

Segment = tuple[Level, list[int]]
"""Consecutive units of a prefix that one tier holds."""


@dataclass(frozen=True)
class PrefillEstimate:
    """Ticks that prompt tokens add to steps of a given number of decoding sequences, priced as the engine's steps."""

    step: StepModel
    tables: StepTables
    budget_tokens: int

    def ticks(self, tokens: int, context_tokens: int, sequences: int) -> int:
        """Process ``tokens`` after ``context_tokens`` that are cached, in chunks of what the budget leaves."""
        base, append = self.tables.base, self.tables.append
        sequences = self.step.deployment.parallelism.sequences_per_lane(sequences)
        chunk = max(1, self.budget_tokens - sequences)
        whole, rest = divmod(tokens, chunk)
        total = whole * (base[sequences + chunk] - base[sequences] + append[chunk])
        total += base[sequences + rest] - base[sequences] + append[rest]
        attention_s, unpack_s = self.step.prefill_attention_seconds(tokens, context_tokens)
        return total + round(float(attention_s + unpack_s) * TICKS_PER_SECOND)


@dataclass(frozen=True)
class Reload:
    """What is to be loaded for one prompt, and how that was chosen."""

    segments: tuple[Segment, ...] = ()
    looked_units: int = 0
    """Units of the prompt that could have been found."""
    device_units: int = 0
    """Of those, units on the device."""
    known: tuple[int, ...] = ()
    """Units to be computed although they were computed before: hits of the recompute tier."""
    context_tokens: int = 0
    """Tokens before the first of ``known``."""
    chosen: str = ""
    """``load``, ``cut`` or ``compute`` where the costs were compared."""
    against_load_ticks: float = 0.0
    """Saved against loading all that was found, by the estimate."""
    against_compute_ticks: float = 0.0
    """Saved against computing all of it."""

    @property
    def values(self) -> list[int]:
        """Units to load, in order."""
        return [value for _, values in self.segments for value in values]


def load_ticks(mover: Mover, segments: Sequence[Segment]) -> float:
    """Estimate a load from several tiers at once: the slowest of them, or the host link that all cross."""
    units: dict[int, list[Segment]] = {}
    for level, values in segments:
        units.setdefault(id(level), []).append((level, values))
    whole = crossing = 0.0
    for parts in units.values():
        one, link = mover.estimate(sum(len(values) for _, values in parts), parts[0][0])
        whole, crossing = max(whole, one), crossing + link
    return max(whole, crossing)


@dataclass(frozen=True)
class Choice:
    """The best cut of a prefix by the estimates."""

    segments: tuple[Segment, ...]
    against_load_ticks: float
    against_compute_ticks: float

    @property
    def name(self) -> str:
        """What was chosen."""
        if not self.segments:
            return "compute"
        return "cut" if self.against_load_ticks > 0 else "load"


def best_cut(
    mover: Mover,
    prefill: PrefillEstimate,
    segments: Sequence[Segment],
    unit_tokens: int,
    context_tokens: int,
    target_tokens: int,
    sequences: int,
    delayed: int = 1,
) -> Choice:
    """Load the first segments and compute the rest, so that the estimated sum is least; more loading where equal.

    A prefill counts once for each of the ``delayed`` requests that wait for it, a load for its own prompt alone.
    """
    costs: list[float] = []
    for kept in range(len(segments) + 1):
        loaded = sum(len(values) for _, values in segments[:kept])
        done = context_tokens + loaded * unit_tokens
        computed = prefill.ticks(target_tokens - done, done, sequences)
        costs.append(load_ticks(mover, segments[:kept]) + delayed * computed)
    best = min(range(len(costs)), key=lambda kept: (costs[kept], -kept))
    return Choice(tuple(segments[:best]), costs[-1] - costs[best], costs[0] - costs[best])
