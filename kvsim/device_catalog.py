"""The device catalogue: names, aliases and the user's own device files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Final

from kvsim.data_files import data_dir
from kvsim.documents import load_yaml, parse_yaml, validate
from kvsim.errors import UnknownName
from kvsim.specs.device import DeviceSpec

_ALIASES_KEY: Final = "aliases:"


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


def normalize_name(name: str) -> str:
    """Lower case, with runs of ``_`` and white space read as ``-``."""
    return re.sub(r"[_\s]+", "-", name.strip().lower())


@lru_cache(maxsize=1)
def list_devices() -> tuple[str, ...]:
    """Names of all shipped devices, sorted; only file names are read."""
    return tuple(sorted(path.stem for path in data_dir("hardware_specs").glob("*.yaml")))


def load_device(name: str) -> ResolvedDevice:
    """Find a device by name, by alias or by the path of the user's own YAML file.

    Raises
    ------
    UnknownName
        No device, alias or file has that name; the nearest ones are suggested.
    InvalidSpec
        The file cannot be read, or a value in it is not allowed.
    """
    if name.lower().endswith((".yaml", ".yml")):
        return ResolvedDevice(_read_spec(Path(name).expanduser()))
    wanted = normalize_name(name)
    if wanted in list_devices():
        return ResolvedDevice(_load_shipped(wanted))
    if wanted in AMBIGUOUS_NAMES:
        return _resolve_ambiguous(name, AMBIGUOUS_NAMES[wanted])
    aliases = _alias_index()
    if wanted in aliases:
        return ResolvedDevice(_load_shipped(aliases[wanted]))
    raise UnknownName(kind="device", name=name, known=(*list_devices(), *AMBIGUOUS_NAMES, *aliases))


def _resolve_ambiguous(name: str, ambiguity: _Ambiguity) -> ResolvedDevice:
    spec = _load_shipped(ambiguity.device)
    notice = f"device {name!r} can mean several parts; taking {spec.name} ({spec.title})"
    if ambiguity.others:
        notice += f"; also known: {', '.join(ambiguity.others)}"
    if ambiguity.remark:
        notice += f"; {ambiguity.remark}"
    return ResolvedDevice(spec, notice)


def _read_spec(path: Path) -> DeviceSpec:
    return validate(DeviceSpec, load_yaml(path), str(path), require_units=True)


@lru_cache(maxsize=128)
def _load_shipped(name: str) -> DeviceSpec:
    return _read_spec(data_dir("hardware_specs") / f"{name}.yaml")


@lru_cache(maxsize=1)
def _alias_index() -> dict[str, str]:
    """Normalised alias to device name, from the one ``aliases:`` line of each file.

    Reading that line alone is far faster than parsing every file; a test holds it to the parsed specs.
    """
    folder = data_dir("hardware_specs")
    index: dict[str, str] = {}
    for name in list_devices():
        path = folder / f"{name}.yaml"
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(_ALIASES_KEY):
                aliases = parse_yaml(line, str(path))["aliases"]
                index.update({normalize_name(alias): name for alias in aliases})
                break
    return index
