"""Layer plans as files. Only the edge (a command's argument) opens one; everything else holds what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

import yaml
from pydantic import Field, model_validator

from kvsim.compression.depth import Depth
from kvsim.compression.parse import parse_compression, parse_part
from kvsim.compression.spelling import spell_list
from kvsim.compression.strategy import Compression, spell
from kvsim.documents import load_json, load_yaml, validate, write_atomic
from kvsim.errors import KvsimError
from kvsim.specs.base import Spec

SUFFIXES: Final = (".yaml", ".yml", ".json")
SCHEMA_VERSION: Final = 1


class PlanFile(Spec):
    """``PLAN.yaml``: what each layer does, and how that was found."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    source: str
    """On what the plan was calibrated, by which measure, under which total."""
    depth: Depth = "exact"
    """exact: one entry per layer. relative: entries share out the layers of any model evenly, in order."""
    selections: tuple[str, ...] = ()
    """Token selection of each layer, by name; none given keeps all tokens."""
    encodings: tuple[str, ...] = ()
    """Encoding of each layer, by name; none given stores natively."""
    evidence: dict[str, Any] = Field(default_factory=dict)
    """What was measured, for a reader; nothing is computed from it."""

    @model_validator(mode="after")
    def _one_entry_per_layer(self) -> Self:
        both = len(self.selections), len(self.encodings)
        if not any(both):
            msg = "give selections, encodings or both: one name per layer"
            raise ValueError(msg)
        if self.depth == "exact" and all(both) and both[0] != both[1]:
            msg = f"selections are for {both[0]} layers and encodings for {both[1]}; give each layer one of both"
            raise ValueError(msg)
        return self

    @property
    def strategy(self) -> str:
        """The plan as a strategy's name, which holds all of it."""
        lists = (("layer_plan", self.selections), ("layer_encodings", self.encodings))
        parts = [
            spell_list(name, self.depth, [spell(parse_part(one)) for one in found]) for name, found in lists if found
        ]
        return "+".join(parts)


def load_plan(path: Path) -> PlanFile:
    """Read a plan; raise InvalidSpec or UnknownName, naming the file, where it is none."""
    document = load_json(path) if path.suffix == ".json" else load_yaml(path)
    plan = validate(PlanFile, document, str(path))
    try:
        parse_compression(plan.strategy)
    except KvsimError as error:
        error.locate(str(path))
        raise
    return plan


def write_plan(path: Path, plan: PlanFile) -> None:
    """Write a plan that `load_plan` reads back."""
    document = plan.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(
        {"schema_version": SCHEMA_VERSION, **document}, sort_keys=False, allow_unicode=True, width=110
    )
    write_atomic(path, text.encode())


def named_strategy(text: str) -> str:
    """Put in place of every plan file in a strategy's name what the file says: ``PLAN.yaml+fp8``.

    Anything else stays as it is, whether it names a strategy or not.

    Raises
    ------
    InvalidSpec, UnknownName
        A file cannot be read, or is no plan.
    """
    pieces = [load_plan(Path(piece.strip())).strategy if is_file(piece) else piece for piece in text.split("+")]
    return "+".join(pieces)


def is_file(piece: str) -> bool:
    """Whether a piece of a strategy's name is a plan's file."""
    return "[" not in piece and piece.strip().lower().endswith(SUFFIXES)


def plan_of(compression: Compression, name: str, source: str, evidence: dict[str, Any] | None = None) -> PlanFile:
    """Make a file of a strategy of plans."""
    selection, encoding = compression.selection, compression.encoding
    selections: Sequence[Any] = getattr(selection, "layers", ())
    encodings: Sequence[Any] = getattr(encoding, "layers", ())
    depth: Depth = getattr(selection if selections else encoding, "depth", "exact")
    return PlanFile(
        name=name,
        source=source,
        depth=depth,
        selections=tuple(spell(one) for one in selections),
        encodings=tuple(spell(one) for one in encodings),
        evidence=evidence or {},
    )
