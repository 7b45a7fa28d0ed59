"""Azure LLM inference traces: ``TIMESTAMP,ContextTokens,GeneratedTokens`` (Azure/AzurePublicDataset, CC-BY-4.0)."""

from __future__ import annotations

from pathlib import Path

from kvsim.traces.rows import Origin, RawRows, TraceRows, check_rows
from kvsim.traces.tables import datetime_seconds, read_csv_table, row_numbers, token_counts


def read_azure(path: Path) -> TraceRows:
    """Read an Azure CSV; times have up to nine fractional digits and no zone. Raise TraceError."""
    origin = Origin(path, "azure", "line", "ContextTokens", "GeneratedTokens", "TIMESTAMP")
    table = read_csv_table(origin, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
    raw = RawRows(
        numbers=row_numbers(table),
        prompt_tokens=token_counts(table, "ContextTokens", origin),
        output_tokens=token_counts(table, "GeneratedTokens", origin),
        arrival_s=datetime_seconds(table, "TIMESTAMP", origin),
    )
    return check_rows(raw, origin, zero_output_is_failure=True)
