"""Speculative decoding's options, in vLLM's names, and how often drafts are accepted."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvsim.specs.base import Spec

Share = Annotated[float, Field(ge=0, le=1)]

BISECTIONS = 60
"""Halvings that find an acceptance rate to the last bit of a float."""


class SpeculativeConfig(Spec):
    """vLLM's ``--speculative-config``, and the acceptance that the user expects: no engine option gives it."""

    method: Literal["ngram", "draft_model", "eagle", "eagle3", "mtp"]
    """Who drafts: look-up in the prompt, a small model, or a head of one layer on the model's own hidden states."""
    num_speculative_tokens: Annotated[int, Field(ge=0, le=32)]
    """Draft tokens that each step verifies besides the one that it would compute anyway."""
    model: str | None = None
    """Preset, path or id of the draft model (``draft_model`` only)."""
    acceptance_rate: Share | tuple[Share, ...] | None = None
    """Chance that a draft token is accepted if all before it were: one for all positions, or one per position."""
    acceptance_length: Annotated[float, Field(ge=1)] | None = None
    """Mean tokens per step instead, the model's own included: 1 to num_speculative_tokens + 1."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        count = self.num_speculative_tokens
        if self.method == "draft_model" and self.model is None:
            msg = "method draft_model needs model, the draft model's name, path or id"
            raise ValueError(msg)
        if self.method != "draft_model" and self.model is not None:
            msg = f"model names the draft model of method draft_model, and method is {self.method}; leave it out"
            raise ValueError(msg)
        if count and (self.acceptance_rate is None) == (self.acceptance_length is None):
            msg = "give acceptance_rate or acceptance_length, one of them: how often drafts are accepted is measured"
            raise ValueError(msg)
        if isinstance(self.acceptance_rate, tuple) and len(self.acceptance_rate) != count:
            msg = f"acceptance_rate has {len(self.acceptance_rate)} positions, and num_speculative_tokens is {count}"
            raise ValueError(msg)
        if self.acceptance_length is not None and self.acceptance_length > count + 1:
            msg = f"acceptance_length {self.acceptance_length:g} exceeds num_speculative_tokens + 1 = {count + 1}"
            raise ValueError(msg)
        return self

    @property
    def rates(self) -> tuple[float, ...]:
        """Chance of each position, given that all before it were accepted."""
        count, rate = self.num_speculative_tokens, self.acceptance_rate
        if isinstance(rate, tuple):
            return rate
        if rate is None:
            rate = _rate_of_length(self.acceptance_length or 1.0, count)
        return (rate,) * count

    @property
    def survival(self) -> tuple[float, ...]:
        """Chance that position i and all before it are accepted."""
        chances, chance = [], 1.0
        for rate in self.rates:
            chance *= rate
            chances.append(chance)
        return tuple(chances)

    @property
    def mean_length(self) -> float:
        """Mean tokens of a step, (1 - a^(k+1)) / (1 - a) for one rate a (Leviathan et al. 2023, arXiv 2211.17192)."""
        return 1.0 + sum(self.survival)


def _rate_of_length(length: float, count: int) -> float:
    """The rate at which 1 + a + ... + a^count is ``length``."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if sum(middle**power for power in range(count + 1)) < length:
            low = middle
        else:
            high = middle
    return high if length >= count + 1 else low
