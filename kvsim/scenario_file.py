"""Scenario files: YAML or JSON on disk, plus ``key=value`` overrides, become one validated Scenario."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kvsim.documents import load_json, load_yaml, parse_yaml, validate
from kvsim.errors import InvalidSpec
from kvsim.field_paths import check_dotted_key
from kvsim.scenario import Scenario

Assignment = tuple[str, Any]
"""A dotted key and the value to put there, as YAML would give it."""

_UNIT_OF_SUFFIX = {"_s": "s", "_bytes": "B"}


def load_scenario(path: Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read a scenario file and apply ``key=value`` overrides.

    Parameters
    ----------
    path
        YAML, in which quantities carry their unit, or JSON, in which they may be plain SI numbers.
    overrides
        Dotted keys with YAML values, such as ``engine.max_num_seqs=128`` or ``compression=fp8``; later ones win.

    Raises
    ------
    InvalidSpec
        Naming file, field, value and what is allowed.
    """
    assignments = [parse_override(text) for text in overrides]
    return build_scenario(load_document(path), assignments, str(path), require_units=path.suffix != ".json")


def load_document(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON mapping; raise InvalidSpec where it is something else."""
    document = load_json(path) if path.suffix == ".json" else load_yaml(path)
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        found = "nothing" if document is None else type(document).__name__
        msg = f"{path}: must be a mapping such as 'model: llama-3.1-8b', one key per line (got {found})"
        raise InvalidSpec(msg)
    return document


def parse_override(text: str, where: str = "--set") -> Assignment:
    """Split ``key=value`` and read the value as YAML; raise InvalidSpec where there is no key or the key is unknown."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        msg = f"{where}: {text!r} is not of the form key=value, such as engine.max_num_seqs=128"
        raise InvalidSpec(msg)
    check_dotted_key(Scenario, key, where)
    return key, parse_yaml(value, f"{where} {key}")


def build_scenario(
    document: dict[str, Any], assignments: Iterable[Assignment], where: str, *, require_units: bool = True
) -> Scenario:
    """Validate ``document`` with ``assignments`` applied in order; ``document`` itself stays as it is."""
    merged = copy.deepcopy(document)
    for key, value in assignments:
        assign(merged, key, value, where)
    return validate(Scenario, merged, where, require_units=require_units)


def assign(document: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put ``value`` at a dotted key, in place.

    A preset's name on the way (``workload: chat``, ``compression: fp8``) is replaced by what it stands for, so that
    one of its parameters can be changed.
    """
    *parents, last = key.split(".")
    node = document
    for depth, part in enumerate(parents):
        child = node.get(part)
        if isinstance(child, str) and depth == 0:
            expanded = _spelled_out(part, child)
            child = child if expanded is None else copy.deepcopy(expanded)
        if child is None:
            child = {}
        if not isinstance(child, dict):
            msg = f"{where}: {key}: {'.'.join(parents[: depth + 1])!r} is {child!r}, which has no keys of its own"
            raise InvalidSpec(msg)
        node[part] = child
        node = child
    node[last] = value


@cache
def _spelled_out(field: str, name: str) -> dict[str, Any] | None:
    """Expand a preset's name into its parameters, quantities with units; None where the field has no presets."""
    if field == "workload":
        from kvsim.workload_catalog import load_workload

        spec: BaseModel = load_workload(name)
    elif field == "compression":
        from kvsim.compression import parse_compression

        spec = parse_compression(name)
    else:
        return None
    expanded: dict[str, Any] = _with_units(spec.model_dump(mode="json", exclude_none=True))
    return expanded


def _with_units(value: Any, key: str = "") -> Any:
    """Write bare SI numbers as strings with the unit that their key's suffix names."""
    if isinstance(value, dict):
        return {name: _with_units(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_units(item) for item in value]
    unit = next((unit for suffix, unit in _UNIT_OF_SUFFIX.items() if key.endswith(suffix)), None)
    if unit is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value!r} {unit}"
    return value
