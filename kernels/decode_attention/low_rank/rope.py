"""Rotary position embedding of keys that are stored without it: table and reference."""

import torch

ROPE_BASE = 500_000.0
"""Llama-3's ``rope_theta``."""


def rope_table(num_positions: int, head_dim: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """Give cosines, then sines, of every position, fp32 (num_positions, head_dim); computed in fp64.

    Half-split pairs (i, i + head_dim / 2), as Llama (``rotate_half``) and vLLM's ``cos_sin_cache`` with NeoX style.
    """
    frequency = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1).float().to(device)


def rotate(keys: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate keys, (tokens, num_kv_heads, head_dim) in fp32, of which row ``t`` is at position ``t``."""
    cosine, sine = table[: len(keys), None].chunk(2, -1)
    low, high = keys.chunk(2, -1)
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1)
