"""A folder of YAML files, one spec each, found by file name or by the aliases in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Generic, TypeVar

from kvsim.data_files import data_dir
from kvsim.documents import load_yaml, parse_yaml, validate
from kvsim.specs.base import Spec

SpecT = TypeVar("SpecT", bound=Spec)
_ALIASES_KEY: Final = "aliases:"


def normalize_name(name: str) -> str:
    """Lower case, with runs of ``_`` and white space read as ``-``."""
    return re.sub(r"[_\s]+", "-", name.strip().lower())


def is_file_name(name: str) -> bool:
    """Whether a name is the path of the user's own file."""
    return name.lower().endswith((".yaml", ".yml"))


@dataclass(frozen=True)
class SpecFolder(Generic[SpecT]):
    """The shipped files of one kind of spec. Nothing is read before it is asked for, and then once."""

    folder: str
    spec: type[SpecT]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all entries, sorted; only file names are read."""
        return tuple(sorted(path.stem for path in data_dir(self.folder).glob("*.yaml")))

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Normalised alias to name, from the one ``aliases:`` line of each file.

        Reading that line alone is far faster than parsing every file; a test holds it to the parsed specs.
        """
        folder = data_dir(self.folder)
        index: dict[str, str] = {}
        for name in self.names:
            path = folder / f"{name}.yaml"
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.startswith(_ALIASES_KEY):
                    aliases = parse_yaml(line, str(path))["aliases"]
                    index.update({normalize_name(alias): name for alias in aliases})
                    break
        return index

    def read(self, path: Path) -> SpecT:
        """Read a file; raise InvalidSpec where it cannot be read or a value in it is not allowed."""
        return validate(self.spec, load_yaml(path), str(path), require_units=True)

    def find(self, wanted: str) -> SpecT | None:
        """Read the entry of a normalised name or alias; None where there is none."""
        name = wanted if wanted in self.names else self.aliases.get(wanted)
        return None if name is None else self.load(name)

    def load(self, name: str) -> SpecT:
        """Read the entry of that exact name."""
        if name not in self._read_before:
            self._read_before[name] = self.read(data_dir(self.folder) / f"{name}.yaml")
        return self._read_before[name]

    @cached_property
    def _read_before(self) -> dict[str, SpecT]:
        return {}
