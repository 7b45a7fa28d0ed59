"""What replicas share of prompts: prefix caches, one per replica, and the tiers below them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import simpy

from kvsim.cost.priors import Edge
from kvsim.deployment import Deployment
from kvsim.requests import RequestTable
from kvsim.sim.adaptive.build import LevelBuilder, SharedUnits
from kvsim.sim.adaptive.prices import level_prices
from kvsim.sim.parts import PoolParts
from kvsim.sim.prefix_cache import PrefixCache
from kvsim.sim.resources import SharedDevice
from kvsim.sim.scheduling import PrefixSharing, SchedulerLimits
from kvsim.sim.tiers.build import TierBuilder
from kvsim.sim.tiers.reload import PrefillEstimate
from kvsim.tiers import plan_tiers


@dataclass(frozen=True)
class Sharing:
    """What replicas need to share prefixes."""

    unit_bytes: int
    unit_tokens: int
    hashes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, deployment: Deployment, requests: RequestTable, limits: SchedulerLimits) -> Sharing | None:
        """None where the workload shares no prefixes or the deployment cannot reuse them."""
        if requests.prefix_hashes is None or not deployment.prefix_caching:
            return None
        unit_tokens = requests.hash_block_tokens
        # Windowed layers keep their own blocks: only what grows with the prompt can be shared.
        growing = sum(block_bytes for cap, block_bytes in limits.prefill_growths if cap is None)
        unit_bytes = unit_tokens // limits.block_size * growing
        if unit_tokens % limits.block_size or not unit_bytes:
            return None
        hashes = requests.prefix_hashes
        if requests.output_hashes is not None:
            hashes = tuple(a + b for a, b in zip(hashes, requests.output_hashes, strict=True))
        return cls(unit_bytes, unit_tokens, hashes)

    def build(self, device: SharedDevice, tiers: TierBuilder | None = None) -> PrefixSharing:
        """Give a replica its own prefix cache, and its tiers."""
        cache = PrefixCache(self.unit_bytes)
        if tiers is None:
            return PrefixSharing(cache, self.hashes, self.unit_tokens)
        built = tiers.build(device)
        if built.writes_back:
            cache.on_evict = built.evicted
        return PrefixSharing(cache, self.hashes, self.unit_tokens, built)


def level_builder(deployment: Deployment, requests: RequestTable, pool: PoolParts, edge: Edge) -> LevelBuilder | None:
    """What builds engines of several levels; None where one compression serves every request."""
    if deployment.adaptive is None:
        return None
    prices = level_prices(deployment, edge, (pool.step, pool.tables))
    found = [
        Sharing.of(deployment, requests, replace(pool.limits, prefill_growths=prompt.growths))
        for prompt in prices.prompts
    ]
    sharings = [sharing for sharing in found if sharing is not None]
    shared = None
    if len(sharings) == prices.count:
        sizes = tuple(sharing.unit_bytes for sharing in sharings)
        shared = SharedUnits(sizes, sharings[0].hashes, sharings[0].unit_tokens)
    return LevelBuilder(deployment.adaptive, prices, requests, shared)


def tier_builder(
    env: simpy.Environment, deployment: Deployment, sharing: Sharing | None, pool: PoolParts, edge: Edge
) -> TierBuilder | None:
    """What builds the tiers of every replica; None without tiers, or where nothing is shared."""
    if sharing is None:
        return None
    plan = plan_tiers(deployment, sharing.unit_bytes, sharing.unit_tokens, edge)
    if plan is None:
        return None
    prefill = PrefillEstimate(pool.step, pool.tables, deployment.engine.max_num_batched_tokens)
    return TierBuilder(env, plan, sharing.unit_tokens, prefill)
