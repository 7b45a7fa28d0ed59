"""Everything that differs between levels, in ticks and bytes, ready for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsim.cost.mixed import MixedPrices, Reencoding, mixed_prices, reencoding
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.cost.tables import StepTables, build_tables
from kvsim.deployment import Deployment
from kvsim.pool import prefill_growths


@dataclass(frozen=True)
class PromptBytes:
    """What a prompt of one level holds while it is processed: ((most tokens or None, bytes of a block), ...)."""

    growths: tuple[tuple[int | None, int], ...]
    fixed_bytes: int


@dataclass(frozen=True)
class LevelPrices:
    """Prices of every level, of their mixtures, and of the way from one to the next."""

    steps: tuple[StepModel, ...]
    tables: tuple[StepTables, ...]
    prompts: tuple[PromptBytes, ...]
    mixed: MixedPrices
    reencodings: dict[tuple[int, int], Reencoding]
    """By (from, to), towards tighter levels."""

    @property
    def count(self) -> int:
        """How many levels there are."""
        return len(self.steps)


def level_prices(deployment: Deployment, edge: Edge, first: tuple[StepModel, StepTables]) -> LevelPrices:
    """Price the levels of an adaptive deployment; ``first`` is level 0, which the engine has priced already."""
    engine = deployment.engine
    steps, tables = [first[0]], [first[1]]
    for level in deployment.levels[1:]:
        step = StepModel(level, build_rates(level.device, level.priors, edge))
        steps.append(step)
        tables.append(build_tables(step, engine.max_num_batched_tokens, engine.max_num_seqs))
    return LevelPrices(
        steps=tuple(steps),
        tables=tuple(tables),
        prompts=tuple(PromptBytes(*prefill_growths(level)) for level in deployment.levels),
        mixed=mixed_prices(steps, tables),
        reencodings=_reencodings(deployment, steps),
    )


def _reencodings(deployment: Deployment, steps: Sequence[StepModel]) -> dict[tuple[int, int], Reencoding]:
    if deployment.adaptive is None or deployment.adaptive.requantize is None:
        return {}
    count = len(steps)
    return {
        (source, target): reencoding(steps[source], steps[target])
        for source in range(count)
        for target in range(source + 1, count)
    }
