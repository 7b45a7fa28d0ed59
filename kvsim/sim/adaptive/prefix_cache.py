"""Prefix caches of several levels over one pool.

A unit is found by its hash and its format; the pool forgets the least recently used of all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvsim.sim.prefix_cache import PrefixCache


class LevelledPrefixCache(PrefixCache):
    """What a pool knows of all levels: how much can make way, and in which order."""

    def __init__(self, unit_bytes: Sequence[int]) -> None:
        super().__init__(0)
        self.levels = tuple(LevelCache(size, self, level) for level, size in enumerate(unit_bytes))
        self._idle: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._idle_bytes = 0

    @property
    def evictable_bytes(self) -> int:
        """Bytes of units that are findable but not in use."""
        return self._idle_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes of units in use."""
        return sum(cache.pinned_units * cache.unit_bytes for cache in self.levels)

    @property
    def units(self) -> int:
        """Units of all levels, for a router."""
        return sum(cache.units for cache in self.levels)

    def match(self, hashes: Sequence[int], max_units: int) -> int:
        """How many leading units the level has that has most of them, for a router: it does not know levels."""
        return max(cache.match(hashes, max_units) for cache in self.levels)

    def evict_until(self, limit_bytes: int) -> None:
        """Forget the least recently used units until the evictable ones fit in ``limit_bytes``."""
        while self._idle_bytes > limit_bytes:
            (level, value), _ = self._idle.popitem(last=False)
            cache = self.levels[level]
            self._idle_bytes -= cache.unit_bytes
            cache.forget(value)

    def rest(self, level: int, value: int) -> None:
        """Nobody uses a unit any more."""
        self._idle[level, value] = None
        self._idle_bytes += self.levels[level].unit_bytes

    def wake(self, level: int, value: int) -> None:
        """A unit that nobody used is used again."""
        del self._idle[level, value]
        self._idle_bytes -= self.levels[level].unit_bytes


class LevelCache(PrefixCache):
    """The units of one level."""

    def __init__(self, unit_bytes: int, pool: LevelledPrefixCache, level: int) -> None:
        super().__init__(unit_bytes)
        self._pool = pool
        self._level = level

    @property
    def evictable_bytes(self) -> int:
        """Bytes of units of any level that are findable but not in use."""
        return self._pool.evictable_bytes

    def sole_units(self, hashes: Sequence[int]) -> int:
        """How many of these present units have one user."""
        return sum(1 for value in hashes if self._users[value] == 1)

    def pin(self, hashes: Sequence[int]) -> None:
        """Use present units once more."""
        for value in hashes:
            if value in self._unused:
                self._pool.wake(self._level, value)
        super().pin(hashes)

    def unpin(self, hashes: Sequence[int]) -> int:
        """Stop using units, last one first so that a prefix outlives its continuation; count those now unused."""
        freed = super().unpin(hashes)
        for value in reversed(hashes):
            if not self._users[value]:
                self._pool.rest(self._level, value)
        return freed

    def evict_until(self, limit_bytes: int) -> None:
        """Forget the least recently used units of all levels until the evictable ones fit in ``limit_bytes``."""
        self._pool.evict_until(limit_bytes)

    def forget(self, value: int) -> None:
        """Drop a unit that nobody uses."""
        del self._users[value]
        del self._unused[value]
