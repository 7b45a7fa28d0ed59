"""The link catalogue: names, aliases and the user's own link files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kvsim.errors import UnknownName
from kvsim.spec_folder import SpecFolder, is_file_name, normalize_name
from kvsim.specs.link import LinkSpec

_LINKS: Final = SpecFolder("hardware_specs/links", LinkSpec)


def list_links() -> tuple[str, ...]:
    """Names of all shipped links, sorted."""
    return _LINKS.names


def load_link(name: str) -> LinkSpec:
    """Find a link by name, by alias or by the path of the user's own YAML file.

    Raises
    ------
    UnknownName
        No link, alias or file has that name; the nearest ones are suggested.
    InvalidSpec
        The file cannot be read, or a value in it is not allowed.
    """
    if is_file_name(name):
        return _LINKS.read(Path(name).expanduser())
    found = _LINKS.find(normalize_name(name))
    if found is None:
        raise UnknownName(kind="link", name=name, known=(*_LINKS.names, *_LINKS.aliases))
    return found
