"""What one tier holds: units in least recently used order, those on their way in, and those being read. No clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvsim.errors import InvariantViolation


class TierStore:
    """Units of one tier. Room is taken when a copy begins, so bytes in flight count; a unit is found once it ended.

    Source of the order (make room first, find after the transfer): vLLM ``OffloadingManager.prepare_store`` and
    ``complete_store``.
    """

    def __init__(self, capacity_units: int | None) -> None:
        self.capacity_units = capacity_units
        """None is unbounded."""
        self._units: OrderedDict[int, None] = OrderedDict()
        self._arriving: set[int] = set()
        self._readers: dict[int, int] = {}
        self.begun = 0
        """Units whose way in has begun."""
        self.completed = 0
        self.evicted = 0
        self.refused = 0
        """Units for which no room could be made."""
        self.peak_units = 0

    @property
    def used_units(self) -> int:
        """Units present and on their way in."""
        return len(self._units) + len(self._arriving)

    @property
    def arriving_units(self) -> int:
        """Units on their way in."""
        return len(self._arriving)

    @property
    def read_units(self) -> int:
        """Units that are being read."""
        return len(self._readers)

    def has(self, value: int) -> bool:
        """Whether a unit can be loaded from here."""
        return value in self._units

    def knows(self, value: int) -> bool:
        """Whether a unit is here or on its way."""
        return value in self._units or value in self._arriving

    def reserve(self, values: Iterable[int]) -> tuple[list[int], list[int]]:
        """Make room for units that are not here: (units that may come, units that made way).

        The least recently used units make way, but none that is being read. Once no room can be made the rest is
        refused: without its beginning a prefix is of no use.
        """
        accepted: list[int] = []
        victims: list[int] = []
        refused = 0
        for value in [value for value in values if not self.knows(value)]:
            if refused or not self._make_room(victims):
                refused += 1
                continue
            self._arriving.add(value)
            accepted.append(value)
        self.begun += len(accepted)
        self.refused += refused
        if self.used_units > self.peak_units:
            self.peak_units = self.used_units
        return accepted, victims

    def _make_room(self, victims: list[int]) -> bool:
        if self.capacity_units is None or self.used_units < self.capacity_units:
            return True
        victim = next((value for value in self._units if value not in self._readers), None)
        if victim is None:
            return False
        del self._units[victim]
        self.evicted += 1
        victims.append(victim)
        return True

    def commit(self, values: Iterable[int]) -> None:
        """Units have arrived, the most recently used ones from now on."""
        for value in values:
            if value not in self._arriving:
                msg = f"unit {value} arrived in a tier that did not expect it"
                raise InvariantViolation(msg)
            self._arriving.discard(value)
            self._units[value] = None
            self.completed += 1

    def begin_read(self, values: Sequence[int]) -> None:
        """Use present units: they become the most recently used ones, and stay until :meth:`end_read`."""
        for value in values:
            self._units.move_to_end(value)
            self._readers[value] = self._readers.get(value, 0) + 1

    def end_read(self, values: Sequence[int]) -> None:
        """Let go of units read."""
        for value in values:
            left = self._readers.pop(value) - 1
            if left:
                self._readers[value] = left
