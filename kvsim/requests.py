"""A workload made concrete: the requests that every strategy of a comparison sees alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RequestTable:
    """One row per request, sorted by arrival.

    Shapes: all arrays are (num_requests,). ``arrival_ticks`` are picoseconds from the run's start; a request with
    ``arrival_ticks == UNSCHEDULED`` arrives when ``parent`` ends, ``delay_ticks`` later (closed loop, next turn).
    """

    arrival_ticks: IntArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    delay_ticks: IntArray
    parent: IntArray
    """Index of the request whose completion releases this one, or -1."""
    prefix_hashes: tuple[tuple[int, ...], ...] | None = None
    """Per request: hashes of its leading prompt chunks of ``hash_block_tokens`` tokens, or None for unhashed."""
    output_hashes: tuple[tuple[int, ...], ...] | None = None
    """Per request: hashes of the chunks after ``prefix_hashes`` whose KV its answer completes (the last output token
    has none yet), so that a next turn can hit them; None where unknown."""
    hash_block_tokens: int = 16
    priority: IntArray | None = None
    """Per request, lower is served first (vLLM's meaning); None where all are equal."""
    request_class: IntArray | None = None
    """Per request, index into ``class_names``; None where the workload has no classes."""
    class_names: tuple[str, ...] = ()
    source: str = ""
    """Provenance: file and format, or the distributions and seed."""
    notes: tuple[str, ...] = field(default=())
    """What a reader should know, such as rows dropped and why."""

    def __len__(self) -> int:
        return len(self.arrival_ticks)


UNSCHEDULED = -1
