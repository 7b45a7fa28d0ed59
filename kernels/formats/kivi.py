"""KIVI: keys quantised per channel, values per token, both in groups of 32; the newest tokens stay native.

Liu et al. 2024, arXiv:2402.02750. A key group is 32 tokens of one channel, a value group 32 channels of one token;
each has an fp16 scale and zero point.
"""

from collections.abc import Mapping
from typing import Literal

import torch

from .base import KvFormat
from .pages import Field, PageLayout

GROUP = 32
RESIDUAL_TOKENS = 128

Packing = Literal["interleaved", "sequential"]


def packed_tokens(tokens: int, residual_tokens: int = RESIDUAL_TOKENS) -> int:
    """How many of a request's tokens are quantised: the least multiple of 32 that leaves at most the residual.

    When the residual is full and a token arrives, the oldest 32 leave together, because the keys of a group share a
    scale; so a request of more than R tokens has between R - 31 and R native ones.
    """
    return GROUP * max(0, -(-(tokens - residual_tokens) // GROUP))


def quantise_groups(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise fp32 groups along the last dimension; give uint8 codes, fp16 scale and fp16 zero point.

    ``value = code * scale + zero``, with the smallest value as zero and the range over ``2^bits - 1`` as scale.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = low.half()
    step = scale.float()
    inverse = torch.where(step > 0, 1.0 / step, 0.0)
    codes = (groups - zero.float()[..., None]) * inverse[..., None]
    return codes.round().clamp(0, 2**bits - 1).to(torch.uint8), scale, zero


def _shifts(bits: int, packing: Packing, device: torch.device) -> torch.Tensor:
    """Give the bit at which each code of a 32-bit word starts."""
    place = torch.arange(32 // bits, device=device)
    return place * bits if packing == "sequential" else place % 2 * 16 + place // 2 * bits


def pack_words(codes: torch.Tensor, bits: int, packing: Packing) -> torch.Tensor:
    """Pack codes (..., n) to int32 words (..., n * bits / 32) of neighbours.

    ``sequential``: from the low bits to the high; ``interleaved``: by turns into the low and the high half of the word.
    """
    shifts = _shifts(bits, packing, codes.device)
    words = (codes.unflatten(-1, (-1, 32 // bits)).long() << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_words(words: torch.Tensor, bits: int, packing: Packing) -> torch.Tensor:
    """Undo `pack_words`; give uint8 codes."""
    shifts = _shifts(bits, packing, words.device)
    return ((words.long()[..., None] >> shifts) & (2**bits - 1)).flatten(-2).to(torch.uint8)


class Kivi(KvFormat):
    """Blocks of packed codes with fp16 scales and zero points; the residual lies outside the pool.

    Parameters
    ----------
    bits : {4, 2}
    packing : {'interleaved', 'sequential'}
        ``interleaved``: words of channels of one token and head, neighbours in the two halves of a word, so that a mask
        leaves a pair of 16-bit lanes. ``sequential``: as in KIVI's repository, keys packed along the tokens of a group
        and values along the channels, from the low bits to the high.
    """

    block_size_multiple = GROUP
    residual_tokens = RESIDUAL_TOKENS

    def __init__(self, bits: Literal[4, 2], packing: Packing = "interleaved") -> None:
        self.bits = bits
        self.packing = packing
        self.name = self.strategy = f"kivi-{bits}"

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        if head_dim % GROUP or block_size % GROUP:
            msg = f"head_dim and block_size must be multiples of {GROUP}"
            raise ValueError(msg)
        groups = block_size // GROUP
        value = Field("value", torch.int32, (block_size, num_kv_heads, head_dim * self.bits // 32))
        by_channel = (groups, num_kv_heads, head_dim, self.bits)
        key = Field("key", torch.int32, by_channel if self.packing == "sequential" else value.shape)
        return PageLayout(
            (
                key,
                Field("key_scale", torch.float16, (groups, num_kv_heads, head_dim)),
                Field("key_zero", torch.float16, (groups, num_kv_heads, head_dim)),
                value,
                Field("value_scale", torch.float16, (block_size, num_kv_heads, head_dim // GROUP)),
                Field("value_zero", torch.float16, (block_size, num_kv_heads, head_dim // GROUP)),
            )
        )

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        # (num_blocks, groups, num_kv_heads, head_dim, 32): a group's tokens last.
        by_channel = keys.float().unflatten(1, (-1, GROUP)).movedim(2, -1)
        key_codes, key_scale, key_zero = quantise_groups(by_channel, self.bits)
        value_codes, value_scale, value_zero = quantise_groups(values.float().unflatten(-1, (-1, GROUP)), self.bits)
        if self.packing == "interleaved":
            key_codes = key_codes.movedim(-1, 2).flatten(1, 2)
        key = pack_words(key_codes, self.bits, self.packing)
        value = pack_words(value_codes.flatten(-2), self.bits, self.packing)
        return {
            **{"key": key, "key_scale": key_scale, "key_zero": key_zero},
            **{"value": value, "value_scale": value_scale, "value_zero": value_zero},
        }

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        key_codes = unpack_words(fields["key"], self.bits, self.packing)
        value_codes = unpack_words(fields["value"], self.bits, self.packing)
        interleaved = self.packing == "interleaved"
        key_codes = key_codes.unflatten(1, (-1, GROUP)) if interleaved else key_codes.movedim(-1, 2)
        keys = key_codes.float() * fields["key_scale"].float()[:, :, None] + fields["key_zero"].float()[:, :, None]
        values = (
            value_codes.float().unflatten(-1, (-1, GROUP)) * fields["value_scale"].float()[..., None]
            + fields["value_zero"].float()[..., None]
        )
        return keys.flatten(1, 2), values.flatten(-2)
