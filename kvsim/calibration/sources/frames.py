"""What all readers share: tables checked on the way in, and rows brought into one shape on the way out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from kvsim.calibration.device_names import resolve_device
from kvsim.calibration.quarantine import exclude, exclude_bad_rows
from kvsim.calibration.timings import KEY_COLUMNS, SHAPE_COLUMNS, Excluded, Origin, Timings
from kvsim.errors import CalibrationError, InvalidSpec

MS = 1e-3
US = 1e-6
LARGEST_EXACT = 2.0**53
"""Whole numbers beyond this are not exact as floats."""
MAX_NAMED = 8
"""Values that a message names before it only counts."""


def read_parquet(path: Path) -> pl.DataFrame:
    """Read a table; raise InvalidSpec where it is no Parquet file."""
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        msg = f"{path}: cannot be read as Parquet: {one_line(error)}"
        raise InvalidSpec(msg) from error


def read_csv(path: Path, *, texts: Sequence[str] = ()) -> pl.DataFrame:
    """Read a CSV file (also ``.gz``); `texts` are columns to read as text whatever they hold.

    Raises
    ------
    InvalidSpec
        The file cannot be read as CSV.
    """
    try:
        overrides = {name: pl.String() for name in texts}
        return pl.read_csv(path, infer_schema_length=None, schema_overrides=overrides)
    except (pl.exceptions.PolarsError, OSError) as error:
        msg = f"{path}: cannot be read as CSV: {one_line(error)}"
        raise InvalidSpec(msg) from error


def one_line(error: object) -> str:
    """Give the first line of a message."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def check_columns(
    frame: pl.DataFrame, path: Path, *, integers: Sequence[str] = (), numbers: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> pl.DataFrame:  # fmt: skip
    """Check that columns are there and of the right kind; whole numbers stored as floats become integers.

    Raises
    ------
    InvalidSpec
        A column is missing or holds something else, with what it holds and what is allowed.
    """
    wanted = (*integers, *numbers, *texts)
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        needs, has = ", ".join(wanted), _listed(frame.columns)
        msg = f"{path}: column {missing[0]!r} is missing; this table needs {needs} (got {has})"
        raise InvalidSpec(msg)
    # A column of nothing but nulls has no kind; its rows are left out as missing values later.
    empty = [name for name in wanted if frame.schema[name] == pl.Null]
    frame = frame.with_columns(pl.col(name).cast(pl.String if name in texts else pl.Float64) for name in empty)
    for name in (*integers, *numbers):
        if not frame.schema[name].is_numeric():
            example = (frame[name].drop_nulls().head(1).to_list() or [None])[0]
            msg = f"{path}: column {name!r}: numbers are needed (got {frame.schema[name]}, such as {example!r})"
            raise InvalidSpec(msg)
    for name in texts:
        if frame.schema[name] not in (pl.String, pl.Categorical):
            msg = f"{path}: column {name!r}: text is needed (got {frame.schema[name]})"
            raise InvalidSpec(msg)
    return frame.with_columns(_whole(frame, name, path) for name in integers)


def _whole(frame: pl.DataFrame, name: str, path: Path) -> pl.Series:
    column = frame[name]
    if column.dtype.is_integer():
        return column.cast(pl.Int64, strict=False)
    known = column.filter(column.is_not_null() & column.is_finite())
    broken = known.filter((known != known.round()) | (known.abs() > LARGEST_EXACT))
    if len(broken):
        msg = f"{path}: column {name!r}: whole numbers are needed (got {broken[0]})"
        raise InvalidSpec(msg)
    return column.set(~column.is_finite(), None).cast(pl.Int64)


def rename_values(frame: pl.DataFrame, name: str, names: Mapping[str, str], path: Path) -> pl.Series:
    """Put our names in place of a tool's; raise InvalidSpec for a value that has none."""
    known = {value for value in frame[name].unique().to_list() if value is not None}
    unknown = sorted(known - set(names))
    if unknown:
        msg = f"{path}: column {name!r}: {unknown[0]!r} is not allowed; allowed: {_listed(sorted(names))}"
        raise InvalidSpec(msg)
    return frame[name].cast(pl.String).replace(names)


def rename_devices(frame: pl.DataFrame, name: str, path: Path) -> pl.Series:
    """Put our device names in place of a tool's."""
    where = f"{path}: column {name!r}"
    names = {value: resolve_device(value, where) for value in frame[name].unique().to_list() if value is not None}
    return frame[name].cast(pl.String).replace(names)


def _listed(values: Sequence[str]) -> str:
    shown = ", ".join(values[:MAX_NAMED])
    return f"{shown}, … ({len(values)} in all)" if len(values) > MAX_NAMED else shown


def file_origin(path: Path, root: Path, origin: str, licence: str) -> Origin:
    """Name a file by its place under `root` and its content."""
    place = path.relative_to(root) if path != root and path.is_relative_to(root) else Path(path.name)
    return Origin(place.as_posix(), hashlib.sha256(path.read_bytes()).hexdigest(), origin, licence)


def build_timings(
    operation: str, frame: pl.DataFrame, excluded: Sequence[Excluded] = (), origins: Sequence[Origin] = ()
) -> list[Timings]:
    """Make Timings of raw rows, one per device: bad rows are excluded, repeats become their median.

    `frame` has KEY_COLUMNS, the operation's SHAPE_COLUMNS and ``seconds``.
    """
    kept, bad = exclude_bad_rows(frame, operation)
    reduced = _medians(kept, operation)
    if reduced.is_empty():
        # Nothing is left to stand for a device, but what was left out still counts.
        return [Timings(operation, reduced, (*excluded, *bad), tuple(origins))] if excluded or bad else []
    return [
        Timings(operation, part, (*excluded, *bad), tuple(origins))
        for part in reduced.partition_by("device", maintain_order=True)
    ]


def empty_frame(operation: str) -> pl.DataFrame:
    """Give a frame of the right columns without rows."""
    names = {name: pl.String() for name in KEY_COLUMNS} | {name: pl.Int64() for name in SHAPE_COLUMNS[operation]}
    return pl.DataFrame(schema=names | {"seconds": pl.Float64()})


def _medians(frame: pl.DataFrame, operation: str) -> pl.DataFrame:
    shape = [*KEY_COLUMNS, *SHAPE_COLUMNS[operation]]
    whole = frame.select(
        pl.col(KEY_COLUMNS).cast(pl.String), pl.col(SHAPE_COLUMNS[operation]).cast(pl.Int64), "seconds"
    )
    return whole.group_by(shape).agg(pl.col("seconds").cast(pl.Float64).median()).sort(shape)


def merge(parts: Sequence[Timings]) -> list[Timings]:
    """Join Timings that share a key (tools keep copies of a table under several versions); sorted by device."""
    joined: list[Timings] = []
    for part in parts:
        keys = _keys(part)
        same = [one for one in joined if one.operation == part.operation and keys & _keys(one)]
        joined = [one for one in joined if not any(one is other for other in same)]
        joined.append(_union([*same, part]) if same else part)
    return sorted(joined, key=_order)


def _keys(timings: Timings) -> set[tuple[str, ...]]:
    return set(timings.frame.select(KEY_COLUMNS).unique().rows())


def _union(parts: Sequence[Timings]) -> Timings:
    frame = _medians(pl.concat(part.frame for part in parts), parts[0].operation)
    excluded = tuple(one for part in parts for one in part.excluded)
    origins = tuple(dict.fromkeys(one for part in parts for one in part.origins))
    return replace(parts[0], frame=frame, excluded=excluded, origins=origins)


def _order(timings: Timings) -> tuple[str, ...]:
    first = timings.frame.select(KEY_COLUMNS).head(1).rows()
    return (first[0][0] if first else "", timings.operation, *(first[0] if first else ()))


def keep(
    frame: pl.DataFrame, condition: pl.Expr, reason: str, excluded: list[Excluded], columns: Sequence[str]
) -> pl.DataFrame:
    """Keep rows that meet a condition; add the others to `excluded` by name."""
    kept, out = exclude(frame, ~condition, reason, columns)
    excluded.extend(out)
    return kept


def nothing_found(folder: Path, what: str) -> CalibrationError:
    """Make the error for a folder without a table of a tool."""
    if not folder.exists():
        return CalibrationError(f"{folder}: no such file or folder")
    return CalibrationError(f"{folder}: {'is' if folder.is_file() else 'holds'} no {what}")
