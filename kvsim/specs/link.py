"""A link between two engines, or an engine and a store: nominal rates, each with its source."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from kvsim.specs.base import Spec
from kvsim.specs.device import BandwidthFact, Slug, Source
from kvsim.units import BytesPerSecond, Seconds

LinkKind = Literal["nvlink", "pcie", "infiniband", "roce", "ethernet"]


class DurationFact(Spec):
    value: Seconds
    source: str


class LinkSpec(Spec):
    """One port of a network or bus. Rates are nominal and per direction; what transfers reach of them is a prior."""

    name: Slug
    title: str
    kind: LinkKind
    aliases: tuple[str, ...] = ()
    bandwidth: BandwidthFact
    """Bytes per second, one direction."""
    latency: DurationFact | None = None
    """Of a small message, where a source states one."""
    sources: dict[str, Source] = Field(min_length=1)

    @model_validator(mode="after")
    def _sources_exist(self) -> Self:
        for field, fact in (("bandwidth", self.bandwidth), ("latency", self.latency)):
            if fact is not None and fact.source not in self.sources:
                msg = f"{field} names source {fact.source!r}, which 'sources' does not list"
                raise ValueError(msg)
        return self


class CustomLink(Spec):
    """A link given by what transfers really reach: no efficiency and no set-up time is added."""

    bandwidth: BytesPerSecond
    """Bytes per second, one direction."""
    latency_s: Seconds = 0.0
    """From the start of a transfer to its first byte."""
