"""Shapes and tilings of the low-rank projection."""

from dataclasses import dataclass

from ..launches import LaunchConfig


@dataclass(frozen=True)
class ProjectionConfig(LaunchConfig):
    """A tiling of a product; ``block_n`` is the rows of a tile.

    Attributes
    ----------
    block_out, block_in : int
        Output features of a tile, and input features multiplied at a time; powers of two of at least 16.
    """

    block_out: int = 64
    block_in: int = 64


@dataclass(frozen=True)
class ProjectionBatch:
    """Rows to project into, or expand out of, the bases of groups of KV heads.

    Attributes
    ----------
    num_tokens : int
        Tokens to project, or requests whose outputs are expanded.
    num_query_heads : int
        Heads that are expanded; not read by the projection.
    """

    name: str
    dtype: str
    num_tokens: int
    num_kv_heads: int
    head_dim: int
    num_query_heads: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_query_heads // self.num_kv_heads


def tiling(target: str, num_rows: int) -> ProjectionConfig:
    """Choose 16 rows for a decode batch and 64 for a prompt; two stages where shared memory is 64 KiB."""
    stages = 2 if target.startswith("gfx") else 3
    return ProjectionConfig(64 if num_rows > 16 else 16, num_warps=4, num_stages=stages)
