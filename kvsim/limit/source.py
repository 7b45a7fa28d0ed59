"""Where KV tensors to be measured come from: files, or a seeded ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvsim.errors import InvalidSpec
from kvsim.tensors import KvTensors

DEFAULT_ENSEMBLE = "llama-like(num_layers=6,num_tokens=2048)"
"""Six layers, as some formats keep the first two and the last two native."""
DEFAULT_SEQUENCES = 1
SAMPLE_SEQUENCES = 2


@dataclass(frozen=True, eq=False)
class Source:
    """Caches to measure, and others of the same model to calibrate on."""

    caches: tuple[KvTensors, ...]
    samples: tuple[KvTensors, ...]


def from_ensemble(text: str = DEFAULT_ENSEMBLE, sequences: int = DEFAULT_SEQUENCES) -> Source:
    """Draw ``sequences`` sequences of an ensemble to measure, and two further ones to calibrate on.

    Raises
    ------
    UnknownName, InvalidSpec
        There is no such ensemble, or a field of it is wrong.
    """
    from kvsim.tensors.ensemble import draw, parse_ensemble

    spec, seed = parse_ensemble(text)
    drawn = tuple(draw(spec, seed, sequence=number) for number in range(sequences + SAMPLE_SEQUENCES))
    return Source(drawn[:sequences], drawn[sequences:])


def from_files(paths: Sequence[Path], sample_paths: Sequence[Path] = ()) -> Source:
    """Read caches from safetensors files; codecs that calibrate learn from ``sample_paths`` alone.

    Raises
    ------
    InvalidSpec
        A file cannot be read, or is both measured and calibrated on.
    """
    from kvsim.tensors.files import read_kv

    both = {path.resolve() for path in paths} & {path.resolve() for path in sample_paths}
    if both:
        msg = f"{sorted(both)[0]}: is measured, so nothing may be calibrated on it"
        raise InvalidSpec(msg)
    return Source(tuple(map(read_kv, paths)), tuple(map(read_kv, sample_paths)))
