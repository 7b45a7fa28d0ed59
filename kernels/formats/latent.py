"""One latent per token shared by all query heads: multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434).

A token's key is the whole latent, ``latent_dim`` compressed values followed by `ROPE_DIM` rotary ones; its value is the
first ``latent_dim``. There is one KV head, and ``head_dim`` is the width of the key: 512 + 64 = 576 in DeepSeek-V3.
"""

from collections.abc import Mapping

import torch

from .base import KvFormat
from .pages import Field, PageLayout

ROPE_DIM = 64
SCALE_GROUP = 128
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126
"""A group of zeros keeps a scale that can be divided by (vLLM ``concat_and_cache_ds_mla``: FLT_MIN)."""


def require_one_head(num_kv_heads: int, head_dim: int) -> None:
    """Raise ValueError where K and V are not one latent."""
    if num_kv_heads != 1 or head_dim <= ROPE_DIM:
        raise ValueError(
            f"a latent has one KV head of more than {ROPE_DIM} values, not {num_kv_heads} heads of {head_dim}"
        )


class Mla(KvFormat):
    """The latent in the model's dtype: 576 values in 1,152 B for DeepSeek-V3."""

    name = "mla"
    strategy = "native"

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        require_one_head(num_kv_heads, head_dim)
        return PageLayout((Field("latent", dtype, (block_size, 1, head_dim)),))

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keep the keys; values are a part of them and not read."""
        return {"latent": keys}

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys = fields["latent"].float()
        return keys, keys[..., : head_dim - ROPE_DIM]


class MlaFp8(Mla):
    """The latent in fp8 e4m3, one byte per value; one scale per layer, which is a constant of the model.

    Attributes
    ----------
    scale : float
        A stored code stands for its value times this.
    """

    name = "mla_fp8_e4m3"
    strategy = "fp8"

    def __init__(self, scale: float = 0.0625) -> None:
        self.scale = scale

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        require_one_head(num_kv_heads, head_dim)
        return PageLayout((Field("latent", torch.float8_e4m3fn, (block_size, 1, head_dim)),))

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"latent": to_e4m3(keys.float() * (1.0 / self.scale))}

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys = fields["latent"].float() * self.scale
        return keys, keys[..., : head_dim - ROPE_DIM]


class Fp8DsMla(KvFormat):
    """vLLM ``fp8_ds_mla``: fp8 e4m3 in groups of 128, their fp32 scales, then the rotary values in 16 bits.

    512 + 4 x 4 + 64 x 2 = 656 B per token and layer, the parts of a token side by side (vLLM blog 2025-09-29).
    """

    name = "fp8_ds_mla"
    strategy = "fp8"

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        require_one_head(num_kv_heads, head_dim)
        latent_dim = head_dim - ROPE_DIM
        if latent_dim % SCALE_GROUP:
            raise ValueError(f"fp8_ds_mla scales groups of {SCALE_GROUP} values, which do not divide {latent_dim}")
        fields = (
            Field("latent", torch.float8_e4m3fn, (block_size, 1, latent_dim)),
            Field("latent_scale", torch.float32, (block_size, 1, latent_dim // SCALE_GROUP)),
            Field("rope", dtype, (block_size, 1, ROPE_DIM)),
        )
        return PageLayout(fields, "inline")

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scale each group so that its largest value becomes the largest e4m3 value; values are not read."""
        latent, rope = keys[..., :-ROPE_DIM].float(), keys[..., -ROPE_DIM:]
        groups = latent.unflatten(-1, (-1, SCALE_GROUP))
        scale = (groups.abs().amax(-1) * (1.0 / E4M3_MAX)).clamp_min(SMALLEST_SCALE)
        codes = to_e4m3(groups / scale[..., None]).flatten(-2)
        return {"latent": codes, "latent_scale": scale, "rope": rope}

    def decode(self, fields: Mapping[str, torch.Tensor], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        groups = fields["latent"].float().unflatten(-1, (-1, SCALE_GROUP))
        values = (groups * fields["latent_scale"][..., None]).flatten(-2)
        return torch.cat((values, fields["rope"].float()), -1), values


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Round fp32 to e4m3, to nearest even; what lies beyond 448 becomes 448, as on a GPU."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
