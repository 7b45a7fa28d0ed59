"""From which context, or which batch, one strategy beats another: bisection on the closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, Literal

from kvsim.analysis import LoadShape
from kvsim.closed_form import decode_split, total_seconds
from kvsim.compression import Compression
from kvsim.cost.priors import Edge
from kvsim.errors import KvsimError
from kvsim.estimate import estimate_outcome, price_load
from kvsim.memory import plan_memory
from kvsim.planner.screen import Candidate, Screener
from kvsim.specs.base import Spec
from kvsim.specs.model import ModelSpec

SHORTEST_TOKENS: Final = 64
GRID_POINTS: Final = 32
"""Places at which the sign is looked at first, evenly on a logarithmic scale."""
RESOLUTION: Final = 0.005
"""Differences below this share are a tie, which nobody wins: rounding of kernels' prices makes smaller ones."""


class Crossover(Spec):
    """Where ``first`` beats ``second`` on one device, at equal settings."""

    device: str
    first: str
    second: str
    measure: Literal["decode step", "throughput"]
    """A step at equal batch, or requests served with as many sequences as fit and the engine takes."""
    over: Literal["context tokens", "batch"]
    held: str
    """What stays."""
    wins: tuple[tuple[int, int], ...]
    """Ranges in which the first beats the second, both ends included; empty where it never does."""
    low: int
    high: int
    """Range that was searched."""

    @property
    def verdict(self) -> Literal["always", "never", "partly"]:
        """Whether it wins everywhere, nowhere, or in part of the range."""
        if not self.wins:
            return "never"
        return "always" if self.wins == ((self.low, self.high),) else "partly"

    @property
    def line(self) -> str:
        """It in a sentence."""
        whole = self._range(self.low, self.high)
        place = {
            "always": f"everywhere {whole}",
            "never": f"nowhere {whole}",
            "partly": " and ".join(self._range(first, last) for first, last in self.wins),
        }[self.verdict]
        return f"{self.device}: {self.first} beats {self.second} in {self.measure} {place} ({self.held})"

    def _range(self, first: int, last: int) -> str:
        numbers = f"from {first:,}" if first > self.low else ""
        if last < self.high or not numbers:
            numbers = f"{numbers or f'from {first:,}'} to {last:,}"
        return numbers.replace("from ", "from batch ", 1) if self.over == "batch" else f"{numbers} {self.over}"


def crossovers(
    screener: Screener, candidate: Candidate, others: tuple[Compression, ...], batch: int, model: ModelSpec
) -> Iterator[Crossover]:
    """Hold a candidate's strategy against others over context and batch; pairs that cannot run are left out."""
    for other in others:
        if other == candidate.strategy:
            continue
        try:
            yield from _pair(screener, candidate, other, batch, model)
        except KvsimError:
            continue


def _pair(
    screener: Screener, candidate: Candidate, other: Compression, batch: int, model: ModelSpec
) -> Iterator[Crossover]:
    load = screener.load
    mine, theirs = candidate, candidate._replace(strategy=other)
    longest = max(SHORTEST_TOKENS + 1, model.max_position_embeddings - load.output_tokens)
    names = {"device": candidate.device, "first": candidate.strategy.name, "second": other.name}
    contexts, batches = (SHORTEST_TOKENS, longest), (1, max(2, candidate.engine.max_num_seqs))

    def step_s(one: Candidate, sequences: int, tokens: int) -> float:
        split = decode_split(screener.prices(one).step, sequences, tokens, load.output_tokens // 2)
        return total_seconds(split)

    def by_context(tokens: int) -> float:
        return _margin(step_s(mine, batch, tokens), step_s(theirs, batch, tokens))

    def by_batch(sequences: int) -> float:
        return _margin(step_s(mine, sequences, load.prompt_tokens), step_s(theirs, sequences, load.prompt_tokens))

    def by_throughput(tokens: int) -> float:
        return _margin(1 / _served(screener, mine, tokens), 1 / _served(screener, theirs, tokens))

    cases: tuple[tuple[str, str, str, Callable[[int], float], tuple[int, int]], ...] = (
        ("decode step", "context tokens", f"batch {batch}", by_context, contexts),
        ("decode step", "batch", f"{load.prompt_tokens:,} context tokens", by_batch, batches),
        ("throughput", "context tokens", f"max_num_seqs {candidate.engine.max_num_seqs}", by_throughput, contexts),
    )
    for measure, over, held, margin, (low, high) in cases:
        yield Crossover.model_validate(
            {
                **names, "measure": measure, "over": over, "held": held, "low": low, "high": high,
                "wins": winning_ranges(margin, low, high),
            }
        )  # fmt: skip


def _margin(mine: float, theirs: float) -> float:
    """By which share of the other's cost the first is cheaper."""
    return 1.0 - mine / theirs


def _served(screener: Screener, candidate: Candidate, prompt_tokens: int) -> float:
    """Requests per second of one replica that always has enough to do, with prompts of one length."""
    load = LoadShape(prompt_tokens, screener.load.output_tokens, None, None)
    deployment, block = screener.deployment(candidate)
    deployment = replace(deployment, replicas=1)
    prices = price_load(screener.prices(candidate).step, load)
    outcome, _ = estimate_outcome(prices, deployment, plan_memory(deployment, block), load, Edge.CENTRAL)
    return max(outcome.input_tokens, 1) / prompt_tokens / outcome.duration_s


def winning_ranges(margin: Callable[[int], float], low: int, high: int) -> tuple[tuple[int, int], ...]:
    """Ranges of whole numbers in which ``margin`` is above a tie: signs on a grid first, then each change bisected.

    A range that lies between two neighbours of the grid is not seen.
    """
    places = _grid(low, high)
    wins = [margin(place) > RESOLUTION for place in places]
    starts = [low] if wins[0] else []
    ends = []
    for index in range(1, len(places)):
        if wins[index] != wins[index - 1]:
            change = _first_like(margin, places[index - 1], places[index], wins=wins[index])
            if wins[index]:
                starts.append(change)
            else:
                ends.append(change - 1)
    return tuple(zip(starts, [*ends, high], strict=False))


def _first_like(margin: Callable[[int], float], left: int, right: int, *, wins: bool) -> int:
    """The first number after ``left`` that is as ``right`` is."""
    while right - left > 1:
        middle = (left + right) // 2
        if (margin(middle) > RESOLUTION) == wins:
            right = middle
        else:
            left = middle
    return right


def _grid(low: int, high: int) -> tuple[int, ...]:
    growth = (high / low) ** (1 / (GRID_POINTS - 1))
    return tuple(dict.fromkeys(round(low * growth**step) for step in range(GRID_POINTS)))
