"""Opening trace files: size caps, gzip, text and JSON, each failure told as a TraceError."""

from __future__ import annotations

import difflib
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from kvsim.traces.rows import MAX_REQUEST_TOKENS, MAX_TRACE_BYTES, MAX_TRACE_ROWS, Origin, shown

_GZIP_MAGIC: Final = b"\x1f\x8b"
_PARQUET_MAGIC: Final = b"PAR1"
_HEAD_BYTES: Final = 64 * 1024
_CHUNK_BYTES: Final = 16 * 1024 * 1024
_SIGNS: Final = (
    (b"hash_ids", "mooncake"),
    (b"input_lens", "vllm_bench"),
    (b"ContextTokens", "azure"),
    (b"Response tokens", "burstgpt"),
    (b"conversations", "sharegpt"),
)
"""Words that give a format away."""


def check_file(origin: Origin) -> None:
    """Raise TraceError unless the path is a regular, non-empty file within MAX_TRACE_BYTES."""
    path = origin.path
    try:
        if not path.exists():
            origin.fail(f"no such file{_near_names(path)}")
        if not path.is_file():
            origin.fail("not a file")
        size_bytes = path.stat().st_size
    except (OSError, ValueError) as error:
        origin.fail(f"cannot read: {_reason(error)}")
    if size_bytes == 0:
        origin.fail("the file is empty")
    if size_bytes > MAX_TRACE_BYTES:
        origin.fail(f"{size_bytes} bytes; at most {MAX_TRACE_BYTES} are allowed")


def read_trace_bytes(origin: Origin) -> bytes:
    """Whole content of a text trace, gunzipped where it is gzip; raise TraceError for anything else binary."""
    check_file(origin)
    try:
        with origin.path.open("rb") as stream:
            packed = stream.read(2) == _GZIP_MAGIC
        if packed:
            with gzip.open(origin.path, "rb") as unpacked:
                data = _read_capped(unpacked, origin)
        else:
            with origin.path.open("rb") as stream:
                data = _read_capped(stream, origin)
    except (EOFError, zlib.error):
        origin.fail("the gzip stream is damaged or cut short; fetch the file again")
    except OSError as error:
        origin.fail(f"cannot read: {_reason(error)}")
    if not data.strip():
        origin.fail("the file is empty")
    if data.startswith(_PARQUET_MAGIC):
        origin.fail(f"this is Parquet, not {origin.format}; use format: columns with a name ending in .parquet")
    if b"\0" in data[:_HEAD_BYTES]:
        origin.fail(f"this is a binary file, not {origin.format} text")
    return data


def wrong_format_hint(data: bytes, origin: Origin) -> str:
    """``; it looks like mooncake: ...`` where the file's head gives another format away, else an empty string."""
    head = data[:_HEAD_BYTES]
    for sign, name in _SIGNS:
        if sign in head and name != origin.format:
            return f"; it looks like {name}: set format: {name}"
    return ""


def decode_text(data: bytes, origin: Origin) -> str:
    """UTF-8 text, byte order mark removed; raise TraceError naming the line that is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        origin.fail(f"line {line}: not UTF-8 text (byte {error.start})")


def json_lines(data: bytes, origin: Origin) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of each line that is not blank; raise TraceError for a line that is no object."""
    if data.count(b"\n") > MAX_TRACE_ROWS:
        origin.fail(f"more than {MAX_TRACE_ROWS} lines; at most {MAX_TRACE_ROWS} are allowed")
    for number, line in enumerate(decode_text(data, origin).split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_json(line, origin, row=number, hint=wrong_format_hint(data, origin) if number == 1 else "")
        if not isinstance(row, dict):
            origin.fail(f"{shown(row)} is not a JSON object{wrong_format_hint(data, origin)}", row=number)
        yield number, row


def parse_json(text: str, origin: Origin, *, row: int | None = None, hint: str = "") -> Any:
    """Parse one JSON value; raise TraceError with the position of the fault."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if row is not None else f"line {error.lineno}, column {error.colno}"
        origin.fail(f"not valid JSON at {where}: {error.msg}{hint}", row=row)
    except RecursionError:
        origin.fail("JSON nested too deeply", row=row)
    except ValueError:
        origin.fail("not valid JSON: a number with too many digits", row=row)


def whole_number(row: Mapping[str, Any], field: str, origin: Origin, number: int, *, least: int = 1) -> int:
    """Token count ``row[field]``; raise TraceError where it is missing or no whole number within the cap.

    A 0 passes here whatever ``least`` says: some formats mark failed requests by it.
    """
    value = _required(row, field, origin, number)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -1 < value <= MAX_REQUEST_TOKENS:
        problem = f"{shown(value)} is not allowed; must be a whole number from {least} to {MAX_REQUEST_TOKENS}"
        origin.fail(problem, row=number, field=field)
    return value


def finite_number(row: Mapping[str, Any], field: str, origin: Origin, number: int) -> float:
    """Time ``row[field]``; raise TraceError where it is missing or no finite number."""
    value = _required(row, field, origin, number)
    try:
        seconds = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        origin.fail(f"{shown(value)} is not allowed; must be a finite number", row=number, field=field)
    return seconds


def hash_id_list(row: Mapping[str, Any], field: str, origin: Origin, number: int) -> list[int]:
    """Prefix ids ``row[field]``; raise TraceError unless it is a list of whole numbers."""
    ids = _required(row, field, origin, number)
    if not isinstance(ids, list) or not all(type(item) is int for item in ids):
        origin.fail(f"{shown(ids)} is not allowed; must be a list of whole numbers", row=number, field=field)
    return ids


def class_label(row: Mapping[str, Any], field: str, origin: Origin, number: int) -> str:
    """Name of a request's class ``row[field]``; raise TraceError unless it is text or a number."""
    label = _required(row, field, origin, number)
    if isinstance(label, bool) or not isinstance(label, (str, int, float)) or not str(label).strip():
        origin.fail(f"{shown(label)} is not allowed; must name a class, as text or a number", row=number, field=field)
    return str(label).strip()


def fail_missing_column(
    field: str, present: Sequence[str], origin: Origin, *, row: int | None = None, hint: str = ""
) -> NoReturn:
    """Raise TraceError for a column that is not there, with the nearest names."""
    near = difflib.get_close_matches(field.lower(), {name.lower() for name in present}, n=2, cutoff=0.5)
    names = [name for name in present if name.lower() in near]
    if names:
        advice = "did you mean " + " or ".join(shown(name) for name in names) + "?"
    else:
        advice = "found: " + (", ".join(shown(name) for name in present[:8]) or "no columns")
    origin.fail(f"column {field!r} is missing; {advice}{hint}", row=row)


def _required(row: Mapping[str, Any], field: str, origin: Origin, number: int) -> Any:
    if field not in row:
        fail_missing_column(field, [str(name) for name in row], origin, row=number)
    return row[field]


def _read_capped(stream: Any, origin: Origin) -> bytes:
    chunks = []
    total_bytes = 0
    while chunk := stream.read(_CHUNK_BYTES):
        total_bytes += len(chunk)
        if total_bytes > MAX_TRACE_BYTES:
            origin.fail(f"more than {MAX_TRACE_BYTES} bytes once read; at most {MAX_TRACE_BYTES} are allowed")
        chunks.append(chunk)
    return b"".join(chunks)


def _near_names(path: Path) -> str:
    try:
        siblings = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, siblings, n=2)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
