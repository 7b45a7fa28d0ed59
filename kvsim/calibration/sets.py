"""Which artefacts the simulator uses: a set is a file that pins them by hash, and nothing is picked for being new."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, StringConstraints

from kvsim.calibration.artefact import Artefact, Predictor, artefact_file_name, load_artefact
from kvsim.calibration.choice import FRAMEWORKS, version_order
from kvsim.calibration.facts import device_facts
from kvsim.calibration.sealed import SCHEMA_VERSION, refuse_newer
from kvsim.calibration.staleness import OWN_KERNELS, is_stale_source
from kvsim.calibration.timings import KEY_COLUMNS
from kvsim.data_files import data_dir
from kvsim.documents import load_yaml, validate
from kvsim.errors import CalibrationError, UnknownName
from kvsim.specs.base import Spec
from kvsim.specs.device import DeviceSpec, Slug

AUTO: Final = "auto"
FITTED: Final = "fitted"
SETS: Final = "sets"
PATH_SUFFIXES: Final = (".yaml", ".yml")
Key = tuple[str, str, str, str, str, str]
"""Values of KEY_COLUMNS."""


class Pin(Spec):
    """One line of a set: the key of an artefact, and its hash."""

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]
    device: Slug
    operation: str
    kernel: str
    version: str
    dtype: str
    kv_dtype: str = ""
    default: bool = False
    """What ``auto`` takes among the kernels of one device, operation and format."""

    @property
    def key(self) -> Key:
        """Values of KEY_COLUMNS."""
        return (self.device, self.operation, self.kernel, self.version, self.dtype, self.kv_dtype)

    @property
    def file(self) -> Path:
        """Place below the folder of fitted artefacts."""
        return Path(self.device) / artefact_file_name(self.key, self.id)


class SetFile(Spec):
    """``calibration/sets/<name>.yaml``."""

    schema_version: int
    name: str
    artefacts: tuple[Pin, ...] = Field(min_length=1)


@dataclass(frozen=True)
class CalibrationSet:
    """Pinned artefacts; each is read when it is first asked for."""

    name: str
    path: Path
    pins: tuple[Pin, ...]
    _loaded: dict[str, Artefact] = field(default_factory=dict, repr=False, compare=False)

    @property
    def entries(self) -> tuple[Artefact, ...]:
        """Every artefact; raises CalibrationError as `load`."""
        return tuple(self.load(pin) for pin in self.pins)

    @cached_property
    def _by_device(self) -> Mapping[str, tuple[Pin, ...]]:
        return {device: tuple(pins) for device, pins in groupby(sorted(self.pins, key=_device), key=_device)}

    @cached_property
    def _by_format(self) -> Mapping[tuple[str, str, str, str], tuple[Pin, ...]]:
        found: dict[tuple[str, str, str, str], tuple[Pin, ...]] = {}
        for pin in self.pins:
            one = (pin.device, pin.operation, pin.dtype, pin.kv_dtype)
            found[one] = (*found.get(one, ()), pin)
        return found

    def covers(self, device: str) -> bool:
        """Whether anything is pinned for a device."""
        return device in self._by_device

    def kernels(self, device: str, operation: str) -> tuple[str, ...]:
        """Names of the kernels that a scenario may choose on a device."""
        found = (pin.kernel for pin in self.pins if (pin.device, pin.operation) == (device, operation))
        return tuple(dict.fromkeys(found))

    def stale_notes(self, device: str) -> list[str]:
        """Say which kernels of kvsim were changed since they were measured on a device."""
        own = (pin for pin in self._by_device.get(device, ()) if pin.kernel.startswith(OWN_KERNELS))
        return [
            f"calibration {pin.id} is stale: {pin.kernel} ({named(pin.key)}) was changed since it was measured"
            for pin in own
            if is_stale_source(pin.version)
        ]

    def find(
        self, device: str, operation: str, *, kernel: str = AUTO, dtype: str, kv_dtype: str = ""
    ) -> Artefact | None:
        """Give the artefact of a kernel (or of the default one), None where the set has none.

        Parameters
        ----------
        kernel : str
            ``auto``, a kernel's name, or ``name@version``.

        Raises
        ------
        CalibrationError
            The artefact pinned is missing, was changed, or is another than the one pinned.
        """
        for pin in self._by_format.get((device, operation, dtype, kv_dtype), ()):
            if pin.default if kernel == AUTO else kernel in (pin.kernel, f"{pin.kernel}@{pin.version}"):
                return self.load(pin)
        return None

    def newest_of_engines(self, device: str, operation: str, *, dtype: str, kv_dtype: str = "") -> tuple[Artefact, ...]:
        """Give every engine's newest artefact for an operation and format, engines in the order of `FRAMEWORKS`.

        Raises CalibrationError as `load`.
        """
        pins = self._by_format.get((device, operation, dtype, kv_dtype), ())
        of_engine = [[pin for pin in pins if pin.kernel.startswith(f"{name}/")] for name in FRAMEWORKS]
        return tuple(self.load(max(mine, key=lambda pin: version_order(pin.version))) for mine in of_engine if mine)

    def predictor(self, artefact: Artefact, device: DeviceSpec) -> Predictor:
        """Make an artefact ready to predict on a device with that datasheet."""
        return artefact.predictor(device_facts(device))

    def load(self, pin: Pin) -> Artefact:
        """Read a pinned artefact, once.

        It is looked for beside the set (``../fitted``), then among those that kvsim ships.

        Raises
        ------
        CalibrationError
            It is missing, was changed, or is another than the one pinned.
        """
        if pin.id not in self._loaded:
            folders = (self.path.parent.parent / FITTED, data_dir("calibration/fitted"))
            places = [folder / pin.file for folder in folders]
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                msg = f"{self.path}: pins {pin.file.as_posix()}, which is not in {places[0].parents[1]}"
                raise CalibrationError(msg)
            self._loaded[pin.id] = _checked(load_artefact(found), found, pin, self.path)
        return self._loaded[pin.id]


def _device(pin: Pin) -> str:
    return pin.device


def pins_of(artefacts: Iterable[Artefact], default_ids: Collection[str]) -> tuple[Pin, ...]:
    """Pin artefacts, sorted by key."""
    pins = [
        Pin(id=one.id, default=one.id in default_ids, **{name: getattr(one, name) for name in KEY_COLUMNS})
        for one in artefacts
    ]
    return tuple(sorted(pins, key=lambda pin: pin.key))


def set_text(name: str, pins: Iterable[Pin], header: str = "") -> str:
    """Write a set as YAML, one line per artefact; equal pins give equal text."""
    lines = [f"# {line}" for line in header.splitlines()]
    lines += [f"schema_version: {SCHEMA_VERSION}", f"name: {name}", "artefacts:"]
    for pin in pins:
        words = [f'{column}: "{getattr(pin, column)}"' for column in ("id", *KEY_COLUMNS) if getattr(pin, column)]
        lines.append("- {" + ", ".join([*words, *(["default: true"] if pin.default else [])]) + "}")
    return "\n".join(lines) + "\n"


def list_sets() -> tuple[str, ...]:
    """Names of shipped sets."""
    return tuple(sorted(path.stem for path in data_dir("calibration/sets").glob("*.yaml")))


def load_set(name: str = "default", *, base_dir: Path | None = None) -> CalibrationSet:
    """Read a set: a shipped one by name, one's own by the path of its YAML file.

    Parameters
    ----------
    base_dir : Path, optional
        Folder that a relative path starts from.

    Raises
    ------
    UnknownName
        No set has that name.
    InvalidSpec
        The file cannot be read, or a value in it is not allowed.
    CalibrationError
        It comes from a later kvsim, or pins two artefacts where one is meant.
    """
    if name.lower().endswith(PATH_SUFFIXES):
        path = (base_dir or Path()) / Path(name).expanduser()
    else:
        return _read_shipped(name)
    stamp = path.stat().st_mtime_ns if path.is_file() else 0
    return _read_set(path, stamp)


@lru_cache(maxsize=8)
def _read_shipped(name: str) -> CalibrationSet:
    path = data_dir("calibration/sets") / f"{name}.yaml"
    if not path.is_file():
        raise UnknownName(kind="calibration set", name=name, known=("datasheet", *list_sets()))
    return _read_set(path, 0)


@lru_cache(maxsize=8)
def _read_set(path: Path, _stamp: int) -> CalibrationSet:
    document = load_yaml(path)
    if isinstance(document, Mapping):
        refuse_newer(document, path)
    stated = validate(SetFile, document, str(path))
    _check_single(stated.artefacts, path)
    return CalibrationSet(stated.name, path, stated.artefacts)


def _check_single(pins: Iterable[Pin], path: Path) -> None:
    """Refuse one key pinned twice, and two defaults of one device, operation and format."""
    pins = tuple(pins)
    counts = Counter(pin.key for pin in pins)
    for key, count in counts.items():
        if count > 1:
            msg = f"{path}: {named(key)} is pinned {count} times; keep one"
            raise CalibrationError(msg)
    defaults: dict[Key, Pin] = {}
    for pin in (pin for pin in pins if pin.default):
        same = (pin.device, pin.operation, "", "", pin.dtype, pin.kv_dtype)
        if same in defaults:
            msg = f"{path}: {named(same)} has two defaults, {defaults[same].kernel} and {pin.kernel}; keep one"
            raise CalibrationError(msg)
        defaults[same] = pin


def named(key: Iterable[str]) -> str:
    """Write a key in one line."""
    return " ".join(word for word in key if word)


def _checked(artefact: Artefact, path: Path, pin: Pin, where: Path) -> Artefact:
    if artefact.id != pin.id:
        msg = f"{where}: pins {path} as {pin.id}, but its content is {artefact.id}"
        raise CalibrationError(msg)
    stated = tuple(getattr(artefact, name) for name in KEY_COLUMNS)
    if stated != pin.key:
        msg = f"{where}: pins {pin.id} as {named(pin.key)}, but it is {named(stated)}"
        raise CalibrationError(msg)
    return artefact
