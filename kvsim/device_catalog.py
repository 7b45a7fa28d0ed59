"""The device catalogue: names, aliases and the user's own device files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from kvsim.errors import UnknownName
from kvsim.spec_folder import SpecFolder, is_file_name, normalize_name
from kvsim.specs.device import DeviceSpec


@dataclass(frozen=True)
class ResolvedDevice:
    """A device, and what the user should be told about how its name was read."""

    spec: DeviceSpec
    notice: str | None = None


@dataclass(frozen=True)
class _Ambiguity:
    """A short name that several devices answer to: the one taken, and the others."""

    device: str
    others: tuple[str, ...] = ()
    remark: str | None = None


_A100: Final = _Ambiguity("a100-sxm-80gb", ("a100-sxm-40gb", "a100-pcie-80gb", "a100-pcie-40gb"))
_H100: Final = _Ambiguity("h100-sxm", ("h100-pcie", "h100-nvl"))
AMBIGUOUS_NAMES: Final = MappingProxyType(
    {
        "a100": _A100,
        "nvidia-a100": _A100,
        "a100-80gb": _Ambiguity("a100-sxm-80gb", ("a100-pcie-80gb",)),
        "a100-40gb": _Ambiguity("a100-sxm-40gb", ("a100-pcie-40gb",)),
        "a100-sxm": _Ambiguity("a100-sxm-80gb", ("a100-sxm-40gb",)),
        "a100-pcie": _Ambiguity("a100-pcie-80gb", ("a100-pcie-40gb",)),
        "h100": _H100,
        "nvidia-h100": _H100,
        "h100-80gb": _Ambiguity("h100-sxm", ("h100-pcie",)),
        "mi300": _Ambiguity("mi300x", ("mi325x",), "MI300A, an APU with 128 GB, is not in the catalogue"),
        "rtx-pro-6000-blackwell": _Ambiguity("rtx-pro-6000", ("rtx-pro-6000-workstation",)),
        "jetson-orin": _Ambiguity("jetson-agx-orin-64gb", ("jetson-orin-nano",)),
        "gaudi": _Ambiguity("gaudi3", ("gaudi2",)),
        "trainium": _Ambiguity("trainium2", ("trainium3", "trainium1")),
    }
)
"""Names that resolve with a notice; every other alias stands in its device's file."""


_DEVICES: Final = SpecFolder("hardware_specs", DeviceSpec)


def list_devices() -> tuple[str, ...]:
    """Names of all shipped devices, sorted; only file names are read."""
    return _DEVICES.names


def load_device(name: str) -> ResolvedDevice:
    """Find a device by name, by alias or by the path of the user's own YAML file.

    Raises
    ------
    UnknownName
        No device, alias or file has that name; the nearest ones are suggested.
    InvalidSpec
        The file cannot be read, or a value in it is not allowed.
    """
    if is_file_name(name):
        return ResolvedDevice(_DEVICES.read(Path(name).expanduser()))
    wanted = normalize_name(name)
    if wanted not in _DEVICES.names and wanted in AMBIGUOUS_NAMES:
        return _resolve_ambiguous(name, AMBIGUOUS_NAMES[wanted])
    found = _DEVICES.find(wanted)
    if found is None:
        raise UnknownName(kind="device", name=name, known=(*_DEVICES.names, *AMBIGUOUS_NAMES, *_DEVICES.aliases))
    return ResolvedDevice(found)


def _resolve_ambiguous(name: str, ambiguity: _Ambiguity) -> ResolvedDevice:
    spec = _DEVICES.load(ambiguity.device)
    notice = f"device {name!r} can mean several parts; taking {spec.name} ({spec.title})"
    if ambiguity.others:
        notice += f"; also known: {', '.join(ambiguity.others)}"
    if ambiguity.remark:
        notice += f"; {ambiguity.remark}"
    return ResolvedDevice(spec, notice)
