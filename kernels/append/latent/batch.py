"""Batches of new latents to append, and their tiling."""

from dataclasses import dataclass

from ...formats.latent import ROPE_DIM
from ...launches import LaunchConfig
from ..batch import AppendBatch


@dataclass(frozen=True)
class LatentAppendConfig(LaunchConfig):
    """A tiling; ``block_n`` is the tokens of a tile.

    Attributes
    ----------
    e4m3_by_bits : bool
        Round to e4m3 by integer instructions.
    """

    e4m3_by_bits: bool = False


@dataclass(frozen=True)
class LatentAppendBatch(AppendBatch):
    """New latents, whose ``head_dim`` is their width with the rotary part."""

    @property
    def latent_dim(self) -> int:
        """Compressed values."""
        return self.head_dim - ROPE_DIM


def latent_append_batch(
    name: str, dtype: str, num_tokens: int, latent_dim: int = 512, block_size: int = 64, num_padding: int = 0
) -> LatentAppendBatch:
    """Give a batch with the latent of DeepSeek-V3 unless `latent_dim` says otherwise."""
    return LatentAppendBatch(name, dtype, 1, latent_dim + ROPE_DIM, block_size, num_tokens, num_padding)
