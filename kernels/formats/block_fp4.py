"""4-bit floats (E2M1) in blocks along the head dimension that share a one-byte scale: NVFP4 and MXFP4.

E2M1, E4M3 and E8M0 are those of the OCP Microscaling Formats v1.0; NVFP4 is NVIDIA's, cuBLAS documentation.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from .base import KvFormat
from .pages import Field, PageLayout

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0 to 7; bit 3 is the sign."""
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E8M0_BIAS = 127
E2M1_MAX_EXPONENT = 2
"""Exponent of the largest E2M1 value, 6 = 1.5 * 2^2."""


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Round fp32 to the nearest E2M1 code, ties to the even code, magnitudes above 6 to 6; uint8 codes 0 to 15."""
    magnitude = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for step, midpoint in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        code += magnitude >= midpoint if step % 2 else magnitude > midpoint
    return code | (values.signbit().to(torch.uint8) << 3)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Give the fp32 value of each code, 0 to 15."""
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device)
    return table[codes.long()]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes (..., head_dim) two neighbours to a byte, the first in the low bits."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


class BlockFp4(KvFormat):
    """E2M1 elements, two to a byte, with a one-byte scale per block of elements."""

    block_elements: ClassVar[int]
    scale_dtype: ClassVar[torch.dtype]

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        if head_dim % self.block_elements:
            msg = f"head_dim must be a multiple of {self.block_elements}"
            raise ValueError(msg)
        tokens = (block_size, num_kv_heads)
        codes, scales = (*tokens, head_dim // 2), (*tokens, head_dim // self.block_elements)
        return PageLayout(
            (
                Field("key", torch.uint8, codes),
                Field("key_scale", self.scale_dtype, scales),
                Field("value", torch.uint8, codes),
                Field("value_scale", self.scale_dtype, scales),
            )
        )

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        fields = {}
        for name, vectors in (("key", keys), ("value", values)):
            blocks = vectors.float().unflatten(-1, (-1, self.block_elements))
            stored, factor = self.encode_scale(name, blocks.abs().amax(-1))
            inverse = torch.where(factor > 0, 1.0 / factor, 0.0)
            fields[name] = pack_nibbles(encode_e2m1((blocks * inverse[..., None]).flatten(-2)))
            fields[f"{name}_scale"] = stored
        return fields

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            (
                decode_e2m1(unpack_nibbles(fields[name])).unflatten(-1, (-1, self.block_elements))
                * self.decode_scale(name, fields[f"{name}_scale"])[..., None]
            ).flatten(-2)
            for name in ("key", "value")
        )
        return keys, values

    @abstractmethod
    def encode_scale(self, name: str, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the stored scales of ``key`` or ``value`` blocks of these largest magnitudes, and their fp32 values."""

    @abstractmethod
    def decode_scale(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """Give the fp32 factors of stored scales."""

    @abstractmethod
    def tensor_scale(self, name: str) -> float:
        """Give the factor that all blocks of ``key`` or ``value`` share."""


class NvFp4(BlockFp4):
    """Blocks of 16 with an E4M3 scale, and an fp32 scale for all keys and one for all values of a layer.

    Parameters
    ----------
    key_tensor_scale, value_tensor_scale : float
        Constants of the model, from calibration: the largest magnitude over 6 * 448. The defaults suit magnitudes
        below 6.
    """

    name = "nvfp4"
    strategy = "nvfp4"
    block_elements = 16
    scale_dtype = torch.float8_e4m3fn

    def __init__(self, key_tensor_scale: float = 0.0022, value_tensor_scale: float = 0.0023) -> None:
        self._tensor_scales = {"key": key_tensor_scale, "value": value_tensor_scale}

    def tensor_scale(self, name: str) -> float:
        return self._tensor_scales[name]

    def encode_scale(self, name: str, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor = torch.tensor(1.0 / (E2M1_MAX * self.tensor_scale(name)), dtype=torch.float32, device=largest.device)
        stored = (largest * factor).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        return stored, self.decode_scale(name, stored)

    def decode_scale(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        return stored.float() * self.tensor_scale(name)


class MxFp4(BlockFp4):
    """Blocks of 32 with an E8M0 scale, a power of two; OCP Microscaling Formats v1.0, section 6.3.

    Scales are kept within fp32's normal range, 2^-126 to 2^127.
    """

    name = "mxfp4"
    strategy = "mxfp4"
    block_elements = 32
    scale_dtype = torch.uint8

    def tensor_scale(self, name: str) -> float:
        return 1.0

    def encode_scale(self, name: str, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        biased_exponent = (largest.float().view(torch.int32) >> 23) & 255
        stored = (biased_exponent - E2M1_MAX_EXPONENT).clamp(1, 254).to(torch.uint8)
        return stored, self.decode_scale(name, stored)

    def decode_scale(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        return (stored.to(torch.int32) << 23).view(torch.float32)
