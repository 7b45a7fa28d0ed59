"""A figure with its band and its source."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from kvsim.specs.base import Spec

Positive = Annotated[float, Field(gt=0)]


class Edge(StrEnum):
    """Which edge of every prior's band a pricing takes."""

    CENTRAL = "central"
    OPTIMISTIC = "optimistic"
    PESSIMISTIC = "pessimistic"


EDGES = tuple(Edge)
"""All edges, the central one first."""


class Banded(Spec):
    """A value, its band and the measurements behind it."""

    value: Positive
    low: Positive
    high: Positive
    source: str

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            msg = "low <= value <= high must hold"
            raise ValueError(msg)
        return self

    def cost(self, edge: Edge) -> float:
        """Value at ``edge`` where more means slower (a duration, an operation count)."""
        return {Edge.CENTRAL: self.value, Edge.OPTIMISTIC: self.low, Edge.PESSIMISTIC: self.high}[edge]

    def efficiency(self, edge: Edge) -> float:
        """Value at ``edge`` where more means faster."""
        return {Edge.CENTRAL: self.value, Edge.OPTIMISTIC: self.high, Edge.PESSIMISTIC: self.low}[edge]


class Prior(Banded):
    """What kernels reach of a datasheet's peak, or what they cost."""

    per_query_head: bool = False
    """The kernel unpacks once per query head instead of once per KV head."""


PriorTable = dict[str, Prior]
