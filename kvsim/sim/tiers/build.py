"""Build every replica's tiers from their plan; what replicas share is built once."""

from __future__ import annotations

from dataclasses import dataclass

import simpy

from kvsim.sim.resources import SharedDevice
from kvsim.sim.tiers.hierarchy import KvTiers
from kvsim.sim.tiers.moves import Level, Mover
from kvsim.sim.tiers.reload import PrefillEstimate
from kvsim.sim.tiers.store import TierStore
from kvsim.sim.tiers.tally import ReloadTally, TierTally
from kvsim.specs.tier import KvReload
from kvsim.tiers import TierPlan, TiersPlan


@dataclass(frozen=True)
class TierResult:
    """One tier after a run, over all replicas; bytes and units of one rank of each."""

    plan: TierPlan
    tally: TierTally
    stores: int
    """How many there are of it: one per replica, or one that all share."""
    peak_units: int
    """Most units, arriving ones included, summed over stores."""
    evicted_units: int
    refused_units: int


@dataclass(frozen=True)
class TiersResult:
    """All tiers after a run."""

    tiers: tuple[TierResult, ...]
    reloads: ReloadTally
    reload: KvReload
    remembers: bool
    unit_tokens: int


class TierBuilder:
    """Makes the tiers of one run's replicas."""

    def __init__(
        self, env: simpy.Environment, plan: TiersPlan, unit_tokens: int, prefill: PrefillEstimate | None
    ) -> None:
        self._env = env
        self._plan = plan
        self._unit_tokens = unit_tokens
        self._prefill = prefill
        self._shared = [self._level(tier) if tier.is_shared else None for tier in plan.tiers]
        self.built: list[KvTiers] = []

    def build(self, device: SharedDevice) -> KvTiers:
        """Give tiers to the replica on ``device``."""
        levels = [shared or self._level(tier) for shared, tier in zip(self._shared, self._plan.tiers, strict=True)]
        tiers = KvTiers(
            Mover(self._env, device, self._plan),
            levels,
            self._unit_tokens,
            prefill=self._prefill,
            reload=self._plan.reload,
            remembers=self._plan.remembers,
        )
        self.built.append(tiers)
        return tiers

    def _level(self, plan: TierPlan) -> Level:
        units = None if plan.capacity_bytes is None else plan.capacity_bytes // plan.coding.unit_bytes
        server = SharedDevice(self._env) if plan.read_bytes_per_s is not None else None
        return Level(plan, TierStore(units), server)

    def result(self) -> TiersResult:
        """Add up what the tiers did."""
        reloads = ReloadTally()
        for tiers in self.built:
            reloads.add(tiers.reloads)
        found = tuple(self._tier_result(index) for index in range(len(self._plan.tiers)))
        return TiersResult(found, reloads, self._plan.reload, self._plan.remembers, self._unit_tokens)

    def _tier_result(self, index: int) -> TierResult:
        tally = TierTally()
        for tiers in self.built:
            tally.add(tiers.tallies[index])
        stores = list({id(tiers.levels[index].store): tiers.levels[index].store for tiers in self.built}.values())
        return TierResult(
            plan=self._plan.tiers[index],
            tally=tally,
            stores=len(stores),
            peak_units=sum(store.peak_units for store in stores),
            evicted_units=sum(store.evicted for store in stores),
            refused_units=sum(store.refused for store in stores),
        )
