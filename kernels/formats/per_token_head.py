"""8- and 4-bit codes with their own scale for each token and KV head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from .base import KvFormat
from .fp8 import to_fp8
from .pages import Field, PageLayout

CodeDtype = Literal["int8", "fp8"]
Arrangement = Literal["planar", "inline"]

SMALLEST_SCALE = 1e-6
"""vLLM's floor: a vector of zeros gets zero codes and this scale."""
SMALLEST_FP16_SCALE = 2.0**-14
"""Smallest normal half: the floor of scales that are stored as such."""
INT8_OFFSET = 128
LARGEST_CODE = {"int8": 127.0, "fp8": 448.0}
LARGEST_NIBBLE = 15


@dataclass(frozen=True)
class HeadMajorLayout(PageLayout):
    """A planar layout whose per-token metadata lies head by head, so that one head's run of tokens is contiguous.

    Fields keep the logical shape (block_size, num_kv_heads, n); those with at most `metadata_elements` elements per
    vector are stored as (num_kv_heads, block_size, n). A program reads one head: token by token its metadata would
    cost a 32-byte sector per token for 4 bytes.
    """

    metadata_elements: int = 2

    def views(self, pages: torch.Tensor) -> dict[str, torch.Tensor]:
        views = super().views(pages)
        for field in self.fields:
            if field.shape[-1] <= self.metadata_elements:
                block_size, num_kv_heads, elements = field.shape
                stored = views[field.name].view(len(pages), num_kv_heads, block_size, elements)
                views[field.name] = stored.transpose(1, 2)
        return views


def per_vector_layout(
    fields: tuple[tuple[str, torch.dtype, int], ...], block_size: int, num_kv_heads: int, arrangement: Arrangement
) -> PageLayout:
    """Lay out fields, each (name, dtype, elements per vector); raise ValueError where a scale would start unaligned."""
    if arrangement == "inline" and any(elements * dtype.itemsize % 4 for _, dtype, elements in fields):
        raise ValueError("codes beside an fp32 scale must fill a multiple of 4 bytes")
    shaped = tuple(Field(name, dtype, (block_size, num_kv_heads, elements)) for name, dtype, elements in fields)
    return HeadMajorLayout(shaped) if arrangement == "planar" else PageLayout(shaped, "inline")


@dataclass(frozen=True)
class PerTokenHead8(KvFormat):
    """``int8_per_token_head`` and ``fp8_per_token_head``: D bytes of codes and an fp32 scale per vector.

    ``scale = max(max |x| / largest code, 1e-6)`` and ``code = round(x * (1 / scale))``, ties to even. The largest code
    is 127, or 448 for e4m3.

    Attributes
    ----------
    dtype : {'int8', 'fp8'}
    arrangement : {'planar', 'inline'}
        planar: int8 codes are stored as code + 128, unsigned, which kernels read with fewer instructions. inline, as
        vLLM lays the cache: each vector's codes (int8 signed), then its scale.
    """

    dtype: CodeDtype = "int8"
    arrangement: Arrangement = "planar"

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of kvsim and of vLLM's ``--kv-cache-dtype``; the same for both arrangements."""
        return f"{self.dtype}_per_token_head"

    @property
    def strategy(self) -> str:  # type: ignore[override]
        """The simulator's encoding."""
        return self.name

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        int8 = torch.uint8 if self.arrangement == "planar" else torch.int8
        code = int8 if self.dtype == "int8" else torch.float8_e4m3fn
        key, key_scale = ("key", code, head_dim), ("key_scale", torch.float32, 1)
        value, value_scale = ("value", code, head_dim), ("value_scale", torch.float32, 1)
        if self.arrangement == "inline":
            order = (key, key_scale, value, value_scale)
        else:
            order = (key, value, key_scale, value_scale)
        return per_vector_layout(order, block_size, num_kv_heads, self.arrangement)

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        fields = {}
        for name, vectors in (("key", keys.float()), ("value", values.float())):
            scale = (vectors.abs().amax(-1, keepdim=True) / LARGEST_CODE[self.dtype]).clamp_min(SMALLEST_SCALE)
            fields[f"{name}_scale"] = scale
            fields[name] = self._code(vectors * scale.reciprocal())
        return fields

    def _code(self, scaled: torch.Tensor) -> torch.Tensor:
        if self.dtype == "fp8":
            return to_fp8(scaled, "e4m3")
        codes = scaled.round().clamp(-LARGEST_CODE["int8"], LARGEST_CODE["int8"])
        if self.arrangement == "planar":
            return (codes + INT8_OFFSET).to(torch.uint8)
        return codes.to(torch.int8)

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        offset = INT8_OFFSET if (self.dtype, self.arrangement) == ("int8", "planar") else 0
        return (
            (fields["key"].float() - offset) * fields["key_scale"],
            (fields["value"].float() - offset) * fields["value_scale"],
        )


@dataclass(frozen=True)
class Int4PerTokenHead(KvFormat):
    """``int4_per_token_head`` with D/2 bytes of codes, an fp16 scale and an fp16 zero per vector.

    ``zero = min x`` and ``scale = max((max x - min x) / 15, 2^-14)``, both rounded to fp16; ``code = round((x - zero) *
    (1 / scale))`` by the rounded ones, ties to even, clamped to 0..15. Half-split: byte ``i`` holds the code of element
    ``i`` in its low and of element ``i + D/2`` in its high nibble. Vectors are taken as they are: the Hadamard rotation
    that the strategy applies to K, V and queries happens outside. Elements must lie within fp16's range.
    """

    name = "int4_per_token_head"
    strategy = "int4_per_token_head"

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        codes = tuple((name, torch.uint8, half_of(head_dim)) for name in ("key", "value"))
        metadata = tuple((name, torch.float16, 2) for name in ("key_scale_zero", "value_scale_zero"))
        return per_vector_layout((*codes, *metadata), block_size, num_kv_heads, "planar")

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        fields = {}
        for name, vectors in (("key", keys.float()), ("value", values.float())):
            low, high = vectors.aminmax(dim=-1, keepdim=True)
            zero = low.to(torch.float16)
            scale = ((high - low) / LARGEST_NIBBLE).clamp_min(SMALLEST_FP16_SCALE).to(torch.float16)
            codes = (
                ((vectors - zero.float()) * scale.float().reciprocal()).round().clamp(0, LARGEST_NIBBLE).to(torch.uint8)
            )
            fields[name] = pack_half_split(codes)
            fields[f"{name}_scale_zero"] = torch.cat((scale, zero), -1)
        return fields

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            unpack_half_split(fields[name]).float() * fields[f"{name}_scale_zero"][..., :1].float()
            + fields[f"{name}_scale_zero"][..., 1:].float()
            for name in ("key", "value")
        )
        return keys, values


@dataclass(frozen=True)
class VllmInt4PerTokenHead(KvFormat):
    """``int4_per_token_head`` as vLLM lays it (vllm/v1/attention/ops/int4_per_token_head.py, vLLM PR 40835).

    Inline: D/2 bytes of codes, then an fp32 scale whose lowest four mantissa bits hold the integer zero point. Byte
    ``i`` holds element ``2 i`` in its low and ``2 i + 1`` in its high nibble. ``scale = max((max x - min x) / 15,
    1e-6)``, ``zero = round(-min x / scale)`` and ``code = round(x / scale + zero)``, both clamped to 0..15; vLLM rounds
    halves away from zero, here they go to even. An integer zero in 0..15 cannot follow a vector whose elements all have
    one sign.
    """

    name = "int4_per_token_head"
    strategy = "int4_per_token_head"

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        fields = (
            ("key", torch.uint8, half_of(head_dim)),
            ("key_scale", torch.float32, 1),
            ("value", torch.uint8, half_of(head_dim)),
            ("value_scale", torch.float32, 1),
        )
        return per_vector_layout(fields, block_size, num_kv_heads, "inline")

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        fields = {}
        for name, vectors in (("key", keys.float()), ("value", values.float())):
            low, high = vectors.aminmax(dim=-1, keepdim=True)
            scale = ((high - low) / LARGEST_NIBBLE).clamp_min(SMALLEST_SCALE)
            zero = (-low / scale).round().clamp(0, LARGEST_NIBBLE)
            codes = (vectors * scale.reciprocal() + zero).round().clamp(0, LARGEST_NIBBLE).to(torch.uint8)
            fields[name] = codes[..., 0::2] | codes[..., 1::2] << 4
            bits = scale.view(torch.int32) & ~LARGEST_NIBBLE | zero.to(torch.int32)
            fields[f"{name}_scale"] = bits.view(torch.float32)
        return fields

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = []
        for name in ("key", "value"):
            packed, bits = fields[name], fields[f"{name}_scale"].contiguous().view(torch.int32)
            scale = (bits & ~LARGEST_NIBBLE).view(torch.float32)
            codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
            decoded.append((codes.float() - (bits & LARGEST_NIBBLE)) * scale)
        return decoded[0], decoded[1]


def half_of(head_dim: int) -> int:
    """Bytes of a vector of 4-bit codes; raise ValueError for an odd head_dim."""
    if head_dim % 2:
        raise ValueError("head_dim must be even: two codes share a byte")
    return head_dim // 2


def pack_half_split(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes (..., D), uint8, to (..., D/2): the first half in the low nibbles, the second in the high."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def unpack_half_split(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_half_split`."""
    return torch.cat((packed & 15, packed >> 4), -1)
