"""What a run leaves behind: one row per request, one per run of equal decode steps, and where the time went."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvsim.sim.adaptive.record import AdaptiveRecord
from kvsim.units import TICKS_PER_SECOND

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Run = tuple[int, int, int, int]
"""(steps, sequences, ticks of the first step, growth per step): every sequence waits each step's length once."""

PromptStep = tuple[int, int, int, int, int]
"""(decoding sequences, prompt tokens, prompts completed, attention ticks, compression ticks) of one step, in its
fullest lane."""


class Rows:  # noqa: PLW1641 - it grows
    """Rows of as many integers each in one flat array of 64-bit integers: a million tuples would take 200 MB."""

    __slots__ = ("_flat", "_width", "append")

    append: Callable[[Iterable[int]], None]
    """Add one row of exactly the width; not checked, for the hot loop."""

    def __init__(self, width: int) -> None:
        self._flat = array("q")
        self._width = width
        self.append = self._flat.extend

    def __len__(self) -> int:
        return len(self._flat) // self._width

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return zip(*[iter(self._flat)] * self._width, strict=True)

    def __getitem__(self, index: int) -> tuple[int, ...]:
        start = range(len(self))[index] * self._width
        return tuple(self._flat[start : start + self._width])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self._flat == other._flat

    def __repr__(self) -> str:
        return f"Rows({list(self)!r})"

    def table(self) -> IntArray:
        """A copy as an array of shape (rows, width)."""
        return np.array(self._flat, dtype=np.int64).reshape(-1, self._width)


@dataclass
class PhaseTicks:
    """Busy ticks of one phase by component."""

    weights: int = 0
    attention: int = 0
    compression: int = 0
    communication: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        """All components together."""
        return self.weights + self.attention + self.compression + self.communication + self.overhead


@dataclass
class ReplicaRecord:
    """Tallies of one replica."""

    runs: Rows = field(default_factory=lambda: Rows(4))
    """A :data:`Run` each."""
    gaps: list[int] = field(default_factory=list)
    """Single inter-token gaps that span a preemption or a compaction."""
    held_back: list[tuple[int, int]] = field(default_factory=list)
    """(ticks, sequences) of gaps that span steps of prompts alone."""
    prompts: Rows = field(default_factory=lambda: Rows(5))
    """A :data:`PromptStep` each."""
    other_lanes_tokens: int = 0
    """Prompt tokens that lanes beside the fullest processed in the same steps."""
    aside_ticks: int = 0
    """Compression that ran on a side stream."""
    prefill: PhaseTicks = field(default_factory=PhaseTicks)
    decode: PhaseTicks = field(default_factory=PhaseTicks)
    host_ticks: int = 0
    """Time that steps took longer for the host's work."""
    contention_ticks: int = 0
    """Time lost to sharing the device with side activities."""
    verifications: int = 0
    """Steps of single sequences that verified drafts."""
    verified_tokens: int = 0
    """Tokens that came out of them."""
    drafting_ticks: int = 0
    """The part of decode steps that drafting took."""
    preemptions: int = 0
    recomputed_tokens: int = 0
    cached_prompt_tokens: int = 0
    max_running: int = 0
    max_waiting: int = 0
    min_free_bytes: int = 0
    adaptive: AdaptiveRecord | None = None
    """What an adaptive compression did."""

    @property
    def steps(self) -> int:
        """Engine steps taken."""
        return int(self.runs.table()[:, 0].sum()) + int((self.prompts.table()[:, 0] == 0).sum())

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens processed, recomputed ones included."""
        return int(self.prompts.table()[:, 1].sum()) + self.other_lanes_tokens


@dataclass
class RequestLog:
    """Per request, in ticks; -1 where it did not happen. The engine's times, but for ``sent``."""

    sent: list[int]
    """When the client sent it; the front end hands it to the engine at ``arrived``."""
    arrived: list[int]
    scheduled: list[int]
    first_token: list[int]
    finished: list[int]
    rejected: list[bool]
    egress_ticks: int = 0
    """From a token out of the engine to the client."""

    def client_seconds(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """When each request was sent and its first and last token reached the client; below 0 where none did."""
        sent, first, last = (
            np.asarray(ticks, dtype=np.float64) for ticks in (self.sent, self.first_token, self.finished)
        )
        first[first >= 0] += self.egress_ticks
        last[last >= 0] += self.egress_ticks
        return sent / TICKS_PER_SECOND, first / TICKS_PER_SECOND, last / TICKS_PER_SECOND
