"""Prefix cache of one replica: blocks found by hash, pinned while in use, evicted least recently used first.

Blocks are handled in units of the workload's hash granularity (16 tokens, or Mooncake's 512). A unit that nobody uses
stays findable but counts as free, as in vLLM; it is forgotten when its bytes are needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvsim.errors import InvariantViolation


class PrefixCache:
    """Maps a unit's hash to its use count. Byte counts are whole units of ``unit_bytes``."""

    def __init__(self, unit_bytes: int) -> None:
        self.unit_bytes = unit_bytes
        self._users: dict[int, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        self.uses = 0
        """Uses of all units together."""
        self.on_evict: Callable[[Sequence[int]], None] | None = None
        """Told which units were just forgotten, the least recently used first."""

    @property
    def units(self) -> int:
        """Units that can be found."""
        return len(self._users)

    @property
    def evictable_bytes(self) -> int:
        """Bytes of units that are findable but not in use."""
        return len(self._unused) * self.unit_bytes

    @property
    def pinned_units(self) -> int:
        """Units in use."""
        return len(self._users) - len(self._unused)

    def match(self, hashes: Sequence[int], max_units: int) -> int:
        """How many leading units are present, at most ``max_units``."""
        users = self._users
        count = 0
        for value in hashes[:max_units]:
            if value not in users:
                break
            count += 1
        return count

    def unused_among(self, hashes: Sequence[int]) -> int:
        """How many of these present units are not in use, so that pinning them takes free bytes."""
        return sum(1 for value in hashes if value in self._unused)

    def pin(self, hashes: Sequence[int]) -> None:
        """Use present units once more."""
        self.uses += len(hashes)
        for value in hashes:
            self._users[value] += 1
            self._unused.pop(value, None)

    def insert(self, value: int) -> bool:
        """Add a newly computed unit in use; False if an equal one is present already."""
        if value in self._users:
            return False
        self._users[value] = 1
        self.uses += 1
        return True

    def unpin(self, hashes: Sequence[int]) -> int:
        """Stop using units, last one first so that a prefix outlives its continuation; count those now unused."""
        freed = 0
        self.uses -= len(hashes)
        for value in reversed(hashes):
            left = self._users[value] - 1
            if left < 0:
                msg = f"prefix unit {value} was released more often than it was used"
                raise InvariantViolation(msg)
            self._users[value] = left
            if left == 0:
                self._unused[value] = None
                freed += 1
        return freed

    def evict_until(self, limit_bytes: int) -> None:
        """Forget the least recently used units until the evictable ones fit in ``limit_bytes``."""
        if len(self._unused) * self.unit_bytes <= limit_bytes:
            return
        forgotten = []
        while len(self._unused) * self.unit_bytes > limit_bytes:
            value, _ = self._unused.popitem(last=False)
            del self._users[value]
            forgotten.append(value)
        if self.on_evict is not None:
            self.on_evict(forgotten)
