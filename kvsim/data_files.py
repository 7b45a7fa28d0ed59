"""Where shipped data lies: inside the wheel, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """Folder of shipped data, such as ``hardware_specs`` or ``calibration/priors``.

    A wheel carries it under ``kvsim/_data``; a checkout has it at the top level.
    """
    packaged = _PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def preset_dir(name: str) -> Path:
    """Folder of presets inside the package: ``models``, ``workloads`` or ``prices``."""
    return _PACKAGE / "presets" / name
