"""RMSNorm in plain torch (Zhang and Sennrich 2019, arXiv:1910.07467)."""

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Give ``x / sqrt(mean(x^2) + epsilon) * weight`` per row of `x`, (tokens, hidden_size), in fp32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight.float()
