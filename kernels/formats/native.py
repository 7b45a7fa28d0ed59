"""The model's own dtype: what every other format is compared with."""

from collections.abc import Mapping

import torch

from .base import KvFormat
from .pages import Field, PageLayout


class Native(KvFormat):
    """K and V as the model made them; `dtype` bytes per element and nothing else."""

    name = "native"
    strategy = "native"

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        shape = (block_size, num_kv_heads, head_dim)
        return PageLayout((Field("key", dtype, shape), Field("value", dtype, shape)))

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"key": keys, "value": values}

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        return fields["key"].float(), fields["value"].float()
