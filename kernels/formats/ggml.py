"""llama.cpp's cache types q8_0, q5_1 and q4_0: 32 elements that share an fp16 step, and an fp16 minimum in q5_1.

Codes are those of ggml's reference routines: chosen by the step in fp32, which is then rounded to fp16.
"""

from collections.abc import Mapping
from typing import Literal

import torch

from .base import KvFormat
from .pages import Field, PageLayout

Type = Literal["q8_0", "q5_1", "q4_0"]

BLOCK = 32
BITS = {"q8_0": 8, "q5_1": 5, "q4_0": 4}
OFFSET = {"q8_0": 128, "q5_1": 0, "q4_0": 8}
"""What is added to a signed code before it is stored."""


class Ggml(KvFormat):
    """Codes, steps and minima in fields of their own, so that every lane loads whole words.

    llama.cpp puts a block's step beside its codes, which starts most blocks at addresses that only 2 divides. The bytes
    are the same. Vectors are taken as they are: llama.cpp's rotation of K, V and queries happens outside.

    Parameters
    ----------
    name : {'q8_0', 'q5_1', 'q4_0'}
    """

    def __init__(self, name: Type) -> None:
        self.name = self.strategy = name
        self.bits = BITS[name]

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        if head_dim % BLOCK:
            msg = f"head_dim must be a multiple of {BLOCK}"
            raise ValueError(msg)
        tokens, blocks = (block_size, num_kv_heads), head_dim // BLOCK
        widths = {"": (torch.uint8, blocks * (32 if self.bits == 8 else 16))}
        if self.bits == 5:
            widths["_high"] = (torch.int32, blocks)
        widths["_scale"] = (torch.float16, blocks * (2 if self.bits == 5 else 1))
        return PageLayout(
            tuple(
                Field(vector + suffix, field_dtype, (*tokens, width))
                for vector in ("key", "value")
                for suffix, (field_dtype, width) in widths.items()
            )
        )

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        fields = {}
        for vector, tensor in (("key", keys), ("value", values)):
            codes, scale = self._quantise(tensor.float().unflatten(-1, (-1, BLOCK)))
            for suffix, field in self._pack(codes, scale).items():
                fields[vector + suffix] = field.flatten(-2)
        return fields

    def _quantise(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give codes from 0 up, int32, and fp16 steps, (..., 1), with the minimum after it in q5_1."""
        if self.bits == 8:
            step = blocks.abs().amax(-1, keepdim=True) / 127.0
            scaled = blocks * _inverse(step)
            codes = (scaled.abs() + 0.5).floor().copysign(scaled)
            # A number just below a half must not be lifted to the half by the sum.
            codes = torch.where((scaled - scaled.trunc()).abs() < 0.5, scaled.trunc(), codes)
            return codes.int() + OFFSET["q8_0"], step.half()
        if self.bits == 5:
            low, high = blocks.aminmax(dim=-1, keepdim=True)
            step = (high - low) / 31.0
            codes = ((blocks - low) * _inverse(step) + 0.5).int().clamp(max=31)
            return codes, torch.cat((step, low), -1).half()
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        step = extreme / -8.0
        return (blocks * _inverse(step) + 8.5).int().clamp(max=15), step.half()

    def _pack(self, codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Give the fields by suffix, each (..., blocks, n)."""
        if self.bits == 8:
            return {"": codes.to(torch.uint8), "_scale": scale}
        low, high = (codes & 15).chunk(2, -1)
        packed = {"": (low | high << 4).to(torch.uint8)}
        if self.bits == 5:
            packed["_high"] = pack_high_bits(codes >> 4)
        return packed | {"_scale": scale}

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (self._decode(fields, vector) for vector in ("key", "value"))
        return keys, values

    def _decode(self, fields: Mapping[str, torch.Tensor], vector: str) -> torch.Tensor:
        scale = fields[f"{vector}_scale"].float().unflatten(-1, (-1, 2 if self.bits == 5 else 1))
        stored = fields[vector].int().unflatten(-1, (-1, 32 if self.bits == 8 else 16))
        codes = stored if self.bits == 8 else torch.cat((stored & 15, stored >> 4), -1)
        if self.bits == 5:
            codes |= unpack_high_bits(fields[f"{vector}_high"]) << 4
            return (codes.float() * scale[..., :1] + scale[..., 1:]).flatten(-2)
        return ((codes - OFFSET[self.name]).float() * scale).flatten(-2)


def _inverse(step: torch.Tensor) -> torch.Tensor:
    return torch.where(step == 0, 0.0, 1.0 / step)


def _high_bit_places(device: torch.device) -> torch.Tensor:
    """Give the bit of a block's word that holds the fifth bit of each of its 32 elements.

    Word w of a block's codes has the nibbles of elements 4 w to 4 w + 3 and those 16 further; their fifth bits are four
    in a row, at bit 4 w, for the lower half of that word and four at 16 + 4 w for the upper, in the order of the
    nibbles, so that a shift and a mask put them on top of the nibbles of both halves.
    """
    element = torch.arange(BLOCK, device=device)
    byte = element % 16
    nibble = byte % 2 * 2 + element // 16
    return byte % 4 // 2 * 16 + byte // 4 * 4 + nibble


def pack_high_bits(bits: torch.Tensor) -> torch.Tensor:
    """Pack bits, (..., 32), to int32 words, (..., 1)."""
    words = (bits.long() << _high_bit_places(bits.device)).sum(-1, keepdim=True)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_high_bits(words: torch.Tensor) -> torch.Tensor:
    """Undo `pack_high_bits` for words (..., blocks): int32 (..., blocks, 32)."""
    return (words.long()[..., None] >> _high_bit_places(words.device) & 1).int()
