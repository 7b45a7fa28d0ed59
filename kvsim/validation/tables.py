"""CSV tables of measurements: read whole, columns checked, cells as text until a suite knows what they mean."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from kvsim.errors import InvalidSpec

MAX_TABLE_BYTES = 64 * 2**20
Row = dict[str, str]


def read_rows(path: Path, needed: Sequence[str]) -> list[Row]:
    """Read a CSV file.

    Raises
    ------
    InvalidSpec
        It cannot be read, is empty, or lacks one of the `needed` columns.
    """
    header, rows = _read(path)
    missing = [name for name in needed if name not in header]
    if missing:
        wanted, found = ", ".join(needed), ", ".join(header[:12])
        msg = f"{path}: column {missing[0]!r} is missing; this table needs {wanted} (got {found})"
        raise InvalidSpec(msg)
    if not rows:
        msg = f"{path}: the table has no rows"
        raise InvalidSpec(msg)
    return rows


def header_of(path: Path) -> list[str]:
    """Column names of a CSV file; raises InvalidSpec as `read_rows`."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[str], list[Row]]:
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            msg = f"{path}: larger than the {MAX_TABLE_BYTES} bytes allowed for a table"
            raise InvalidSpec(msg)
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        msg = f"{path}: cannot read: {error.strerror}"
        raise InvalidSpec(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 text (byte {error.start})"
        raise InvalidSpec(msg) from error
    if not text.strip():
        msg = f"{path}: the file is empty"
        raise InvalidSpec(msg)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = [{name: value or "" for name, value in row.items() if name is not None} for row in reader]
    except csv.Error as error:
        msg = f"{path}: not CSV: {error}"
        raise InvalidSpec(msg) from error
    return [name.strip() for name in reader.fieldnames or ()], rows


def number(row: Row, name: str) -> float | None:
    """Positive number of a cell, None where it is empty, no number, zero or negative."""
    try:
        value = float(row.get(name, ""))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def whole(row: Row, name: str, default: int | None = None) -> int | None:
    """Whole number of a cell, `default` where it is empty or none."""
    value = row.get(name, "").strip()
    try:
        return int(float(value)) if value else default
    except ValueError:
        return default
