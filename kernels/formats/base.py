"""What a KV format is: a byte layout, an encoder and a decoder."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from .pages import PageLayout


class KvFormat(ABC):
    """One way to store the keys and values of a block of tokens.

    Attributes
    ----------
    name : str
        The simulator's or the engine's name where there is one; layouts of one encoding share it, so that the best and
        the shipped form of a kernel stand side by side.
    strategy : str or None
        The encoding of ``kvsim list strategies`` whose byte formula this layout must equal.
    block_size_multiple : int
        Tokens that a block must hold a multiple of.
    residual_tokens : int
        Newest tokens that stay out of the blocks, in the native dtype.
    """

    name: str
    strategy: str | None = None
    block_size_multiple: ClassVar[int] = 1
    residual_tokens: int = 0

    @abstractmethod
    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        """Give the fields of a block; `dtype` is the model's (bf16, fp16, or fp32 in checks)."""

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode whole blocks, (num_blocks, block_size, num_kv_heads, head_dim) of the model's dtype, to fields."""

    @abstractmethod
    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode fields, (num_blocks, *shape), to keys and values in fp32, shaped as for `encode`.

        Where the format rotates, decoded vectors are rotated back.
        """
