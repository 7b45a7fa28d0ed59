"""Bytes of one block of the KV pool: which field lies where.

This is the one definition of a format's bytes: kernels address the views that it gives, and a test holds its sum equal
to the simulator's byte formula.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

ALIGNMENT_BYTES = 16
"""Widest load of a lane; a field that starts elsewhere is read in narrower pieces."""


@dataclass(frozen=True)
class Field:
    """One array of a block.

    Attributes
    ----------
    name : str
    dtype : torch.dtype
    shape : tuple of int
        Of one block: (block_size, num_kv_heads, n) for what every token and head has.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in one block."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PageLayout:
    """The fields of one block in order.

    ``planar``: field after field, each padded to 16 bytes only if a field after it would start unaligned (never, for
    the block sizes of serving engines). ``inline``: all fields of one token and head side by side, as vLLM's
    per-token-head caches are; every field is then (block_size, num_kv_heads, n).
    """

    fields: tuple[Field, ...]
    arrangement: Literal["planar", "inline"] = "planar"

    @property
    def page_bytes(self) -> int:
        """Bytes of one block."""
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        sizes = [field.num_bytes for field in self.fields]
        if self.arrangement == "planar":
            sizes[:-1] = [math.ceil(size / ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in sizes[:-1]]
        return sizes

    def allocate(self, num_blocks: int, device: str | torch.device = "cpu") -> torch.Tensor:
        """Give a pool of blocks, uint8, (num_blocks, page_bytes), uninitialised."""
        return torch.empty(num_blocks, self.page_bytes, dtype=torch.uint8, device=device)

    def views(self, pages: torch.Tensor) -> dict[str, torch.Tensor]:
        """Give each field of a pool as a strided view, (num_blocks, *field.shape)."""
        if self.arrangement == "inline":
            return self._inline_views(pages)
        views, offset = {}, 0
        for field, size in zip(self.fields, self._sizes(), strict=True):
            raw = pages[:, offset : offset + field.num_bytes]
            views[field.name] = raw.view(field.dtype).view(len(pages), *field.shape)
            offset += size
        return views

    def _inline_views(self, pages: torch.Tensor) -> dict[str, torch.Tensor]:
        block_size, num_kv_heads = self.fields[0].shape[:2]
        rows = pages.view(len(pages), block_size, num_kv_heads, self.page_bytes // (block_size * num_kv_heads))
        views, offset = {}, 0
        for field in self.fields:
            num_bytes = field.shape[-1] * field.dtype.itemsize
            views[field.name] = rows[..., offset : offset + num_bytes].view(field.dtype)
            offset += num_bytes
        return views

    def store(self, pages: torch.Tensor, fields: Mapping[str, torch.Tensor]) -> None:
        """Copy encoded fields, each (num_blocks, *field.shape), into a pool."""
        for name, view in self.views(pages).items():
            view.copy_(fields[name])
