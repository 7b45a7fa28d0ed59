"""From an adaptive deployment to the engines of its replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsim.adaptive import Adaptive
from kvsim.requests import RequestTable
from kvsim.sim.adaptive.engine import AdaptiveEngine
from kvsim.sim.adaptive.prices import LevelPrices
from kvsim.sim.adaptive.scheduler import LevelSharing, level_sharing
from kvsim.sim.parts import ReplicaParts


@dataclass(frozen=True)
class SharedUnits:
    """What replicas need to share prefixes among requests of one level."""

    unit_bytes: tuple[int, ...]
    """By level."""
    hashes: Sequence[tuple[int, ...]]
    unit_tokens: int


@dataclass(frozen=True)
class LevelBuilder:
    """Builds the engines of one adaptive run, all of the same prices."""

    adaptive: Adaptive
    prices: LevelPrices
    requests: RequestTable
    shared: SharedUnits | None
    """None where nothing is shared."""

    def engine(self, parts: ReplicaParts) -> AdaptiveEngine:
        """One replica's engine, which gets a prefix cache of several levels."""
        classes = self.requests.request_class
        names_and_classes = (self.requests.class_names, None if classes is None else classes.tolist())
        return AdaptiveEngine(parts, self._sharing(), self.adaptive, self.prices, names_and_classes)

    def _sharing(self) -> LevelSharing | None:
        shared = self.shared
        return None if shared is None else level_sharing(shared.unit_bytes, shared.hashes, shared.unit_tokens)
