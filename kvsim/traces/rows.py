"""What every trace reader gives: checked columns of arrival times and token counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from kvsim.errors import TraceError
from kvsim.specs.workload import TraceFormat
from kvsim.units import GIBI

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
HashIds = Sequence[Sequence[int]]

MAX_TRACE_BYTES: Final = 2 * GIBI
"""Largest trace, counted after decompression."""
MAX_TRACE_ROWS: Final = 20_000_000
MAX_REQUEST_TOKENS: Final = 2**31
"""Most prompt or output tokens of one request."""
MAX_SHOWN_CHARACTERS: Final = 40


@dataclass(frozen=True, eq=False)
class TraceRows:
    """Requests of a trace in order of arrival; arrays have shape (num_requests,)."""

    source: str
    """File name and format."""
    prompt_tokens: IntArray
    output_tokens: IntArray
    arrival_s: FloatArray | None = None
    """Seconds since the first request, ascending; None where the file has no times."""
    prefix_hashes: tuple[tuple[int, ...], ...] | None = None
    """Per request, the file's ids of the leading prompt chunks; the last id may stand for a partly filled chunk."""
    hash_block_tokens: int = 512
    classes: tuple[str, ...] | None = None
    """Per request, the name of its class."""
    priority: IntArray | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_tokens)


@dataclass(frozen=True)
class Origin:
    """Where rows come from, for messages."""

    path: Path
    format: TraceFormat
    place: str = "line"
    """What a row's number counts: ``line`` or ``entry``."""
    prompt_field: str = "prompt_tokens"
    output_field: str = "output_tokens"
    time_field: str = "timestamp"

    def fail(self, problem: str, *, row: int | None = None, field: str | None = None) -> NoReturn:
        """Raise a TraceError for ``problem``, naming file, row and field, without an earlier error's traceback."""
        parts = [str(self.path)]
        if row is not None:
            parts.append(f"{self.place} {row}")
        if field is not None:
            parts.append(field)
        raise TraceError(": ".join([*parts, problem])) from None


@dataclass(frozen=True, eq=False)
class RawRows:
    """Columns as read, in file order, before any check; arrays have shape (num_rows,)."""

    numbers: IntArray
    """The number that messages give each row."""
    prompt_tokens: IntArray
    output_tokens: IntArray
    arrival_s: FloatArray | None = None
    hash_ids: HashIds | None = None
    hash_block_tokens: int = 512
    classes: Sequence[str] | None = None
    priority: IntArray | None = None

    def take(self, rows: IntArray) -> RawRows:
        """Rows at the given indices, in that order."""
        return RawRows(
            numbers=self.numbers[rows],
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            arrival_s=None if self.arrival_s is None else self.arrival_s[rows],
            hash_ids=None if self.hash_ids is None else [self.hash_ids[row] for row in rows.tolist()],
            hash_block_tokens=self.hash_block_tokens,
            classes=None if self.classes is None else [self.classes[row] for row in rows.tolist()],
            priority=None if self.priority is None else self.priority[rows],
        )


def shown(value: Any) -> str:
    """Show a value of the file in a message, cut short and free of control characters."""
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def check_rows(raw: RawRows, origin: Origin, *, zero_output_is_failure: bool, notes: Sequence[str] = ()) -> TraceRows:
    """Drop failed requests where the format has them, check every value, and sort by arrival.

    Raises
    ------
    TraceError
        No rows, a count outside 1..MAX_REQUEST_TOKENS, a time that is not finite, or more hash ids than chunks.
    """
    found = list(notes)
    if len(raw.numbers) > MAX_TRACE_ROWS:
        origin.fail(f"{len(raw.numbers)} rows; at most {MAX_TRACE_ROWS} are allowed")
    if zero_output_is_failure and (failed := int(np.count_nonzero(raw.output_tokens == 0))):
        raw = raw.take(np.flatnonzero(raw.output_tokens != 0))
        found.append(f"{failed} rows with 0 output tokens dropped (failed requests)")
    if len(raw.numbers) == 0:
        origin.fail("no requests in it; at least one row with prompt and output tokens is needed")
    _check_counts(raw, raw.prompt_tokens, origin, origin.prompt_field)
    _check_counts(raw, raw.output_tokens, origin, origin.output_field)
    _check_hash_ids(raw, origin)
    if raw.priority is not None:
        _check_counts(raw, raw.priority, origin, "priority", least=0)
    raw, note = _sorted_by_arrival(raw, origin)
    return TraceRows(
        source=f"{origin.path.name} ({origin.format})",
        prompt_tokens=raw.prompt_tokens,
        output_tokens=raw.output_tokens,
        arrival_s=_since_first(raw.arrival_s, origin),
        prefix_hashes=None if raw.hash_ids is None else tuple(tuple(ids) for ids in raw.hash_ids),
        hash_block_tokens=raw.hash_block_tokens,
        classes=None if raw.classes is None else tuple(raw.classes),
        priority=raw.priority,
        notes=(*found, *note),
    )


def _check_counts(raw: RawRows, counts: IntArray, origin: Origin, field: str, *, least: int = 1) -> None:
    bad = np.flatnonzero((counts < least) | (counts > MAX_REQUEST_TOKENS))
    if len(bad):
        problem = f"{counts[bad[0]]} is not allowed; must be a whole number from {least} to {MAX_REQUEST_TOKENS}"
        origin.fail(problem, row=int(raw.numbers[bad[0]]), field=field)


def _check_hash_ids(raw: RawRows, origin: Origin) -> None:
    if raw.hash_ids is None:
        return
    chunks = -(-raw.prompt_tokens // raw.hash_block_tokens)
    lengths = np.fromiter((len(ids) for ids in raw.hash_ids), dtype=np.int64, count=len(raw.hash_ids))
    bad = np.flatnonzero(lengths > chunks)
    if len(bad):
        row = bad[0]
        problem = (
            f"{lengths[row]} ids, but {raw.prompt_tokens[row]} prompt tokens make at most {chunks[row]} chunks "
            f"of {raw.hash_block_tokens} tokens"
        )
        origin.fail(problem, row=int(raw.numbers[row]), field="hash ids")


def _sorted_by_arrival(raw: RawRows, origin: Origin) -> tuple[RawRows, tuple[str, ...]]:
    if raw.arrival_s is None:
        return raw, ()
    bad = np.flatnonzero(~np.isfinite(raw.arrival_s))
    if len(bad):
        problem = f"{raw.arrival_s[bad[0]]} is not allowed; must be a finite time"
        origin.fail(problem, row=int(raw.numbers[bad[0]]), field=origin.time_field)
    falling = int(np.count_nonzero(raw.arrival_s[1:] < raw.arrival_s[:-1]))
    if not falling:
        return raw, ()
    order = np.argsort(raw.arrival_s, kind="stable")
    return raw.take(order), (f"rows sorted by {origin.time_field}: it went back {falling} times in the file",)


def _since_first(arrival_s: FloatArray | None, origin: Origin) -> FloatArray | None:
    if arrival_s is None:
        return None
    with np.errstate(over="ignore"):
        since: FloatArray = arrival_s - arrival_s[0]
    if not np.isfinite(since[-1]):
        origin.fail("the times span more than a number can hold", field=origin.time_field)
    return since
