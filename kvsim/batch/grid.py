"""A sweep's specification: a base scenario and the keys that vary, expanded into points in a fixed order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from kvsim.documents import load_json, load_yaml, validate
from kvsim.errors import InvalidSpec
from kvsim.field_paths import check_dotted_key
from kvsim.scenario import Scenario
from kvsim.scenario_file import load_document
from kvsim.specs.base import Spec

Axis = Annotated[tuple[Any, ...], Field(min_length=1)]


class SweepSpec(Spec):
    """Which scenarios to run: every combination of ``grid``, each with every row of ``link``.

    The last key of ``grid`` varies faster than the first; the rows of ``link`` vary fastest.
    """

    base: dict[str, Any] | str
    """The scenario that every point starts from, or the path of its file (relative to the sweep's folder)."""
    grid: dict[str, Axis] = Field(default_factory=dict)
    """Dotted key to the values that it takes."""
    link: dict[str, Axis] = Field(default_factory=dict)
    """Dotted keys that change together, row by row; lists of one length."""
    max_points: Annotated[int, Field(gt=0)] = 20_000
    """Refuse a larger grid: a typing error should not cost a night."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """A checked sweep: the base document, where it came from, and what changes from point to point."""

    document: Mapping[str, Any]
    where: str
    base_dir: Path
    """Folder that relative trace paths start from."""
    require_units: bool
    spec: SweepSpec

    @property
    def num_points(self) -> int:
        """How many points the grid has, equal ones included."""
        return _num_points(self.spec)

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield each point's values by dotted key, in the grid's order."""
        grid, link = self.spec.grid, self.spec.link
        rows = list(zip(*link.values(), strict=True)) if link else [()]
        for values in itertools.product(*grid.values()):
            for row in rows:
                yield dict(zip((*grid, *link), (*values, *row), strict=True))


def _num_points(spec: SweepSpec) -> int:
    linked = len(next(iter(spec.link.values()))) if spec.link else 1
    return math.prod(len(values) for values in spec.grid.values()) * linked


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file; raise InvalidSpec where a key does not exist, lists differ in length or it is too large."""
    raw = load_json(path) if path.suffix == ".json" else load_yaml(path)
    return check_sweep(validate(SweepSpec, raw, str(path)), path.parent, str(path))


def check_sweep(spec: SweepSpec, base_dir: Path, where: str = "sweep") -> Sweep:
    """Resolve the base and check every key and the size; relative paths start from ``base_dir``."""
    if not spec.grid and not spec.link:
        msg = f"{where}: grid: nothing varies; name at least one key under 'grid' or 'link'"
        raise InvalidSpec(msg)
    for axis, keys in (("grid", spec.grid), ("link", spec.link)):
        for key in keys:
            check_dotted_key(Scenario, key, f"{where}: {axis}")
    both = sorted(set(spec.grid) & set(spec.link))
    if both:
        msg = f"{where}: {both[0]!r} stands under both 'grid' and 'link'; one of them must go"
        raise InvalidSpec(msg)
    lengths = {key: len(values) for key, values in spec.link.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        msg = f"{where}: link: lists must have one length, but {listed}"
        raise InvalidSpec(msg)
    if _num_points(spec) > spec.max_points:
        msg = f"{where}: {_num_points(spec)} points exceed max_points {spec.max_points}; raise it or shorten a list"
        raise InvalidSpec(msg)
    if isinstance(spec.base, str):
        base_path = base_dir / spec.base
        units = base_path.suffix != ".json"
        return Sweep(load_document(base_path), str(base_path), base_path.parent, units, spec)
    return Sweep(spec.base, f"{where}: base", base_dir, True, spec)
