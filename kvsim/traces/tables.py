"""CSV and Parquet columns through polars, with the file, line, field and value in every complaint."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from kvsim.traces.files import check_file, decode_text, fail_missing_column, read_trace_bytes, wrong_format_hint
from kvsim.traces.rows import MAX_REQUEST_TOKENS, MAX_TRACE_BYTES, MAX_TRACE_ROWS, FloatArray, IntArray, Origin, shown

if TYPE_CHECKING:
    import polars as pl

ROW_NUMBER: Final = "kvsim row number"
_NANOSECONDS_PER_SECOND: Final = 1e9
_MAX_HEADER_BYTES: Final = 1024 * 1024


def read_csv_table(origin: Origin, columns: Sequence[str]) -> pl.DataFrame:
    """Named columns of a CSV file as text, blank lines dropped, with each row's line in ROW_NUMBER.

    Raises
    ------
    TraceError
        Unreadable file, missing or repeated column, ragged rows, too many rows.
    """
    import polars as pl

    data = read_trace_bytes(origin)
    _check_header(data, origin, columns)
    if data.count(b"\n") > MAX_TRACE_ROWS + 1:
        origin.fail(f"more than {MAX_TRACE_ROWS} rows; at most {MAX_TRACE_ROWS} are allowed")
    try:
        table = pl.read_csv(data, columns=list(dict.fromkeys(columns)), infer_schema=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        origin.fail(f"not valid CSV: {_first_line(error)}{wrong_format_hint(data, origin)}")
    return table.with_row_index(ROW_NUMBER, offset=2).filter(~pl.all_horizontal(pl.exclude(ROW_NUMBER).is_null()))


def read_parquet_table(origin: Origin, columns: Sequence[str]) -> pl.DataFrame:
    """Named columns of a Parquet file, with each row's number (from 1) in ROW_NUMBER.

    Raises
    ------
    TraceError
        Unreadable file, missing column, too many rows, or more than MAX_TRACE_BYTES in memory.
    """
    import polars as pl

    check_file(origin)
    try:
        lazy = pl.scan_parquet(origin.path, glob=False)
        present = lazy.collect_schema().names()
        for column in columns:
            if column not in present:
                fail_missing_column(column, present, origin)
        rows = int(lazy.select(pl.len()).collect().item())
        if rows > MAX_TRACE_ROWS:
            origin.fail(f"{rows} rows; at most {MAX_TRACE_ROWS} are allowed")
        table = lazy.select(list(dict.fromkeys(columns))).with_row_index(ROW_NUMBER, offset=1).collect()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        origin.fail(f"not valid Parquet: {_first_line(error)}")
    if table.estimated_size() > MAX_TRACE_BYTES:
        origin.fail(f"more than {MAX_TRACE_BYTES} bytes once read; at most {MAX_TRACE_BYTES} are allowed")
    return table


def row_numbers(table: pl.DataFrame) -> IntArray:
    """Each row's number as messages give it; shape (num_rows,)."""
    return table[ROW_NUMBER].to_numpy().astype(np.int64)


def token_counts(table: pl.DataFrame, column: str, origin: Origin, *, least: int = 1) -> IntArray:
    """Whole numbers of a column; shape (num_rows,). Raise TraceError for the first value that is none.

    ``least`` is what a message says; values below it are refused with those of other formats.
    """
    import polars as pl

    values = table[column]
    if not (values.dtype.is_numeric() or values.dtype == pl.String):
        origin.fail(f"holds {values.dtype}; must be whole numbers", field=column)
    numbers = values.cast(pl.Int64, strict=False)
    if numbers.null_count() or values.dtype.is_float():
        parsed = values.cast(pl.Float64, strict=False)
        whole = parsed.is_finite() & (parsed == parsed.floor()) & (parsed.abs() <= MAX_REQUEST_TOKENS)
        numbers = pl.select(pl.when(whole).then(parsed)).to_series().cast(pl.Int64)
    _refuse_nulls(numbers, table, column, origin, f"must be a whole number from {least} to {MAX_REQUEST_TOKENS}")
    return numbers.to_numpy().astype(np.int64)


def seconds_column(table: pl.DataFrame, column: str, origin: Origin) -> FloatArray:
    """Give times in seconds, from numbers or Parquet datetimes; shape (num_rows,). Finiteness is checked later."""
    import polars as pl

    values = table[column]
    if isinstance(values.dtype, pl.Datetime):
        _refuse_nulls(values, table, column, origin, "must be a time")
        since = (values - values.min()).dt.total_nanoseconds()
        return since.to_numpy().astype(np.float64) / _NANOSECONDS_PER_SECOND
    if not (values.dtype.is_numeric() or values.dtype == pl.String):
        origin.fail(f"holds {values.dtype}; must be seconds", field=column)
    seconds = values.cast(pl.Float64, strict=False)
    _refuse_nulls(seconds, table, column, origin, "must be a number of seconds")
    return seconds.to_numpy().astype(np.float64)


def datetime_seconds(table: pl.DataFrame, column: str, origin: Origin) -> FloatArray:
    """Seconds since the earliest of ``2023-11-16 18:15:46.6805900``-like texts (UTC); shape (num_rows,)."""
    text = table[column].str.replace(r"(\+00:00|Z)$", "")
    times = text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="ns", strict=False)
    _refuse_nulls(times, table, column, origin, "must be a UTC time such as 2023-11-16 18:15:46.6805900")
    nanoseconds = times.to_physical()
    since: FloatArray = (nanoseconds - nanoseconds.min()).to_numpy() / _NANOSECONDS_PER_SECOND
    return since


def hash_lists(table: pl.DataFrame, column: str, origin: Origin) -> list[list[int]]:
    """Prefix ids of a Parquet list column, one list per row."""
    import polars as pl

    values = table[column]
    if not (isinstance(values.dtype, pl.List) and values.dtype.inner.is_integer()):
        origin.fail(f"holds {values.dtype}; must be lists of whole numbers", field=column)
    bad = values.is_null() | values.list.eval(pl.element().is_null()).list.any()
    if bad.any():
        _fail_cell(table, column, int(bad.arg_max() or 0), origin, "must be a list of whole numbers")
    lists: list[list[int]] = values.to_list()
    return lists


def class_labels(table: pl.DataFrame, column: str, origin: Origin) -> list[str]:
    """Names of request classes as text, one per row."""
    import polars as pl

    labels = table[column].cast(pl.String, strict=False).str.strip_chars().replace("", None)
    _refuse_nulls(labels, table, column, origin, "must name a class, as text or a number")
    return labels.to_list()


def _check_header(data: bytes, origin: Origin, columns: Sequence[str]) -> None:
    line = data[:_MAX_HEADER_BYTES].split(b"\n", 1)[0]
    hint = wrong_format_hint(data, origin)
    try:
        present = next(csv.reader(io.StringIO(decode_text(line, origin).strip("\r"))), [])
    except csv.Error:
        origin.fail(f"line 1: not a CSV header{hint}")
    for column in columns:
        if column not in present:
            fail_missing_column(column, present, origin, hint=hint)
        if present.count(column) > 1:
            origin.fail(f"column {column!r} appears {present.count(column)} times; it must be there once")


def _refuse_nulls(parsed: pl.Series, table: pl.DataFrame, column: str, origin: Origin, allowed: str) -> None:
    if parsed.null_count():
        _fail_cell(table, column, int(parsed.is_null().arg_max() or 0), origin, allowed)


def _fail_cell(table: pl.DataFrame, column: str, index: int, origin: Origin, allowed: str) -> NoReturn:
    value: Any = table.row(index, named=True)[column]
    problem = "the value is missing" if value is None else f"{shown(value)} is not allowed"
    origin.fail(f"{problem}; {allowed}", row=int(table[ROW_NUMBER][index]), field=column)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
