"""Rows as they are written: CSV files that grow line by line and survive an interruption."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_WHERE = (
    "device",
    "basis",
    "gpu",
    "gpu_uuid",
    "driver",
    "torch",
    "triton",
    "python",
    "target",
    "source_sha256",
)
_WHAT = ("variant", "operation", "kv_format", "form", "case", "role", "shape", "config", "num_splits")
_SENSORS = ("sm_clock_mhz", "sm_clock_min_mhz", "memory_clock_mhz", "power_w", "temperature_c", "throttle_reasons")

ROW_COLUMNS = (
    *_WHERE,
    *_WHAT,
    "method",
    "part",
    "read_bytes",
    "written_bytes",
    "flops",
    "units",
    "cost_unit",
    "median_s",
    "p10_s",
    "p90_s",
    "host_s",
    "rounds",
    "runs",
    "spread",
    *_SENSORS,
    "flags",
    "taken_unix_s",
)
REJECTED_COLUMNS = (*ROW_COLUMNS, "reason")
CORRECTNESS_COLUMNS = (
    *_WHERE,
    "variant",
    "case",
    "config",
    "seed",
    "status",
    "result",
    "comparison",
    "error",
    "tolerance",
    "message",
    "taken_unix_s",
)
POWER_COLUMNS = (*_WHERE, *_WHAT, "seconds", "runs", "mean_power_w", "energy_j", "idle_power_w", *_SENSORS)

FILES: Mapping[str, Sequence[str]] = {
    "rows.csv": ROW_COLUMNS,
    "rejected.csv": REJECTED_COLUMNS,
    "correctness.csv": CORRECTNESS_COLUMNS,
    "power.csv": POWER_COLUMNS,
}
"""What each file of an output folder holds."""


class ForeignFile(Exception):
    """A file has other columns than this version writes."""


def append(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to one of `FILES` in one write, so that several processes may append at once.

    A line that an interruption cut short is ended first. Texts must hold no line breaks (`one_line`).

    Raises
    ------
    ForeignFile
        If the file has other columns.
    """
    columns, path = FILES[name], folder / name
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not path.exists() or not path.stat().st_size:
        writer.writeheader()
    else:
        _check_header(path, columns)
        if not _ends_a_line(path):
            text.write("\n")
    writer.writerows({column: row.get(column, "") for column in columns} for row in rows)
    with path.open("ab") as stream:
        stream.write(text.getvalue().encode())


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, io.SEEK_END)
        return stream.read() == b"\n"


def read(folder: Path, name: str) -> list[dict[str, str]]:
    """Read one of `FILES`; give no rows where there is no file. Lines that were cut short are left out.

    Raises
    ------
    ForeignFile
        If the file has other columns.
    """
    columns, path = FILES[name], folder / name
    if not path.exists() or not path.stat().st_size:
        return []
    _check_header(path, columns)
    with path.open(newline="", encoding="utf-8") as stream:
        return [row for row in csv.DictReader(stream) if None not in row and None not in row.values()]


def _check_header(path: Path, columns: Sequence[str]) -> None:
    with path.open(newline="", encoding="utf-8") as stream:
        header = next(csv.reader(stream), [])
    if tuple(header) != tuple(columns):
        raise ForeignFile(f"{path} was written by another version of this script: choose another --out")


def one_line(text: object) -> str:
    """Give a message without line breaks."""
    return " ".join(str(text).split())


def config_text(config: Any) -> str:
    """Give a configuration as text, such as ``block_n=64 num_warps=4 num_stages=3``."""
    return " ".join(f"{name}={value}" for name, value in asdict(config).items())


def shape_of(case: Any) -> dict[str, Any]:
    """Give a case's fields as JSON can hold them; a run of one value as ``{"value": v, "count": n}``."""
    fields = asdict(case) if is_dataclass(case) and not isinstance(case, type) else {"name": case.name}
    return {name: _short(value) for name, value in fields.items() if name not in {"name", "role"}}


def _short(value: Any) -> Any:
    if isinstance(value, (tuple, list)) and len(value) > 1 and len(set(map(repr, value))) == 1:
        return {"value": value[0], "count": len(value)}
    return value


def identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What makes a timing the same timing: measured again, it would add nothing."""
    return tuple(str(row[name]) for name in ("variant", "case", "config", "source_sha256", "gpu"))
