"""Low rank: K and V of a group of heads as coordinates in a smaller basis (Palu, arXiv 2407.21118)."""

from collections.abc import Mapping
from functools import lru_cache

import torch

from .base import KvFormat
from .pages import Field, PageLayout

BASIS_SEED = 2407


class LowRank(KvFormat):
    """Coordinates of K, before RoPE, and of V, in the model's dtype.

    Palu finds the bases by a singular value decomposition of the projection weights. Speed and rounding do not depend
    on which basis it is, so ours is a random orthonormal one, the same on every call; `key_basis` and `value_basis`
    give it.

    Attributes
    ----------
    retained_fraction : float
        Rank kept, as a share of the full rank of a group of heads.
    group_size : int
        Heads that share one basis; fewer where there are fewer.
    """

    name = "low_rank"
    strategy = "low_rank"

    def __init__(self, retained_fraction: float = 0.5, group_size: int = 4) -> None:
        self.retained_fraction = retained_fraction
        self.group_size = group_size

    def heads(self, num_kv_heads: int) -> int:
        """Heads that share one basis; raise ValueError where they do not divide the KV heads."""
        heads = min(self.group_size, num_kv_heads)
        if num_kv_heads % heads:
            raise ValueError(f"groups of {heads} heads do not divide {num_kv_heads} KV heads")
        return heads

    def rank(self, num_kv_heads: int, head_dim: int) -> int:
        """Coordinates per token and group of heads, of K and of V each."""
        return max(1, round(self.retained_fraction * self.heads(num_kv_heads) * head_dim))

    def key_basis(self, num_kv_heads: int, head_dim: int) -> torch.Tensor:
        """Orthonormal rows, fp32, (num_groups, rank, heads * head_dim)."""
        return self._basis(num_kv_heads, head_dim, BASIS_SEED)

    def value_basis(self, num_kv_heads: int, head_dim: int) -> torch.Tensor:
        """As `key_basis`, for V."""
        return self._basis(num_kv_heads, head_dim, BASIS_SEED + 1)

    def _basis(self, num_kv_heads: int, head_dim: int, seed: int) -> torch.Tensor:
        heads = self.heads(num_kv_heads)
        return orthonormal_rows(num_kv_heads // heads, self.rank(num_kv_heads, head_dim), heads * head_dim, seed)

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        shape = (block_size, num_kv_heads // self.heads(num_kv_heads), self.rank(num_kv_heads, head_dim))
        return PageLayout((Field("key", dtype, shape), Field("value", dtype, shape)))

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Project the heads of each group, rounded to the dtype of the bases that kernels see; keys without RoPE."""
        num_kv_heads, head_dim = keys.shape[-2:]
        bases = {"key": self.key_basis(num_kv_heads, head_dim), "value": self.value_basis(num_kv_heads, head_dim)}
        return {
            name: project(rows, basis.to(rows)).to(rows.dtype)
            for (name, basis), rows in zip(bases.items(), (keys, values), strict=True)
        }

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rebuild K, without RoPE, and V by the bases in the dtype of the fields."""
        num_groups, rank = fields["key"].shape[-2:]
        num_kv_heads = num_groups * self._heads_of_rank(rank, head_dim)
        bases = {"key": self.key_basis(num_kv_heads, head_dim), "value": self.value_basis(num_kv_heads, head_dim)}
        keys, values = (expand(fields[name], basis.to(fields[name]), head_dim) for name, basis in bases.items())
        return keys, values

    def _heads_of_rank(self, rank: int, head_dim: int) -> int:
        return next(h for h in range(self.group_size, 0, -1) if self.rank(h, head_dim) == rank)


@lru_cache(maxsize=64)
def orthonormal_rows(num_groups: int, rank: int, width: int, seed: int) -> torch.Tensor:
    """Draw `rank` orthonormal rows of `width` per group, fp32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.linalg.qr(torch.randn(num_groups, width, rank, generator=generator, dtype=torch.float64)).Q
    return columns.mT.float().contiguous()


def project(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Give coordinates in fp32, (..., num_groups, rank), of rows (..., num_kv_heads, head_dim)."""
    num_groups, _, width = basis.shape
    grouped = rows.float().reshape(*rows.shape[:-2], num_groups, width)
    return torch.einsum("...gw,grw->...gr", grouped, basis.float())


def expand(coordinates: torch.Tensor, basis: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Give rows in fp32, (..., num_kv_heads, head_dim), of coordinates (..., num_groups, rank)."""
    rows = torch.einsum("...gr,grw->...gw", coordinates.float(), basis.float())
    return rows.reshape(*rows.shape[:-2], -1, head_dim)
