"""Which replica a request goes to: in turn, to the least loaded, or to where most of its prompt is cached.

``prefix_aware`` is SGLang's cache-aware rule, on the replicas' caches as they are (Dynamo's router learns them from
events of the engines; SGLang's own keeps an estimate of them). Ties fall deterministically.
Sources: sgl-router/src/policies/cache_aware.rs and its Python defaults (SGLang); NVIDIA Dynamo's two-tier selector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvsim.sim.prefix_cache import PrefixCache
from kvsim.specs.routing import RouterThresholds, Routing


class Queue(Protocol):
    """Where the router leaves requests."""

    def append(self, index: int, /) -> None:
        """Add an arrival."""


class Replica(Protocol):
    """What the router needs to know of a replica."""

    @property
    def waiting(self) -> Queue:
        """Requests delivered and not yet admitted."""

    @property
    def cache(self) -> PrefixCache | None:
        """Its prefix cache, where it has one."""

    load: int
    """Requests routed to it that have not left it."""


class Router:
    """Chooses among replicas; keeps the turn of a round robin."""

    def __init__(
        self,
        routing: Routing,
        thresholds: RouterThresholds,
        hashes: Sequence[tuple[int, ...]] | None = None,
        prompt_units: Sequence[float] = (),
    ) -> None:
        """``prompt_units`` are the requests' prompts in units of the prefix cache; part of one counts as that part."""
        self._routing = routing
        self._thresholds = thresholds
        self._hashes = hashes
        self._prompt_units = prompt_units
        self._turn = 0

    @property
    def reads_caches(self) -> bool:
        """Whether its choice depends on what the replicas' prefix caches hold."""
        return self._routing == "prefix_aware"

    def choose(self, index: int, replicas: Sequence[Replica]) -> int:
        """Position of the replica that request ``index`` goes to."""
        if self._routing == "round_robin":
            self._turn += 1
            return (self._turn - 1) % len(replicas)
        if self._routing == "least_loaded":
            return least_loaded(replicas)
        return self._by_prefix(index, replicas)

    def _by_prefix(self, index: int, replicas: Sequence[Replica]) -> int:
        limits, loads = self._thresholds, [replica.load for replica in replicas]
        spread = max(loads) - min(loads)
        if spread > limits.balance_abs_threshold and max(loads) > limits.balance_rel_threshold * min(loads):
            return least_loaded(replicas)
        matches = self._matches(index, replicas)
        best = max(matches)
        if best > limits.cache_threshold * (self._prompt_units[index] if self._prompt_units else 0.0):
            return min(
                (place for place, units in enumerate(matches) if units == best), key=lambda place: (loads[place], place)
            )
        # SGLang sends what nobody knows to the replica with the smallest tree; load comes first here, as in Dynamo.
        return min(range(len(replicas)), key=lambda place: (loads[place], _cached_units(replicas[place]), place))

    def _matches(self, index: int, replicas: Sequence[Replica]) -> list[int]:
        """Leading units of the prompt that each replica has cached."""
        if self._hashes is None:
            return [0] * len(replicas)
        own = self._hashes[index]
        return [replica.cache.match(own, len(own)) if replica.cache is not None else 0 for replica in replicas]


def least_loaded(replicas: Sequence[Replica]) -> int:
    """Position of the replica with the fewest requests, the first of equals."""
    return min(range(len(replicas)), key=lambda place: replicas[place].load)


def _cached_units(replica: Replica) -> int:
    return replica.cache.units if replica.cache is not None else 0
