"""Devices as the tools that took the timings call them."""

from __future__ import annotations

from kvsim.device_catalog import load_device
from kvsim.errors import UnknownName


def resolve_device(name: str, where: str) -> str:
    """Give our name of a device: the aliases in hardware_specs hold driver names and the tools' folder names.

    Raises
    ------
    UnknownName
        No device answers to `name`; the message begins with `where` (a file and column) and suggests the nearest.
    """
    try:
        return load_device(name).spec.name
    except UnknownName as error:
        error.locate(where)
        raise
