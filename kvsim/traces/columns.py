"""Plain CSV, JSON lines and Parquet traces whose columns the user names."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kvsim.specs.workload import TraceColumns
from kvsim.traces.files import json_lines, read_trace_bytes
from kvsim.traces.json_rows import JsonFields, read_json_rows
from kvsim.traces.rows import Origin, RawRows, TraceRows, check_rows
from kvsim.traces.tables import (
    class_labels,
    hash_lists,
    read_csv_table,
    read_parquet_table,
    row_numbers,
    seconds_column,
    token_counts,
)

_ENDINGS: Final = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def read_columns(path: Path, columns: TraceColumns) -> TraceRows:
    """Read a table by its file name's ending (``.csv``, ``.jsonl``, ``.ndjson``, also with ``.gz``; ``.parquet``).

    Raises
    ------
    TraceError
        Another ending, a missing column, or a value that is not allowed.
    """
    kind = _ENDINGS.get(Path(path.name.lower().removesuffix(".gz")).suffix)
    origin = Origin(
        path,
        "columns",
        "row" if kind == "parquet" else "line",
        columns.prompt_tokens_column,
        columns.output_tokens_column,
        columns.timestamp_column or "timestamp",
    )
    if kind is None:
        origin.fail(f"the name's ending must be one of {', '.join(_ENDINGS)} (text also with .gz)")
    raw = _read_json(origin, columns) if kind == "jsonl" else _read_table(origin, columns, kind)
    return check_rows(raw, origin, zero_output_is_failure=False)


def _read_json(origin: Origin, columns: TraceColumns) -> RawRows:
    fields = JsonFields(
        columns.prompt_tokens_column,
        columns.output_tokens_column,
        columns.timestamp_column,
        columns.hash_ids_column,
        columns.hash_id_block_size,
        columns.priority_column,
        columns.class_column,
    )
    return read_json_rows(json_lines(read_trace_bytes(origin), origin), fields, origin)


def _read_table(origin: Origin, columns: TraceColumns, kind: str) -> RawRows:
    times, hashes = columns.timestamp_column, columns.hash_ids_column
    if kind == "csv" and hashes is not None:
        origin.fail("a CSV cannot hold hash ids; use JSON lines or Parquet", field=hashes)
    wanted = [columns.prompt_tokens_column, columns.output_tokens_column]
    named = (times, hashes, columns.priority_column, columns.class_column)
    wanted += [name for name in named if name is not None]
    table = (read_csv_table if kind == "csv" else read_parquet_table)(origin, wanted)
    return RawRows(
        numbers=row_numbers(table),
        prompt_tokens=token_counts(table, columns.prompt_tokens_column, origin),
        output_tokens=token_counts(table, columns.output_tokens_column, origin),
        arrival_s=None if times is None else seconds_column(table, times, origin),
        hash_ids=None if hashes is None else hash_lists(table, hashes, origin),
        hash_block_tokens=columns.hash_id_block_size,
        classes=None if columns.class_column is None else class_labels(table, columns.class_column, origin),
        priority=None
        if columns.priority_column is None
        else token_counts(table, columns.priority_column, origin, least=0),
    )
