"""How requests reach replicas."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvsim.specs.base import Spec

Routing = Literal["round_robin", "least_loaded", "prefix_aware"]


class RouterThresholds(Spec):
    """When ``prefix_aware`` routing goes by the cache and when by load; names and defaults of SGLang's router."""

    cache_threshold: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the prompt that must be cached for the replica that has most of it to be taken."""
    balance_abs_threshold: Annotated[int, Field(ge=0)] = 64
    """Requests by which the most loaded replica must exceed the least loaded one for load to decide alone."""
    balance_rel_threshold: Annotated[float, Field(ge=1)] = 1.5
    """And the ratio of the two that must be exceeded as well."""
