"""Published tables, or kvsim's own rows, by the path that a user names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from kvsim.calibration.facts import device_facts
from kvsim.calibration.quarantine import quarantine
from kvsim.calibration.timings import SHAPE_COLUMNS, Timings
from kvsim.device_catalog import load_device
from kvsim.errors import CalibrationError, UnknownName

FORMATS: Final = ("kvsim", "aiconfigurator", "llmservingsim", "infersim", "vidur")
"""Whose tables can be read; kvsim's are what ``kvsim calibrate`` measured."""
INSTALLED: Final = "aiconfigurator"
"""In a path's place: the tables of the installed package aiconfigurator-core."""


@dataclass(frozen=True)
class _Reader:
    find_tables: Callable[[Path], Iterator[Path] | Sequence[Path]]
    read: Callable[[Path, Collection[str] | None, Collection[str] | None], list[Timings]]


def read_tables(
    path: Path,
    table_format: str | None = None,
    devices: Collection[str] | None = None,
    operations: Collection[str] | None = None,
) -> list[Timings]:
    """Read every table under a path and take out rows that cannot be true; both are counted in ``excluded``.

    Parameters
    ----------
    path : Path
        A folder or file of any of FORMATS, or INSTALLED.
    table_format : str, optional
        One of FORMATS; all that are found where None.
    devices : collection of str, optional
        Names in hardware_specs; all where None.
    operations : collection of str, optional
        Keys of SHAPE_COLUMNS; all where None.

    Raises
    ------
    UnknownName
        A format, an operation, or a device in a table, is not known.
    InvalidSpec
        A table cannot be read, lacks a column or holds a value that is not allowed.
    CalibrationError
        There is no table, or the times in one are in another unit than it states.
    """
    for name in operations or ():
        if name not in SHAPE_COLUMNS:
            raise UnknownName(kind="operation", name=name, known=SHAPE_COLUMNS, where="--ops")
    if table_format is not None and table_format not in FORMATS:
        raise UnknownName(kind="format", name=table_format, known=FORMATS, where="--format")
    if str(path) == INSTALLED and not path.exists():
        from kvsim.calibration.sources.aiconfigurator import installed_folder

        path, table_format = installed_folder(), "aiconfigurator"
    readers = [_reader(table_format)] if table_format is not None else list(_readers_of(path))
    found = [one for reader in readers for one in reader.read(path, devices, operations)]
    return [trusted(one) for timings in found for one in _of_devices(timings, devices)]


def trusted(timings: Timings) -> Timings:
    """Take out rows that are known or shown to be wrong."""
    if timings.frame.is_empty():
        return timings
    return quarantine(timings, device_facts(load_device(timings.frame["device"][0]).spec))


def _readers_of(path: Path) -> Iterator[_Reader]:
    """Readers that find tables of theirs under a path.

    Raises
    ------
    CalibrationError
        None does.
    """
    if not path.exists():
        msg = f"{path}: no such file or folder"
        raise CalibrationError(msg)
    readers = [reader for reader in map(_reader, FORMATS) if next(iter(reader.find_tables(path)), None) is not None]
    if not readers:
        msg = (
            f"{path}: holds no table that is known: rows.csv of kvsim calibrate, Parquet tables of aiconfigurator, a "
            "profile of LLMServingSim or Vidur, or InferSim's CSV files"
        )
        raise CalibrationError(msg)
    yield from readers


def _reader(table_format: str) -> _Reader:
    from kvsim.calibration.sources import aiconfigurator, infersim, kvsim_rows, llmservingsim, vidur

    module = {
        "kvsim": kvsim_rows,
        "aiconfigurator": aiconfigurator,
        "llmservingsim": llmservingsim,
        "infersim": infersim,
        "vidur": vidur,
    }[table_format]
    return _Reader(module.find_tables, module.read)


def _of_devices(timings: Timings, devices: Collection[str] | None) -> Iterator[Timings]:
    if devices is None or timings.frame.is_empty():
        yield timings
        return
    kept = timings.frame.filter(timings.frame["device"].is_in(list(devices)))
    if len(kept):
        yield replace(timings, frame=kept)
