"""What sequences of a replica wait for beside its steps: compaction, copies from another tier, transfers.

Whoever waits holds its blocks, and its seat unless it is on its way out. The engine resumes it at the first step
boundary after its event.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import simpy


class Waits:
    """Events under way, each with what to do once it has happened, in order of their start."""

    def __init__(self) -> None:
        self._pending: list[tuple[simpy.Event, Callable[[], None]]] = []
        self._unseated = 0

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def seats(self) -> int:
        """Seats that those who wait take."""
        return len(self._pending) - self._unseated

    def add_unseated(self, event: simpy.Event, resume: Callable[[], None]) -> None:
        """As :meth:`add`, for a sequence that holds blocks alone, until ``event``."""
        self._unseated += 1
        self.add(event, partial(self._resume_unseated, resume))

    def _resume_unseated(self, resume: Callable[[], None]) -> None:
        self._unseated -= 1
        resume()

    def add(self, event: simpy.Event, resume: Callable[[], None]) -> None:
        """Resume a sequence once ``event`` has happened."""
        self._pending.append((event, resume))

    def settle(self) -> None:
        """Resume whoever waited for what has happened by now."""
        pending, self._pending = self._pending, []
        still = []
        for entry in pending:
            if entry[0].processed:
                entry[1]()
            else:
                still.append(entry)
        self._pending = still + self._pending

    def events(self) -> list[simpy.Event]:
        """Events that someone still waits for."""
        return [event for event, _ in self._pending]
