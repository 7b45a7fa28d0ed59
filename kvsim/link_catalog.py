"""The link catalogue: names, aliases and the user's own link files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from kvsim.data_files import data_dir
from kvsim.device_catalog import normalize_name
from kvsim.documents import load_yaml, validate
from kvsim.errors import UnknownName
from kvsim.specs.link import LinkSpec

FOLDER = "hardware_specs/links"


@lru_cache(maxsize=1)
def list_links() -> tuple[str, ...]:
    """Names of all shipped links, sorted."""
    return tuple(sorted(path.stem for path in data_dir(FOLDER).glob("*.yaml")))


def load_link(name: str) -> LinkSpec:
    """Find a link by name, by alias or by the path of the user's own YAML file.

    Raises
    ------
    UnknownName
        No link, alias or file has that name; the nearest ones are suggested.
    InvalidSpec
        The file cannot be read, or a value in it is not allowed.
    """
    if name.lower().endswith((".yaml", ".yml")):
        return _read(Path(name).expanduser())
    wanted = normalize_name(name)
    if wanted in list_links():
        return _load_shipped(wanted)
    aliases = _alias_index()
    if wanted in aliases:
        return _load_shipped(aliases[wanted])
    raise UnknownName(kind="link", name=name, known=(*list_links(), *aliases))


def _read(path: Path) -> LinkSpec:
    return validate(LinkSpec, load_yaml(path), str(path), require_units=True)


@lru_cache(maxsize=64)
def _load_shipped(name: str) -> LinkSpec:
    return _read(data_dir(FOLDER) / f"{name}.yaml")


@lru_cache(maxsize=1)
def _alias_index() -> dict[str, str]:
    return {normalize_name(alias): name for name in list_links() for alias in _load_shipped(name).aliases}
