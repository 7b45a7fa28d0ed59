"""Rotary position embedding in plain torch, in the half-split ("neox") pairing that Llama uses."""

import torch


def cos_sin_table(max_positions: int, rotary_dim: int, *, base: float = 5e5, device: str = "cpu") -> torch.Tensor:
    """Give cosines, then sines, of ``position / base^(2i / rotary_dim)``: fp32, (max_positions, rotary_dim)."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    angle = torch.arange(max_positions, dtype=torch.float64, device=device)[:, None] * base**-exponent
    return torch.cat([angle.cos(), angle.sin()], 1).float()


def rope_reference(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Turn rows of `x`, (num_tokens, num_heads, head_dim), in fp32 (Su et al. 2021, arXiv:2104.09864)."""
    cos, sin = cos_sin[positions][:, None].chunk(2, -1)
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
