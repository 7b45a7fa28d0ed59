"""Which strategies and models are measured by default. No torch."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from kvsim.compression import STRATEGIES, parse_compression
from kvsim.data_files import preset_dir
from kvsim.documents import load_yaml, validate
from kvsim.specs.base import Spec

MODELS: Final = (("plain", 1), ("plain", 2), ("smeared", 1), ("smeared", 2), ("smeared-cla2", 1))
"""(architecture, seed of training)."""
SEQUENCES: Final = 100
"""Per task and model. Every model gets its own, so that five models see 500 of each task."""


class Grid(Spec):
    """``presets/small_model/strategies.yaml``."""

    also: tuple[str, ...] = ()
    """Configurations beside the named strategies."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Named strategy -> why it is not worth measuring."""


def load_grid() -> Grid:
    """Read the file; raise InvalidSpec where it has a wrong field."""
    path = preset_dir("small_model") / "strategies.yaml"
    return validate(Grid, load_yaml(path), path.name)


def measured_strategies() -> tuple[str, ...]:
    """Give every named strategy that is not left out, and the further configurations, by canonical name, each once.

    Raises
    ------
    InvalidSpec, UnknownName
        A line of the file names no strategy.
    """
    grid = load_grid()
    left_out = {parse_compression(name).name for name in grid.left_out}
    names = (parse_compression(name).name for name in (*STRATEGIES, *grid.also))
    return tuple(dict.fromkeys(name for name in names if name not in left_out))
