"""8-bit floating point with one scale per K and per V tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from .base import KvFormat
from .pages import Field, PageLayout

Code = Literal["e4m3", "e5m2"]
FP8_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Fp8(KvFormat):
    """One byte per element: ``x / scale`` rounded to the nearest code, ties to even, clamped to the largest finite one.

    e4m3 is the OCP format E4M3FN (bias 7, no infinity, largest 448, NaN is 0x7f and 0xff); e5m2 is the upper byte of an
    IEEE half (bias 15, largest 57,344). OCP 8-bit Floating Point Specification 1.0, 2023.

    Attributes
    ----------
    code : {'e4m3', 'e5m2'}
    key_scale, value_scale : float
        Constants of the model (vLLM and SGLang take them from the checkpoint, else 1.0), not part of the cache.
    """

    code: Code = "e4m3"
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of kvsim and of vLLM's ``--kv-cache-dtype``."""
        return "fp8" if self.code == "e4m3" else "fp8_e5m2"

    @property
    def strategy(self) -> str:  # type: ignore[override]
        """The simulator's encoding."""
        return self.name

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        shape = (block_size, num_kv_heads, head_dim)
        return PageLayout(tuple(Field(name, FP8_DTYPES[self.code], shape) for name in ("key", "value")))

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "key": to_fp8(keys.float() * (1.0 / self.key_scale), self.code),
            "value": to_fp8(values.float() * (1.0 / self.value_scale), self.code),
        }

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        return fields["key"].float() * self.key_scale, fields["value"].float() * self.value_scale


def to_fp8(values: torch.Tensor, code: Code) -> torch.Tensor:
    """Round fp32 to the nearest code, clamped to the largest finite one; NaN stays NaN."""
    limit = torch.finfo(FP8_DTYPES[code]).max
    return values.clamp(-limit, limit).to(FP8_DTYPES[code])
