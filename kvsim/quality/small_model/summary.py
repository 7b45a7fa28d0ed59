"""From outcomes per sequence to a table with confidence intervals. No torch.

Intervals are paired: sequences are drawn again with replacement, and each keeps its difference from the uncompressed
cache. They cover which sequences were drawn, not which model was trained; models are shown beside one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvsim.quality.small_model.outcomes import Outcome, OutcomeFolder, Setting, settings_of
from kvsim.quality.small_model.results import ResultRow
from kvsim.quality.small_model.tasks import TASKS
from kvsim.tensors import FloatArray

BASELINE: Final = "native"
DRAWS: Final = 1000
ALL: Final = "all"
_SEED: Final = 7
Interval = tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """One strategy in one setting of one model, with the uncompressed outcome of the same sequences."""

    model: str
    setting: Setting
    strategy: str
    outcome: Outcome
    baseline: Outcome


def summarise(folders: Mapping[str, OutcomeFolder], strategies: Sequence[str]) -> Iterator[ResultRow]:
    """Give rows per model and over all models, each per setting and over all tasks, in the order of ``strategies``."""
    for strategy in strategies:
        found = list(_measured(folders, strategy))
        for model in folders:
            for name, group in _together([one for one in found if one.model == model], 1):
                yield _row(model, name, strategy, group)
        for name, group in _together(found, len(folders)):
            yield _row(ALL, name, strategy, group)


def not_run(folders: Mapping[str, OutcomeFolder], strategies: Sequence[str]) -> dict[str, str]:
    """Strategies without a figure on some model, and why."""
    reasons = {}
    for strategy in strategies:
        for folder in folders.values():
            outcome = folder.read(settings_of(strategy)[0], strategy)
            if isinstance(outcome, str):
                reasons[strategy] = outcome
    return reasons


def _measured(folders: Mapping[str, OutcomeFolder], strategy: str) -> Iterator[Measured]:
    for model, folder in folders.items():
        for setting in settings_of(strategy):
            outcome = folder.read(setting, strategy)
            # The baseline selects nothing, so with the question in the prompt it is what it is without.
            baseline = folder.read(Setting(setting.task), BASELINE)
            if isinstance(outcome, Outcome) and isinstance(baseline, Outcome):
                yield Measured(model, setting, strategy, outcome, baseline)


def _together(found: Sequence[Measured], models: int) -> Iterator[tuple[str, list[Measured]]]:
    """Group over models: each setting, all unseen tasks, all tasks with the question seen; complete groups only."""
    groups: dict[str, list[Measured]] = {}
    for one in found:
        groups.setdefault(one.setting.name, []).append(one)
        groups.setdefault(f"{ALL}-seen" if one.setting.sees_question else ALL, []).append(one)
    wanted = {ALL: models * len(TASKS), f"{ALL}-seen": models * (len(TASKS) - 1)}
    for name, group in groups.items():
        if len(group) == wanted.get(name, models):
            yield name, group


def _row(model: str, task: str, strategy: str, group: Sequence[Measured]) -> ResultRow:
    scores = _parts(group, lambda one: one.outcome.score(one.setting.task))
    before = _parts(group, lambda one: one.baseline.score(one.setting.task))
    losses = [after - prior for after, prior in zip(scores, before, strict=True)]
    divergences = _parts(group, lambda one: one.outcome.kl_nats)
    low, high = _interval(losses)
    kl_low, kl_high = _interval(divergences)
    lookups = [one for one in group if one.setting.task != "language"]
    language = [one for one in group if one.setting.task == "language"]
    return ResultRow(
        model=model,
        task=task,
        strategy=strategy,
        sequences=sum(len(one.outcome.kl_nats) for one in group),
        bits_per_element=_mean(one.outcome.bits_per_element for one in group),
        score=_mean(scores_of.mean() for scores_of in scores),
        uncompressed=_mean(scores_of.mean() for scores_of in before),
        loss_low=-high,
        loss_high=-low,
        first=_mean(one.outcome.exact[:, 0].mean() for one in lookups) if lookups else None,
        second=_mean(one.outcome.exact[:, -1].mean() for one in lookups) if lookups else None,
        top1_agreement=_mean(one.outcome.top1_agreement.mean() for one in group),
        kl_nats=_mean(part.mean() for part in divergences),
        kl_low=kl_low,
        kl_high=kl_high,
        perplexity=float(np.exp(_mean(one.outcome.loss_nats.mean() for one in language))) if language else None,
        uncompressed_perplexity=(
            float(np.exp(_mean(one.baseline.loss_nats.mean() for one in language))) if language else None
        ),
    )


def _parts(group: Sequence[Measured], pick: Callable[[Measured], FloatArray]) -> list[FloatArray]:
    """Per model and setting, (B,): each has sequences of its own."""
    return [pick(one) for one in group]


def _interval(parts: Sequence[FloatArray]) -> Interval:
    """95 % of the mean over parts, each part's sequences drawn again by themselves."""
    rng = np.random.default_rng(_SEED)
    draws = np.zeros(DRAWS)
    for values in parts:
        rows = rng.integers(0, len(values), (DRAWS, len(values)))
        draws += values.astype(np.float64)[rows].mean(axis=1) / len(parts)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(sum(found) / len(found))
