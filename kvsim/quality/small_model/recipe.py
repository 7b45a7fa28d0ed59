"""How a model is trained, and when it is done. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvsim.quality.small_model.tasks import TASKS

LOOKUP_TASKS: Final = ("recall", "needle", "chain", "copy")


@dataclass(frozen=True)
class Recipe:
    """How to train. The criterion is on sequences that were never trained on."""

    contexts: tuple[int, ...] = (32, 64, 128, 256)
    tokens_per_step: int = 2048
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_steps: int = 50
    advance_at: float = 0.8
    """Share of right answer tokens of every look-up task in training at which the context grows."""
    decay_at: float = 0.95
    """Share of right answer tokens of every look-up task at which the learning rate starts to fall."""
    criterion_exact: float = 0.97
    """Exact match that each lookup task must reach on its own."""
    criterion_language: float = 0.53
    """Share of the language task's tokens to be guessed: always the likeliest of the source would be 0.6, a look-up of
    one earlier occurrence 0.44."""
    check_every: int = 25
    decay_steps: int = 200
    max_steps: int = 6000
    threads: int = 1
    """One, so that sums do not depend on how many cores there are."""
    tasks: tuple[str, ...] = tuple(TASKS)


RECIPE: Final = Recipe()
"""What every model of the tables is trained by."""


def meets(validation: Mapping[str, float], recipe: Recipe) -> bool:
    """Whether a validation meets the criterion."""
    exact = all(share >= recipe.criterion_exact for task, share in validation.items() if task in LOOKUP_TASKS)
    return exact and validation.get("language", 1.0) >= recipe.criterion_language
