"""Telling a caller how far a plan is, and stopping it where the caller wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvsim.errors import Cancelled

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done."""


@dataclass
class Watch:
    """Counts work of one stage after the other."""

    progress: Progress | None = None
    cancelled: Callable[[], bool] | None = None
    stage: str = ""
    total: int = 1
    done: int = 0

    def begin(self, stage: str, total: int) -> None:
        """Start a stage of so many pieces."""
        self.stage, self.total, self.done = stage, max(1, total), 0

    def expect(self, further: int) -> None:
        """Say that so many pieces are still to come, if that is more than was said."""
        self.total = max(self.total, self.done + further)

    def tick(self, count: int) -> None:
        """Count work that is done; raise Cancelled where the caller wants no more."""
        self.done += count
        if self.cancelled is not None and self.cancelled():
            msg = f"the plan was stopped while {self.stage}"
            raise Cancelled(msg)
        if self.progress is not None:
            self.progress(self.stage, min(1.0, self.done / self.total))
