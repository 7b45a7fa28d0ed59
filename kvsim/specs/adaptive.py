"""How an adaptive engine decides: the policy, what happens to running sequences, and what classes may be given."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvsim.specs.base import Spec
from kvsim.units import Seconds

LevelNumber = Annotated[int, Field(ge=0)]


class StaticPolicy(Spec):
    """Always the same level."""

    kind: Literal["static"] = "static"
    level: LevelNumber = 0


class PressurePolicy(Spec):
    """Tighten where the pool is full or the queue long, relax where the pool is empty enough again.

    Looked at between engine steps. Every change waits until the last one is ``min_dwell_s`` ago.
    """

    kind: Literal["pressure"] = "pressure"
    high_watermark: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the KV pool in use from which on the policy tightens."""
    low_watermark: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """Share of the KV pool in use down to which it relaxes again."""
    queue_length: Annotated[int, Field(gt=0)] | None = None
    """Waiting requests from which on the policy tightens too; None looks at the pool alone."""
    min_dwell_s: Seconds = 1.0
    """Shortest time between two changes."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low_watermark >= self.high_watermark:
            msg = "low_watermark must be below high_watermark, or the policy would swing with every block"
            raise ValueError(msg)
        return self


Policy = Annotated[StaticPolicy | PressurePolicy, Field(discriminator="kind")]


class Requantize(Spec):
    """Encode running sequences again at the policy's level, once pressure stays after it was raised."""

    order: Literal["longest", "oldest"] = "longest"
    """Which sequences first, until the pool's use is down to the low watermark."""
    before_preemption: bool = True
    """Also where the next step's blocks do not fit, before any sequence is preempted."""


class ClassLevels(Spec):
    """Range of levels that a request class may be given."""

    min_level: LevelNumber = 0
    max_level: LevelNumber | None = None
    """None: the last one."""
