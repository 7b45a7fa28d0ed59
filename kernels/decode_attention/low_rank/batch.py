"""Tilings of decode attention over low-rank coordinates."""

from dataclasses import dataclass

from ...launches import LaunchConfig


@dataclass(frozen=True)
class LowRankConfig(LaunchConfig):
    """A tiling with the KV heads that one program serves.

    Attributes
    ----------
    block_k : int
        Coordinates of K multiplied at a time, a power of two of at least 16.
    heads : int or None
        KV heads per program, a divisor of the heads that share a basis; None: all of them, so that their coordinates
        are read once.
    """

    block_k: int = 64
    heads: int | None = None
