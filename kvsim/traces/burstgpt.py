"""BurstGPT traces: ``Timestamp`` in seconds, ``Request tokens``, ``Response tokens`` and more (HPMLL/BurstGPT)."""

from __future__ import annotations

from pathlib import Path

from kvsim.traces.rows import Origin, RawRows, TraceRows, check_rows
from kvsim.traces.tables import read_csv_table, row_numbers, seconds_column, token_counts


def read_burstgpt(path: Path) -> TraceRows:
    """Read a BurstGPT CSV; rows with 0 response tokens are failures and are dropped. Raise TraceError."""
    origin = Origin(path, "burstgpt", "line", "Request tokens", "Response tokens", "Timestamp")
    table = read_csv_table(origin, ("Timestamp", "Request tokens", "Response tokens"))
    raw = RawRows(
        numbers=row_numbers(table),
        prompt_tokens=token_counts(table, "Request tokens", origin),
        output_tokens=token_counts(table, "Response tokens", origin),
        arrival_s=seconds_column(table, "Timestamp", origin),
    )
    return check_rows(raw, origin, zero_output_is_failure=True)
