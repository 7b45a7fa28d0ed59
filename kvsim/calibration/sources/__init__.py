"""Readers: one per tool that takes timings, each into `kvsim.calibration.timings.Timings`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Final

from kvsim.calibration.sources import aiconfigurator, infersim, kvsim_rows, llmservingsim, vidur
from kvsim.calibration.timings import Timings
from kvsim.errors import CalibrationError

READERS: Final[Mapping[str, ModuleType]] = {
    "kvsim": kvsim_rows, "aiconfigurator": aiconfigurator, "infersim": infersim, "vidur": vidur,
    "llmservingsim": llmservingsim,
}  # fmt: skip
"""Every reader, by the name of its tool; each has ``find_tables(folder)`` and ``read(folder, devices, operations)``."""


def read(
    folder: Path, devices: Collection[str] | None = None, operations: Collection[str] | None = None
) -> list[Timings]:
    """Read what every tool left under a folder, or one file; arguments as in `aiconfigurator.read`.

    Raises
    ------
    CalibrationError
        No tool's tables are there.
    KvsimError
        As each reader: a table that cannot be read, a device or value that is not known.
    """
    if not folder.exists():
        msg = f"{folder}: no such file or folder"
        raise CalibrationError(msg)
    found = {name: reader for name, reader in READERS.items() if list(reader.find_tables(folder))}
    if not found:
        msg = f"{folder}: holds no tables of {', '.join(READERS)}"
        raise CalibrationError(msg)
    return [timings for reader in found.values() for timings in reader.read(folder, devices, operations)]
