"""One random stream per source of randomness, so that adding a consumer shifts no other's draws."""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np

StreamName = Literal[
    "input_len",
    "first_input_len",
    "output_len",
    "arrivals",
    "turns",
    "think_time",
    "shared_prefix_choice",
    "request_class",
]


def stream(seed: int, name: StreamName, part: str = "") -> np.random.Generator:
    """Give the generator seeded by ``seed`` and the stream's name alone (numpy's SeedSequence with a spawn key).

    ``part`` names one of several alike, such as a request class that draws its own lengths.
    """
    key = f"{name}:{part}" if part else name
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=(zlib.crc32(key.encode()),)))
