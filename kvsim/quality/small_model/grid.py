"""Which strategies and models are measured by default. No torch."""

from __future__ import annotations

from typing import Final

from kvsim.compression import STRATEGIES, parse_compression
from kvsim.data_files import preset_dir
from kvsim.documents import load_yaml
from kvsim.errors import InvalidSpec

MODELS: Final = (("plain", 1), ("plain", 2), ("smeared", 1), ("smeared", 2), ("smeared-cla2", 1))
"""(architecture, seed of training)."""


def measured_strategies() -> tuple[str, ...]:
    """Give every named strategy and the further configurations of ``presets/small_model/strategies.yaml``.

    Each by its canonical name, once.

    Raises
    ------
    InvalidSpec, UnknownName
        A line of the file names no strategy.
    """
    path = preset_dir("small_model") / "strategies.yaml"
    listed = load_yaml(path)
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        msg = f"{path.name}: a list of strategies' names is wanted"
        raise InvalidSpec(msg)
    return tuple(dict.fromkeys(parse_compression(name).name for name in (*STRATEGIES, *listed)))
